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

constexpr int64_t PANEL = 64;  // rows of bfloat16

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
        if (m.is_tiled) return multiply_tiled(m, inputs, take);
        const int64_t begin = m.rows * index / pool.size, end = m.rows * (index + 1) / pool.size;
        if (m.bits == 16) {
            // Some rows at a time, which stay in the cache for all tokens, in blocks of a few rows and a few tokens.
            const uint16_t* weight = static_cast<const uint16_t*>(m.weight);
            const int64_t num_tokens = inputs.size();
            for (int64_t first = begin, last; first < end; first = last) {
                last = std::min(first + PANEL, end);
                for (int64_t token = 0; token < num_tokens; token += TOKENS)
                    for (int64_t row = first, next; row < last; row = next) {
                        next = row + ROWS <= last ? row + ROWS : row + 1;
                        const int64_t count = std::min<int64_t>(num_tokens - token, TOKENS);
                        (next - row == ROWS ? dot_bfloat16<ROWS> : dot_bfloat16<1>)(
                            weight + row * m.columns, m.columns, inputs.data() + token, count, block);
                        for (int64_t n = row; n < next; ++n)
                            for (int64_t t = 0; t < count; ++t)
                                take(token + t, n, block[n - row][t] + (m.bias ? m.bias[n] : 0));
                    }
            }
            return;
        }
#if HAS_BYTE_PRODUCTS
        if (m.bits < 16 && (has_whole_rows(m) || has_even_groups(m))) {
            numbers.resize(inputs.size());
            const bool is_whole = has_whole_rows(m);
            for (size_t token = 0; token < inputs.size(); ++token)
                numbers[token].read(inputs[token], m.columns, m.bits, is_whole ? ROW_BLOCK : BLOCK);
            for (int64_t row = begin; row < end; ++row)
                for (size_t token = 0; token < inputs.size(); ++token) {
                    const float product = is_whole      ? dot_row(m, row, numbers[token], sums[token])
                                          : m.bits == 8 ? dot_numbers<8>(m, row, numbers[token])
                                                        : dot_numbers<4>(m, row, numbers[token]);
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

private:
    template <typename Take>
    void multiply_tiled(const Matrix& m, const std::vector<Vector>& inputs, const Take& take) {
        const int64_t tiles = m.rows / SIDE_OF_TILES, num_tokens = inputs.size();
        float products[TOKENS][SIDE_OF_TILES];
        for (int64_t tile = tiles * index / pool.size; tile < tiles * (index + 1) / pool.size; ++tile)
            for (int64_t token = 0; token < num_tokens; token += TOKENS) {
                const int64_t first = tile * SIDE_OF_TILES, count = std::min<int64_t>(num_tokens - token, TOKENS);
                dot_tiles(static_cast<const uint16_t*>(m.weight) + first * m.columns, m.columns, inputs.data() + token,
                          count, products);
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t n = 0; n < SIDE_OF_TILES; ++n)
                        take(token + t, first + n, products[t][n] + (m.bias ? m.bias[first + n] : 0));
            }
    }

    float block[ROWS][TOKENS];
#if HAS_BYTE_PRODUCTS
    std::vector<Numbers> numbers;
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
                (m.bits == 8 ? unpack<8> : unpack<4>)(m, begin + n, static_cast<uint16_t*>(out) + at);
            }
        }
    });
}

}  // extern "C"
