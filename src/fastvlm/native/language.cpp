// Qwen2 for a few tokens at once: what decoding does, in one call a step.
//
// With few tokens the time goes into reading the weights, so every matrix is read once, in the format in which it is
// stored, by all threads in turn; everything between matrices stays in caches. Sums are float32. Loops over LANES are
// written so that the compiler turns them into the widest vectors of the machine. Only products of bytes, which no
// compiler finds, are spelled out, for processors with AVX512-VNNI; others make floats of the bytes.
//
// Letters: T tokens, D width, A query heads, G key/value heads, E width of a head, K inputs and N outputs of a matrix.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BYTE_PRODUCTS 1
#else
#define HAS_BYTE_PRODUCTS 0
#endif

namespace {

constexpr int LANES = 16;

struct Matrix {           // (N, K) row by row; fields as in fastvlm/model/native.py
    const void* weight;   // float32, bfloat16, bytes, or two 4-bit numbers a byte, the lower half first
    const void* scales;   // (N, groups), for 8 and 4 bits: weight = number * scale + bias of its group
    const void* biases;
    const float* bias;    // (N) or null: added to the output
    int64_t rows, columns, group;
    int32_t bits;         // 32, 16, 8 or 4
    int32_t scale_bits;   // 32 or 16: format of scales and biases
};

struct Layer {
    const float* input_norm;
    const float* output_norm;
    Matrix query, key, value, output, gate, up, down;
};

struct Model {
    const Layer* layers;
    const float* final_norm;
    const float* frequencies;  // (E / 2), of the rotation
    int64_t num_layers, dim, mlp_dim, num_heads, num_kv_heads, head_dim;
    float epsilon;
    int32_t cache_bits;        // 32 or 16
};

struct Cache {                 // (layers, rows, G, capacity, E), contiguous
    void* keys;
    void* values;
    int64_t num_rows, capacity;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float load(const void* base, int64_t index, int bits) {
    if (bits == 32) return static_cast<const float*>(base)[index];
    return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16);
}

inline void put(float value, float& out) { out = value; }

inline void put(float value, uint16_t& out) {
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof raw);
    out = static_cast<uint16_t>((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);  // to the nearest, ties to even
}

inline void store(void* base, int64_t index, int bits, float value) {
    if (bits == 32) {
        static_cast<float*>(base)[index] = value;
        return;
    }
    put(value, static_cast<uint16_t*>(base)[index]);
}

inline float sum(const float* lanes) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

// Threads that wait between calls and meet at barriers inside one.
class Pool {
public:
    explicit Pool(int num_threads) : size(num_threads) {
        for (int index = 1; index < size; ++index) threads.emplace_back([this, index] { serve(index); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            is_closing = true;
        }
        wake.notify_all();
        for (auto& thread : threads) thread.join();
    }

    template <typename Work>
    void run(const Work& work) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            context = &work;
            call = [](const void* what, int index) { (*static_cast<const Work*>(what))(index); };
            num_running.store(size - 1);
            ++round;
        }
        wake.notify_all();
        work(0);
        for (int spins = 0; num_running.load(std::memory_order_acquire); ++spins) rest(spins);
    }

    void barrier() {
        if (size == 1) return;
        const int before = phase.load(std::memory_order_acquire);
        if (num_here.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            num_here.store(0, std::memory_order_relaxed);
            phase.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == before; ++spins) rest(spins);
    }

    const int size;

private:
    static void rest(int spins) {
        if (spins > 2000) std::this_thread::yield();
    }

    void serve(int index) {
        int64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return is_closing || round != seen; });
                if (is_closing) return;
                seen = round;
            }
            call(context, index);
            num_running.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake;
    const void* context = nullptr;
    void (*call)(const void*, int) = nullptr;
    int64_t round = 0;
    bool is_closing = false;
    std::atomic<int> num_running{0}, num_here{0}, phase{0};
};

// One vector as the kernels read it: in order, and its even and odd members apart (packed pairs are read as pairs).
struct Vector {
    std::vector<float> plain, even, odd;

    explicit Vector(int64_t size) : plain(size), even(size / 2 + 1), odd(size / 2 + 1) {}

    void put(int64_t index, float value) {
        plain[index] = value;
        (index & 1 ? odd : even)[index >> 1] = value;
    }
};

// A row of an 8- or 4-bit matrix as floats, or as bfloat16.
template <typename Out>
void unpack(const Matrix& m, int64_t row, Out* out) {
    const int64_t num_groups = m.columns / m.group;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + row * m.columns * m.bits / 8;
    for (int64_t group = 0; group < num_groups; ++group) {
        const float scale = load(m.scales, row * num_groups + group, m.scale_bits);
        const float bias = load(m.biases, row * num_groups + group, m.scale_bits);
        const int64_t begin = group * m.group, end = begin + m.group;
        if (m.bits == 8) {
            for (int64_t i = begin; i < end; ++i) put(static_cast<float>(weight[i]) * scale + bias, out[i]);
        } else {
            for (int64_t i = begin / 2; i < end / 2; ++i) {
                put(static_cast<float>(weight[i] & 15) * scale + bias, out[2 * i]);
                put(static_cast<float>(weight[i] >> 4) * scale + bias, out[2 * i + 1]);
            }
        }
    }
}

float dot_float(const float* weight, const float* x, int64_t size) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += weight[i + lane] * x[i + lane];
    float total = sum(lanes);
    for (; i < size; ++i) total += weight[i] * x[i];
    return total;
}

float dot_bfloat16(const uint16_t* weight, const Vector& x, int64_t size) {
    float even[LANES] = {}, odd[LANES] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        uint32_t pairs[LANES];
        std::memcpy(pairs, weight + i, sizeof pairs);
        for (int lane = 0; lane < LANES; ++lane) {
            even[lane] += from_bits(pairs[lane] << 16) * x.even[i / 2 + lane];
            odd[lane] += from_bits(pairs[lane] & 0xffff0000u) * x.odd[i / 2 + lane];
        }
    }
    float total = sum(even) + sum(odd);
    for (; i < size; ++i) total += load(weight, i, 16) * x.plain[i];
    return total;
}

// Sum over the groups of a row: scale * (numbers . x) + bias * (sum of x); `sums` holds the sums of x.
template <int BITS>
float dot_groups(const Matrix& m, int64_t row, const Vector& x, const float* sums) {
    const int64_t num_groups = m.columns / m.group;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + row * m.columns * BITS / 8;
    float lanes[LANES] = {}, rest = 0;
    for (int64_t group = 0; group < num_groups; ++group) {
        const float scale = load(m.scales, row * num_groups + group, m.scale_bits);
        const int64_t begin = group * m.group, end = begin + m.group;
        float part[LANES] = {};
        int64_t i = begin;
        if (BITS == 8) {
            for (; i + LANES <= end; i += LANES)
                for (int lane = 0; lane < LANES; ++lane)
                    part[lane] += static_cast<float>(weight[i + lane]) * x.plain[i + lane];
        } else {
            for (; i + 2 * LANES <= end; i += 2 * LANES)
                for (int lane = 0; lane < LANES; ++lane) {
                    const uint8_t pair = weight[i / 2 + lane];
                    part[lane] += static_cast<float>(pair & 15) * x.even[i / 2 + lane] +
                                  static_cast<float>(pair >> 4) * x.odd[i / 2 + lane];
                }
        }
        for (; i < end; ++i) {
            const int number = BITS == 8 ? weight[i] : (i & 1 ? weight[i / 2] >> 4 : weight[i / 2] & 15);
            part[0] += static_cast<float>(number) * x.plain[i];
        }
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += scale * part[lane];
        rest += load(m.biases, row * num_groups + group, m.scale_bits) * sums[group];
    }
    return sum(lanes) + rest;
}

#if HAS_BYTE_PRODUCTS
constexpr int64_t BLOCK = 32;  // inputs that share a scale

// A vector as whole numbers of 16 bits, x = scale * (256 high + low), halves of a byte each: rounded 256 times finer
// than 8 bits would. For 4-bit weights the even members come first, then the odd ones, as pairs are packed.
class Numbers {
public:
    void read(const Vector& x, int64_t size, int bits) {
        num_blocks = size / BLOCK;
        stride = bits == 8 ? round_up(size) : round_up(size / 2);
        const int64_t parts = bits == 8 ? 1 : 2;
        high.assign(parts * stride, 0);
        low.assign(parts * stride, 0);
        scales.assign(round_up(num_blocks), 0);
        for (int64_t block = 0; block < num_blocks; ++block) {
            const float* own = x.plain.data() + block * BLOCK;
            float largest = 0, broken = 0;  // NaN if one of them is infinite or none: so the sums will be
            for (int64_t i = 0; i < BLOCK; ++i) {
                largest = std::fmax(largest, std::fabs(own[i]));
                broken += own[i] * 0;
            }
            scales[block] = largest / 32512 + broken;  // 127 * 256: the upper half cannot overflow
            const float inverse = largest > 0 ? 32512 / largest : 0;
            if (bits == 8) {
                cut(x.plain.data(), block * BLOCK, BLOCK, inverse, 0);
            } else {
                cut(x.even.data(), block * BLOCK / 2, BLOCK / 2, inverse, 0);
                cut(x.odd.data(), block * BLOCK / 2, BLOCK / 2, inverse, stride);
            }
        }
    }

    std::vector<int8_t> high, low;
    std::vector<float> scales;
    int64_t num_blocks = 0, stride = 0;  // the odd members begin at the stride

private:
    static int64_t round_up(int64_t size) { return (size + 63) / 64 * 64; }

    void cut(const float* x, int64_t begin, int64_t count, float inverse, int64_t to) {
        for (int64_t i = begin; i < begin + count; ++i) {
            const int32_t number = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
            const int8_t lower = static_cast<int8_t>(number);
            low[to + i] = lower;
            high[to + i] = static_cast<int8_t>((number - lower) >> 8);
        }
    }
};

// `dot_groups` with products of bytes; `factors` is room for a float a block, a multiple of 64 of them.
template <int BITS>
float dot_numbers(const Matrix& m, int64_t row, const Numbers& x, const float* sums, float* factors) {
    constexpr int64_t STEP = BITS == 8 ? 64 : 128;  // inputs in 64 bytes of weights
    const int64_t num_groups = m.columns / m.group, blocks_of_group = m.group / BLOCK;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + row * m.columns * BITS / 8;
    float rest = 0;
    if (num_groups == 1) {
        std::memcpy(factors, x.scales.data(), x.scales.size() * sizeof(float));
    } else {
        for (int64_t group = 0; group < num_groups; ++group) {
            const float scale = load(m.scales, row * num_groups + group, m.scale_bits);
            for (int64_t i = 0; i < blocks_of_group; ++i)
                factors[group * blocks_of_group + i] = scale * x.scales[group * blocks_of_group + i];
        }
    }
    for (int64_t group = 0; group < num_groups; ++group)
        rest += load(m.biases, row * num_groups + group, m.scale_bits) * sums[group];
    // A lane sums four neighbouring bytes: eight lanes are a block of 8-bit weights, four one of 4-bit pairs.
    const __m512i spread = BITS == 8 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                                     : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i zero = _mm512_setzero_si512(), nibble = _mm512_set1_epi8(15);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < m.columns; i += STEP) {
        const int64_t at = i * BITS / 8, left = m.columns * BITS / 8 - at;
        const __mmask64 mask = left < 64 ? (1ull << left) - 1 : ~0ull;
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, weight + at);
        __m512i high, low;
        if (BITS == 8) {
            high = _mm512_dpbusd_epi32(zero, bytes, _mm512_loadu_si512(x.high.data() + at));
            low = _mm512_dpbusd_epi32(zero, bytes, _mm512_loadu_si512(x.low.data() + at));
        } else {
            const __m512i even = _mm512_and_si512(bytes, nibble);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
            high = _mm512_dpbusd_epi32(zero, even, _mm512_loadu_si512(x.high.data() + at));
            high = _mm512_dpbusd_epi32(high, odd, _mm512_loadu_si512(x.high.data() + x.stride + at));
            low = _mm512_dpbusd_epi32(zero, even, _mm512_loadu_si512(x.low.data() + at));
            low = _mm512_dpbusd_epi32(low, odd, _mm512_loadu_si512(x.low.data() + x.stride + at));
        }
        const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        const __m512 factor = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(factors + i / BLOCK));
        total = _mm512_fmadd_ps(product, factor, total);
    }
    const float whole = num_groups == 1 ? load(m.scales, row, m.scale_bits) : 1;
    return whole * _mm512_reduce_add_ps(total) + rest;
}
#endif

float dot(const Matrix& m, int64_t row, const Vector& x, const float* sums) {
    const float bias = m.bias ? m.bias[row] : 0;
    switch (m.bits) {
        case 32: return bias + dot_float(static_cast<const float*>(m.weight) + row * m.columns, x.plain.data(), m.columns);
        case 16: return bias + dot_bfloat16(static_cast<const uint16_t*>(m.weight) + row * m.columns, x, m.columns);
        case 8: return bias + dot_groups<8>(m, row, x, sums);
        default: return bias + dot_groups<4>(m, row, x, sums);
    }
}

// What one thread does of a call.
class Worker {
public:
    Worker(Pool& pool, int index) : pool(pool), index(index) {}

    // For each row of the matrix that is this thread's and each token: take(token, row, sum).
    template <typename Take>
    void multiply(const Matrix& m, const std::vector<Vector>& inputs, const Take& take) {
        const int64_t num_groups = m.bits < 16 ? m.columns / m.group : 0;
        sums.resize(inputs.size() * num_groups);
        for (size_t token = 0; token < inputs.size(); ++token)
            for (int64_t group = 0; group < num_groups; ++group) {
                float total = 0;
                for (int64_t i = group * m.group; i < (group + 1) * m.group; ++i) total += inputs[token].plain[i];
                sums[token * num_groups + group] = total;
            }
        const int64_t begin = m.rows * index / pool.size, end = m.rows * (index + 1) / pool.size;
#if HAS_BYTE_PRODUCTS
        if (m.bits < 16 && m.group % BLOCK == 0) {
            numbers.resize(inputs.size());
            for (size_t token = 0; token < inputs.size(); ++token)
                numbers[token].read(inputs[token], m.columns, m.bits);
            factors.assign(numbers[0].scales.size() + LANES, 0);  // what is read past the last block counts nothing
            for (int64_t row = begin; row < end; ++row)
                for (size_t token = 0; token < inputs.size(); ++token) {
                    const float* own = sums.data() + token * num_groups;
                    const float product = m.bits == 8 ? dot_numbers<8>(m, row, numbers[token], own, factors.data())
                                                      : dot_numbers<4>(m, row, numbers[token], own, factors.data());
                    take(token, row, product + (m.bias ? m.bias[row] : 0));
                }
            return;
        }
#endif
        for (int64_t row = begin; row < end; ++row)
            for (size_t token = 0; token < inputs.size(); ++token)
                take(token, row, dot(m, row, inputs[token], sums.data() + token * num_groups));
    }

    Pool& pool;
    const int index;
    std::vector<float> sums, scores;
#if HAS_BYTE_PRODUCTS
    std::vector<Numbers> numbers;
    std::vector<float> factors;
#endif
};

void normalise(const float* x, const float* weight, int64_t dim, float epsilon, Vector& out) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += static_cast<double>(x[i]) * x[i];
    const float factor = 1 / std::sqrt(static_cast<float>(squares / dim) + epsilon);
    for (int64_t i = 0; i < dim; ++i) out.put(i, x[i] * factor * weight[i]);
}

// Turn the pairs (x[i], x[i + E / 2]) by the angle of a position (arXiv 2104.09864).
void rotate(float* x, const float* frequencies, int64_t head_dim, int64_t position) {
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        const float angle = static_cast<float>(position) * frequencies[i];
        const float cosine = std::cos(angle), sine = std::sin(angle);
        const float left = x[i], right = x[i + head_dim / 2];
        x[i] = left * cosine - right * sine;
        x[i + head_dim / 2] = right * cosine + left * sine;
    }
}

struct State {  // of one call, shared by the threads
    State(const Model& m, int64_t num_tokens)
        : queries(num_tokens * m.num_heads * m.head_dim),
          keys(num_tokens * m.num_kv_heads * m.head_dim),
          values(keys.size()),
          mixed(num_tokens, Vector(m.num_heads * m.head_dim)),
          inner(num_tokens, Vector(m.mlp_dim)) {}

    std::vector<float> queries, keys, values;
    std::vector<Vector> mixed, inner;
};

// One query head of one token: softmax(q . k / sqrt(E)) . v over the positions up to its own (arXiv 1706.03762).
void attend(const Model& m, const Cache& cache, int64_t block, const float* query, int64_t last, Vector& out,
            int64_t offset, std::vector<float>& scores) {
    const int64_t size = m.head_dim;
    scores.resize(last + 1);
    float highest = -INFINITY, total = 0;
    std::vector<float> sums(size, 0.0f);
    for (int64_t position = 0; position <= last; ++position) {
        const int64_t at = (block * cache.capacity + position) * size;
        float score = 0;
        if (m.cache_bits == 32) {
            score = dot_float(static_cast<const float*>(cache.keys) + at, query, size);
        } else {
            const uint16_t* key = static_cast<const uint16_t*>(cache.keys) + at;
            float lanes[LANES] = {};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES)
                for (int lane = 0; lane < LANES; ++lane)
                    lanes[lane] += from_bits(static_cast<uint32_t>(key[i + lane]) << 16) * query[i + lane];
            score = sum(lanes);
            for (; i < size; ++i) score += load(key, i, 16) * query[i];
        }
        scores[position] = score / std::sqrt(static_cast<float>(size));
        highest = std::fmax(highest, scores[position]);
    }
    for (int64_t position = 0; position <= last; ++position) {
        const float weight = std::exp(scores[position] - highest);
        const int64_t at = (block * cache.capacity + position) * size;
        total += weight;
        if (m.cache_bits == 32) {
            const float* value = static_cast<const float*>(cache.values) + at;
            for (int64_t i = 0; i < size; ++i) sums[i] += weight * value[i];
        } else {
            const uint16_t* value = static_cast<const uint16_t*>(cache.values) + at;
            for (int64_t i = 0; i < size; ++i) sums[i] += weight * from_bits(static_cast<uint32_t>(value[i]) << 16);
        }
    }
    for (int64_t i = 0; i < size; ++i) out.put(offset + i, sums[i] / total);
}

void read_layer(const Model& m, const Cache& cache, int64_t index, float* hidden, const int64_t* rows,
                const int64_t* positions, int64_t num_tokens, State& state, Worker& worker,
                std::vector<Vector>& normed) {
    const Layer& layer = m.layers[index];
    Pool& pool = worker.pool;
    const int64_t width = m.num_heads * m.head_dim, kv_width = m.num_kv_heads * m.head_dim;
    for (int64_t t = 0; t < num_tokens; ++t)
        normalise(hidden + t * m.dim, layer.input_norm, m.dim, m.epsilon, normed[t]);
    worker.multiply(layer.query, normed, [&](int64_t t, int64_t n, float y) { state.queries[t * width + n] = y; });
    worker.multiply(layer.key, normed, [&](int64_t t, int64_t n, float y) { state.keys[t * kv_width + n] = y; });
    worker.multiply(layer.value, normed, [&](int64_t t, int64_t n, float y) { state.values[t * kv_width + n] = y; });
    pool.barrier();
    for (int64_t i = worker.index; i < num_tokens * m.num_kv_heads; i += pool.size) {
        const int64_t t = i / m.num_kv_heads, head = i % m.num_kv_heads;
        float* key = state.keys.data() + i * m.head_dim;
        rotate(key, m.frequencies, m.head_dim, positions[t]);
        const int64_t block = (index * cache.num_rows + rows[t]) * m.num_kv_heads + head;
        const int64_t at = (block * cache.capacity + positions[t]) * m.head_dim;
        for (int64_t e = 0; e < m.head_dim; ++e) {
            store(cache.keys, at + e, m.cache_bits, key[e]);
            store(cache.values, at + e, m.cache_bits, state.values[i * m.head_dim + e]);
        }
    }
    for (int64_t i = worker.index; i < num_tokens * m.num_heads; i += pool.size)
        rotate(state.queries.data() + i * m.head_dim, m.frequencies, m.head_dim, positions[i / m.num_heads]);
    pool.barrier();
    const int64_t group = m.num_heads / m.num_kv_heads;
    for (int64_t i = worker.index; i < num_tokens * m.num_heads; i += pool.size) {
        const int64_t t = i / m.num_heads, head = i % m.num_heads;
        const int64_t block = (index * cache.num_rows + rows[t]) * m.num_kv_heads + head / group;
        attend(m, cache, block, state.queries.data() + i * m.head_dim, positions[t], state.mixed[t],
               head * m.head_dim, worker.scores);
    }
    pool.barrier();
    worker.multiply(layer.output, state.mixed, [&](int64_t t, int64_t n, float y) { hidden[t * m.dim + n] += y; });
    pool.barrier();
    for (int64_t t = 0; t < num_tokens; ++t)
        normalise(hidden + t * m.dim, layer.output_norm, m.dim, m.epsilon, normed[t]);
    worker.multiply(layer.gate, normed, [&](int64_t t, int64_t n, float y) { state.inner[t].plain[n] = y; });
    worker.multiply(layer.up, normed, [&](int64_t t, int64_t n, float y) {  // the same rows, so the same thread
        const float gate = state.inner[t].plain[n];
        state.inner[t].put(n, gate / (1 + std::exp(-gate)) * y);
    });
    pool.barrier();
    worker.multiply(layer.down, state.inner, [&](int64_t t, int64_t n, float y) { hidden[t * m.dim + n] += y; });
    pool.barrier();
}

}  // namespace

extern "C" {

void* fastvlm_pool(int num_threads) { return new Pool(num_threads < 1 ? 1 : num_threads); }

void fastvlm_free(void* pool) { delete static_cast<Pool*>(pool); }

// Read T tokens: `hidden` (T, D) comes in as embeddings and goes out as normed hidden states. Token t belongs to
// `rows[t]` of the cache and stands at `positions[t]`; keys and values are written there.
void fastvlm_read(void* pool, const Model* model, const Cache* cache, float* hidden, const int64_t* rows,
                  const int64_t* positions, int64_t num_tokens) {
    Pool& threads = *static_cast<Pool*>(pool);
    State state(*model, num_tokens);
    threads.run([&](int index) {
        Worker worker(threads, index);
        std::vector<Vector> normed(num_tokens, Vector(model->dim));
        for (int64_t layer = 0; layer < model->num_layers; ++layer)
            read_layer(*model, *cache, layer, hidden, rows, positions, num_tokens, state, worker, normed);
        for (int64_t t = index; t < num_tokens; t += threads.size) {
            normalise(hidden + t * model->dim, model->final_norm, model->dim, model->epsilon, normed[t]);
            std::memcpy(hidden + t * model->dim, normed[t].plain.data(), model->dim * sizeof(float));
        }
    });
}

// `x` (T, K) times the transposed matrix, to `y` (T, N).
void fastvlm_multiply(void* pool, const Matrix* matrix, const float* x, int64_t num_tokens, float* y) {
    Pool& threads = *static_cast<Pool*>(pool);
    std::vector<Vector> inputs(num_tokens, Vector(matrix->columns));
    for (int64_t t = 0; t < num_tokens; ++t)
        for (int64_t i = 0; i < matrix->columns; ++i) inputs[t].put(i, x[t * matrix->columns + i]);
    threads.run([&](int index) {
        Worker worker(threads, index);
        worker.multiply(*matrix, inputs, [&](int64_t t, int64_t n, float sum) { y[t * matrix->rows + n] = sum; });
    });
}

// Rows of an 8- or 4-bit matrix, from `begin` up to `end`, as bfloat16 or float32 (`bits`) in `out` (end - begin, K).
void fastvlm_floats(void* pool, const Matrix* matrix, int64_t begin, int64_t end, void* out, int32_t bits) {
    Pool& threads = *static_cast<Pool*>(pool);
    const Matrix& m = *matrix;
    threads.run([&](int index) {
        const int64_t count = end - begin;
        for (int64_t n = count * index / threads.size; n < count * (index + 1) / threads.size; ++n) {
            const int64_t at = n * m.columns;
            if (bits == 32) {
                unpack(m, begin + n, static_cast<float*>(out) + at);
            } else {
                unpack(m, begin + n, static_cast<uint16_t*>(out) + at);
            }
        }
    });
}

}  // extern "C"
