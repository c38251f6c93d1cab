// Qwen2 for a few tokens at once: what decoding does, in one call a step.
//
// With few tokens the time goes into reading the weights, so every matrix is read once, in the format in which it is
// stored, by all threads in turn; everything between matrices stays in caches. Sums are float32.
//
// Letters: T tokens, D width, A query heads, G key/value heads, E width of a head, K inputs and N outputs of a matrix.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "matrix.h"
#if defined(__AVX512DQ__)
#include "exponential.h"
#include "lanes.h"
#endif

namespace {

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

// What one thread does of a call.
class Worker {
public:
    Worker(Pool& pool, int index) : pool(pool), index(index) {}

    // For some rows of the matrix at a time, those that are this thread's, and each token:
    // take(token, first row, products, number of rows), at most STRIP of them from an even one on.
    template <typename Take>
    void multiply(const Matrix& m, const std::vector<Vector>& inputs, const Take& take) {
        prepare(m, inputs);
        products.resize(inputs.size() * STREAMS * STRIP);
        const int64_t num_strips = (m.rows + STRIP - 1) / STRIP;
        const int64_t begin = num_strips * index / pool.size, end = num_strips * (index + 1) / pool.size;
        // with more tokens than a row meets at once, few rows are taken together, so that they stay in the cache
        const bool is_far = static_cast<int64_t>(inputs.size()) <= (m.is_tiled ? TOKENS / 2 : TOKENS);
        const int64_t num_whole = std::max<int64_t>(std::min(end, m.rows / STRIP) - begin, 0);
        const int64_t length = is_far ? num_whole / STREAMS : 0;  // of a stream
        for (int64_t strip = begin; strip < begin + length; ++strip) {
            dot_strips<STREAMS>(m, strip * STRIP, length * STRIP, STRIP, inputs);
            for (int64_t stream = 0; stream < STREAMS; ++stream)
                give(m, (strip + stream * length) * STRIP, STRIP, stream, inputs.size(), take);
        }
        for (int64_t strip = begin + STREAMS * length; strip < end; ++strip) {
            const int64_t num_rows = std::min(STRIP, m.rows - strip * STRIP);
            dot_strips<1>(m, strip * STRIP, 0, num_rows, inputs);
            give(m, strip * STRIP, num_rows, 0, inputs.size(), take);
        }
    }

    Pool& pool;
    const int index;
    std::vector<float> scores;

private:
    void prepare(const Matrix& m, const std::vector<Vector>& inputs) {
        if (m.bits >= 16) return;
#if HAS_BYTE_PRODUCTS
        if (has_whole_rows(m) || has_even_groups(m)) {
            numbers.resize(inputs.size());
            for (size_t token = 0; token < inputs.size(); ++token)
                numbers[token].read(inputs[token], m.columns, m.bits, has_whole_rows(m) ? ROW_BLOCK : BLOCK);
            return;
        }
#endif
        num_groups = m.columns / m.group;
        sums.resize(inputs.size() * num_groups);
        for (size_t token = 0; token < inputs.size(); ++token)
            for (int64_t group = 0; group < num_groups; ++group) {
                float total = 0;
                for (int64_t i = group * m.group; i < (group + 1) * m.group; ++i) total += inputs[token].plain[i];
                sums[token * num_groups + group] = total;
            }
    }

    // Products of N strips of `num_rows` rows, `stride` rows apart, and each token, to `products`.
    template <int N>
    void dot_strips(const Matrix& m, int64_t first, int64_t stride, int64_t num_rows,
                    const std::vector<Vector>& inputs) {
        const int64_t num_tokens = inputs.size();
        for (int64_t token = 0; token < num_tokens; token += TOKENS) {
            const int64_t count = std::min(TOKENS, num_tokens - token);
            if (m.is_tiled) {
                dot_tiled<N>(m, first, stride, inputs, token, count);
                continue;
            }
            int64_t n = 0;
            if constexpr (N == 1) {  // neighbours
                for (; n + STREAMS <= num_rows; n += STREAMS)
                    dot_rows<STREAMS>(m, first + n, 1, inputs, token, count, n, 1);
            }
            for (; n < num_rows; ++n) dot_rows<N>(m, first + n, stride, inputs, token, count, n, STRIP);
        }
    }

    template <int N>
    void dot_tiled(const Matrix& m, int64_t first, int64_t stride, const std::vector<Vector>& inputs, int64_t token,
                   int64_t count) {
        float sums[TOKENS][N][STRIP];
        const Vector* x = inputs.data() + token;
        switch (count) {
            case 1: dot_tiles<N, 1>(m, first, stride, x, sums); break;
            case 2: dot_tiles<N, 2>(m, first, stride, x, sums); break;
            default:
                if constexpr (N == 1) (count == 3 ? dot_tiles<1, 3> : dot_tiles<1, TOKENS>)(m, first, stride, x, sums);
        }
        for (int64_t t = 0; t < count; ++t)
            std::copy_n(sums[t][0], N * STRIP, products.data() + (token + t) * STREAMS * STRIP);
    }

    // Products of N rows, `stride` apart, and `count` tokens, whose places are from `at` on, `step` apart.
    template <int N>
    void dot_rows(const Matrix& m, int64_t first, int64_t stride, const std::vector<Vector>& inputs, int64_t token,
                  int64_t count, int64_t at, int64_t step) {
        float sums[TOKENS][N];
        if (m.bits == 16) {
            dot_bfloat16<N>(m, first, stride, inputs.data() + token, count, sums);
        } else {
            for (int64_t t = 0; t < count; ++t) dot<N>(m, first, stride, inputs[token + t], token + t, sums[t]);
        }
        for (int64_t t = 0; t < count; ++t)
            for (int n = 0; n < N; ++n) products[(token + t) * STREAMS * STRIP + at + n * step] = sums[t][n];
    }

    template <int N>
    void dot(const Matrix& m, int64_t first, int64_t stride, const Vector& x, int64_t token, float* out) {
#if HAS_BYTE_PRODUCTS
        if (m.bits < 16 && has_whole_rows(m)) return dot_row<N>(m, first, stride, numbers[token], out);
        if (m.bits < 16 && has_even_groups(m))
            return (m.bits == 8 ? dot_numbers<8, N> : dot_numbers<4, N>)(m, first, stride, numbers[token], out);
#endif
        const float* of_groups = sums.data() + token * num_groups;
        for (int n = 0; n < N; ++n) out[n] = dot_one(m, first + n * stride, x, of_groups);
    }

    // Hand on what `dot_strips` found of a strip.
    template <typename Take>
    void give(const Matrix& m, int64_t first, int64_t num_rows, int64_t stream, int64_t num_tokens, const Take& take) {
        for (int64_t token = 0; token < num_tokens; ++token) {
            float* y = products.data() + (token * STREAMS + stream) * STRIP;
            if (m.bias)
                for (int64_t n = 0; n < num_rows; ++n) y[n] += m.bias[first + n];
            take(token, first, y, num_rows);
        }
    }

    std::vector<float> products;  // (tokens, STREAMS, STRIP)
    std::vector<float> sums;      // of each group of inputs, for weights that have a bias for it
    int64_t num_groups = 0;
#if HAS_BYTE_PRODUCTS
    std::vector<Numbers> numbers;
#endif
};

void normalise(const float* x, const float* weight, int64_t dim, float epsilon, Vector& out) {
    const float factor = 1 / std::sqrt(dot_float(x, x, dim) / static_cast<float>(dim) + epsilon);
    for (int64_t i = 0; i < dim; ++i) out.plain[i] = x[i] * factor * weight[i];
    out.split(0, dim);
}

// gate = SiLU(gate) * up (arXiv 2002.05202).
void apply_gate(float* gate, const float* up, int64_t count) {
#if defined(__AVX512DQ__)
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 opened = silu(_mm512_maskz_loadu_ps(mask, gate + i));
        _mm512_mask_storeu_ps(gate + i, mask, _mm512_mul_ps(opened, _mm512_maskz_loadu_ps(mask, up + i)));
    }
#else
    for (int64_t i = 0; i < count; ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
#endif
}

// x = exp(x - highest); their sum.
float exponentiate(float* x, int64_t count, float highest) {
    float total = 0;
#if defined(__AVX512DQ__)
    __m512 totals = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(highest));
        const __m512 power = power_of_two(_mm512_mul_ps(below, _mm512_set1_ps(1.44269504f)));
        _mm512_mask_storeu_ps(x + i, mask, power);
        totals = _mm512_mask_add_ps(totals, mask, totals, power);
    }
    total = _mm512_reduce_add_ps(totals);
#else
    for (int64_t i = 0; i < count; ++i) total += x[i] = std::exp(x[i] - highest);
#endif
    return total;
}

struct State {  // of one call, shared by the threads
    State(const Model& m, const int64_t* positions, int64_t num_tokens)
        : queries(num_tokens * m.num_heads * m.head_dim),
          keys(num_tokens * m.num_kv_heads * m.head_dim),
          values(keys.size()),
          cosines(num_tokens * m.head_dim / 2),
          sines(cosines.size()),
          mixed(num_tokens, Vector(m.num_heads * m.head_dim)),
          inner(num_tokens, Vector(m.mlp_dim)) {
        const int64_t half = m.head_dim / 2;
        for (int64_t i = 0; i < num_tokens * half; ++i) {
            const float angle = static_cast<float>(positions[i / half]) * m.frequencies[i % half];
            cosines[i] = std::cos(angle);
            sines[i] = std::sin(angle);
        }
    }

    std::vector<float> queries, keys, values, cosines, sines;
    std::vector<Vector> mixed, inner;
};

// Turn the pairs (x[i], x[i + E / 2]) by the angles of a token's position (arXiv 2104.09864).
void rotate(float* x, const State& state, int64_t head_dim, int64_t token) {
    const int64_t half = head_dim / 2;
    const float *cosines = state.cosines.data() + token * half, *sines = state.sines.data() + token * half;
    for (int64_t i = 0; i < half; ++i) {
        const float left = x[i], right = x[i + half];
        x[i] = left * cosines[i] - right * sines[i];
        x[i + half] = right * cosines[i] + left * sines[i];
    }
}

// How a head lies in vectors: `N` of them, known to the compiler, or as many as it takes (0). Of bfloat16 in N vectors
// the even members of 32 come first, then the odd ones, as pairs are taken apart.
template <int N, int BITS>
struct Head {
    static constexpr int ROOM = N ? N : 64;

    explicit Head(int64_t size) : size(size), num_vectors(N ? N : (size + LANES - 1) / LANES) {}

    // A key or value that begins at `at`.
    void read(const void* base, int64_t at, Floats* out) const {
        if constexpr (N && BITS == 16) {
            const uint16_t* from = static_cast<const uint16_t*>(base) + at;
#pragma GCC unroll 8
            for (int n = 0; n < N; n += 2) {
                const Pairs pairs = *reinterpret_cast<const Pairs*>(from + n * LANES);
                out[n] = reinterpret_cast<Floats>(pairs << 16);
                out[n + 1] = reinterpret_cast<Floats>(pairs & 0xffff0000u);
            }
        } else if constexpr (N) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                out[n] = *reinterpret_cast<const Floats*>(static_cast<const float*>(base) + at + n * LANES);
        } else {
            for (int64_t i = 0; i < num_vectors * LANES; ++i)
                out[i / LANES][i % LANES] = i < size ? load(base, at + i, BITS) : 0;
        }
    }

    int64_t place(int64_t i) const {  // of a member
        return N && BITS == 16 ? i / (2 * LANES) * 2 * LANES + i % 2 * LANES + i / 2 % LANES : i;
    }

    const int64_t size, num_vectors;
};

// Query heads of one token that share keys: softmax(q . k / sqrt(E)) . v over the positions up to its own
// (arXiv 1706.03762).
template <int N, int BITS>
void attend(const Model& m, const Cache& cache, int64_t block, const float* queries, int64_t num_heads, int64_t last,
            float* out, std::vector<float>& scratch) {
    const Head<N, BITS> shape(m.head_dim);
    const int64_t num_positions = last + 1, num_vectors = N ? N : shape.num_vectors;
    const float scale = 1 / std::sqrt(static_cast<float>(shape.size));
    scratch.assign(num_heads * (num_vectors * LANES + num_positions), 0);
    float *placed = scratch.data(), *scores = placed + num_heads * num_vectors * LANES;
    for (int64_t head = 0; head < num_heads; ++head)
        for (int64_t i = 0; i < shape.size; ++i)
            placed[head * num_vectors * LANES + shape.place(i)] = queries[head * shape.size + i] * scale;
    for (int64_t position = 0; position < num_positions; ++position) {
        Floats key[Head<N, BITS>::ROOM];
        shape.read(cache.keys, (block * cache.capacity + position) * shape.size, key);
        for (int64_t head = 0; head < num_heads; ++head) {
            const Floats* query = reinterpret_cast<const Floats*>(placed + head * num_vectors * LANES);
            Floats total = {};
#pragma GCC unroll 8
            for (int64_t n = 0; n < num_vectors; ++n) total += key[n] * query[n];
            float score = 0;
            for (int lane = 0; lane < LANES; ++lane) score += total[lane];
            scores[head * num_positions + position] = score;
        }
    }
    for (int64_t head = 0; head < num_heads; ++head) {
        float *weights = scores + head * num_positions, highest = -INFINITY;
        for (int64_t i = 0; i < num_positions; ++i) highest = std::fmax(highest, weights[i]);
        const float total = exponentiate(weights, num_positions, highest);
        Floats sums[Head<N, BITS>::ROOM] = {}, value[Head<N, BITS>::ROOM];
        for (int64_t position = 0; position < num_positions; ++position) {
            shape.read(cache.values, (block * cache.capacity + position) * shape.size, value);
#pragma GCC unroll 8
            for (int64_t n = 0; n < num_vectors; ++n) sums[n] += weights[position] * value[n];
        }
        for (int64_t i = 0; i < shape.size; ++i)
            out[head * shape.size + i] = sums[shape.place(i) / LANES][shape.place(i) % LANES] / total;
    }
}

using Attend = void (*)(const Model&, const Cache&, int64_t, const float*, int64_t, int64_t, float*,
                        std::vector<float>&);

Attend attend_for(const Model& m) {
    const bool is_half = m.cache_bits == 16;
    switch (m.head_dim) {
        case 32: return is_half ? attend<2, 16> : attend<2, 32>;
        case 64: return is_half ? attend<4, 16> : attend<4, 32>;
        case 128: return is_half ? attend<8, 16> : attend<8, 32>;
        default: return is_half ? attend<0, 16> : attend<0, 32>;
    }
}

void read_layer(const Model& m, const Cache& cache, int64_t index, float* hidden, const int64_t* rows,
                const int64_t* positions, int64_t num_tokens, State& state, Worker& worker,
                std::vector<Vector>& normed) {
    const Layer& layer = m.layers[index];
    Pool& pool = worker.pool;
    const int64_t width = m.num_heads * m.head_dim, kv_width = m.num_kv_heads * m.head_dim;
    const auto to = [&](std::vector<float>& out, int64_t stride) {
        return [&out, stride](int64_t t, int64_t first, const float* y, int64_t count) {
            std::copy_n(y, count, out.data() + t * stride + first);
        };
    };
    const auto add = [&](int64_t t, int64_t first, const float* y, int64_t count) {
        for (int64_t n = 0; n < count; ++n) hidden[t * m.dim + first + n] += y[n];
    };
    for (int64_t t = 0; t < num_tokens; ++t)
        normalise(hidden + t * m.dim, layer.input_norm, m.dim, m.epsilon, normed[t]);
    worker.multiply(layer.query, normed, to(state.queries, width));
    worker.multiply(layer.key, normed, to(state.keys, kv_width));
    worker.multiply(layer.value, normed, to(state.values, kv_width));
    pool.barrier();
    for (int64_t i = worker.index; i < num_tokens * m.num_kv_heads; i += pool.size) {
        const int64_t t = i / m.num_kv_heads, head = i % m.num_kv_heads;
        float* key = state.keys.data() + i * m.head_dim;
        rotate(key, state, m.head_dim, t);
        const int64_t block = (index * cache.num_rows + rows[t]) * m.num_kv_heads + head;
        const int64_t at = (block * cache.capacity + positions[t]) * m.head_dim;
        for (int64_t e = 0; e < m.head_dim; ++e) {
            store(cache.keys, at + e, m.cache_bits, key[e]);
            store(cache.values, at + e, m.cache_bits, state.values[i * m.head_dim + e]);
        }
    }
    pool.barrier();
    const Attend attend = attend_for(m);
    const int64_t group = m.num_heads / m.num_kv_heads, num_blocks = num_tokens * m.num_kv_heads;
    const int64_t parts = std::min<int64_t>(group, (pool.size + num_blocks - 1) / num_blocks);  // of a group's heads
    for (int64_t i = worker.index; i < num_blocks * parts; i += pool.size) {
        const int64_t t = i / parts / m.num_kv_heads, kv_head = i / parts % m.num_kv_heads;
        const int64_t begin = group * (i % parts) / parts, count = group * (i % parts + 1) / parts - begin;
        const int64_t at = (kv_head * group + begin) * m.head_dim;
        float* queries = state.queries.data() + t * width + at;
        for (int64_t head = 0; head < count; ++head) rotate(queries + head * m.head_dim, state, m.head_dim, t);
        const int64_t block = (index * cache.num_rows + rows[t]) * m.num_kv_heads + kv_head;
        attend(m, cache, block, queries, count, positions[t], state.mixed[t].plain.data() + at, worker.scores);
        state.mixed[t].split(at, count * m.head_dim);
    }
    pool.barrier();
    worker.multiply(layer.output, state.mixed, add);
    pool.barrier();
    for (int64_t t = 0; t < num_tokens; ++t)
        normalise(hidden + t * m.dim, layer.output_norm, m.dim, m.epsilon, normed[t]);
    worker.multiply(layer.gate, normed, [&](int64_t t, int64_t first, const float* y, int64_t count) {
        std::copy_n(y, count, state.inner[t].plain.data() + first);
    });
    worker.multiply(layer.up, normed, [&](int64_t t, int64_t first, const float* y, int64_t count) {
        apply_gate(state.inner[t].plain.data() + first, y, count);  // of the same rows, so of the same thread
        state.inner[t].split(first, count);
    });
    pool.barrier();
    worker.multiply(layer.down, state.inner, add);
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
    State state(*model, positions, num_tokens);
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
    for (int64_t t = 0; t < num_tokens; ++t) {
        std::copy_n(x + t * matrix->columns, matrix->columns, inputs[t].plain.data());
        inputs[t].split(0, matrix->columns);
    }
    threads.run([&](int index) {
        Worker worker(threads, index);
        worker.multiply(*matrix, inputs, [&](int64_t t, int64_t first, const float* products, int64_t count) {
            std::copy_n(products, count, y + t * matrix->rows + first);
        });
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
                (m.bits == 8 ? unpack<8> : unpack<4>)(m, begin + n, static_cast<uint16_t*>(out) + at);
            }
        }
    });
}

}  // extern "C"
