// Qwen2 for a few tokens at once: what decoding does, in one call a step.
//
// With few tokens the time goes into reading the weights, so every matrix is read once, in the format in which it is
// stored, by all threads in turn; everything between matrices stays in caches. Sums are float32. Loops over LANES are
// written so that the compiler turns them into the widest vectors of the machine: no intrinsics.
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

inline void store(void* base, int64_t index, int bits, float value) {
    if (bits == 32) {
        static_cast<float*>(base)[index] = value;
        return;
    }
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof raw);
    raw += 0x7fff + ((raw >> 16) & 1);  // to the nearest, ties to even
    static_cast<uint16_t*>(base)[index] = static_cast<uint16_t>(raw >> 16);
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
        for (int64_t row = begin; row < end; ++row)
            for (size_t token = 0; token < inputs.size(); ++token)
                take(token, row, dot(m, row, inputs[token], sums.data() + token * num_groups));
    }

    Pool& pool;
    const int index;
    std::vector<float> sums, scores;
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
    const int64_t num_groups = m.columns / m.group;
    threads.run([&](int index) {
        std::vector<float> line(m.columns);
        const int64_t count = end - begin;
        for (int64_t n = count * index / threads.size; n < count * (index + 1) / threads.size; ++n) {
            const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + (begin + n) * m.columns * m.bits / 8;
            if (m.bits == 8) {
                for (int64_t i = 0; i < m.columns; ++i) line[i] = weight[i];
            } else {
                for (int64_t i = 0; i < m.columns / 2; ++i) {
                    line[2 * i] = weight[i] & 15;
                    line[2 * i + 1] = weight[i] >> 4;
                }
            }
            for (int64_t group = 0; group < num_groups; ++group) {
                const float scale = load(m.scales, (begin + n) * num_groups + group, m.scale_bits);
                const float bias = load(m.biases, (begin + n) * num_groups + group, m.scale_bits);
                for (int64_t i = group * m.group; i < (group + 1) * m.group; ++i) line[i] = line[i] * scale + bias;
            }
            if (bits == 32) {
                std::memcpy(static_cast<float*>(out) + n * m.columns, line.data(), m.columns * sizeof(float));
            } else {
                uint16_t* halves = static_cast<uint16_t*>(out) + n * m.columns;
                for (int64_t i = 0; i < m.columns; ++i) store(halves, i, 16, line[i]);
            }
        }
    });
}

}  // extern "C"
