// A matrix times many vectors in tiles of AMX: what reading a prompt in bfloat16 spends its time on.
//
// The vectors are the left factor, as they come, and the matrix is the right one: of bfloat16 it lies in tiles already,
// numbers of 8 and 4 bits become such tiles some inputs at a time, in the cache.
//
// Letters: T tokens, K inputs and N outputs of a matrix.

#include "matrix.h"
#include "tiles.h"

#if HAS_TILES
#include "exponential.h"

namespace {

constexpr int64_t MOST_TOKENS = 512;  // at once
constexpr int64_t GROUP = 8;          // blocks of outputs for which a chunk of the vectors stays in the second cache
constexpr int64_t CHUNK = 1536;       // inputs of it

// How inputs are divided, not more than CHUNK at a time.
inline int64_t chunk_of(int64_t inputs) {
    const int64_t chunks = (inputs + CHUNK - 1) / CHUNK;
    return (inputs / DEPTH + chunks - 1) / chunks * DEPTH;
}

// Outputs of a matrix of 8 or 4 bits as tiles, SIDE outputs from `row` on and `inputs` inputs from `begin` on.
class Unpacked {
public:
    static void write(const Matrix& m, int64_t row, int64_t begin, int64_t inputs, uint16_t* to) {
        const int64_t groups = m.columns / m.group;
        __m512i tables[SIDE];  // of 4 bits: what each number stands for
        for (int64_t i = begin; i < begin + inputs; i += DEPTH) {
            const int64_t own = i / m.group;
            const bool is_new = i == begin || i % m.group == 0;
            __m512i rows[SIDE];
            for (int64_t n = 0; n < SIDE; ++n) {
                const int64_t group = (row + n) * groups + own;
                const uint8_t* bytes = static_cast<const uint8_t*>(m.weight) + ((row + n) * m.columns + i) * m.bits / 8;
                fetch_ahead(bytes);
                if (m.bits == 8) {
                    const __m512 scale = _mm512_set1_ps(load(m.scales, group, m.scale_bits));
                    const __m512 bias = _mm512_set1_ps(load(m.biases, group, m.scale_bits));
                    rows[n] = halves_of(_mm512_fmadd_ps(numbers(bytes), scale, bias),
                                        _mm512_fmadd_ps(numbers(bytes + LANES), scale, bias));
                    continue;
                }
                if (is_new) tables[n] = table(m, group);
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
                const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
                rows[n] = _mm512_permutexvar_epi16(_mm512_and_si512(apart, _mm512_set1_epi32(0x000f000f)), tables[n]);
            }
            transpose(rows);
            for (int64_t pair = 0; pair < SIDE; ++pair)
                _mm512_storeu_si512(to + (i - begin) * SIDE + pair * DEPTH, rows[pair]);
        }
    }

private:
    static __m512 numbers(const uint8_t* bytes) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    }

    static __m512i table(const Matrix& m, int64_t group) {
        const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 values = _mm512_fmadd_ps(all, _mm512_set1_ps(load(m.scales, group, m.scale_bits)),
                                              _mm512_set1_ps(load(m.biases, group, m.scale_bits)));
        return halves_of(values, values);
    }
};

// Products, what one thread needs. With a second matrix: silu(first) * second.
class Columns {
public:
    Columns(const Matrix& m, const Matrix* other, const uint16_t* x, int64_t count, uint16_t* y, int64_t blocks)
        : matrices{&m, other},
          num_matrices(other ? 2 : 1),
          x(x),
          y(y),
          count(count),
          row_blocks((count + BLOCK_ROWS - 1) / BLOCK_ROWS),
          sums(Room<Columns, float>::of(blocks * num_matrices * row_blocks * BLOCK_SIZE)),
          rest(Room<Columns, uint16_t>::of(SIDE * m.columns + BLOCK_COLUMNS * CHUNK)),
          tiles(rest + SIDE * m.columns) {
        const int64_t whole = count / SIDE * SIDE, size = m.columns;  // what is missing to a tile is zero
        std::copy(x + whole * size, x + count * size, rest);
        std::fill(rest + (count - whole) * size, rest + SIDE * size, 0);
    }

    // Outputs of some blocks of BLOCK_COLUMNS.
    void multiply(int64_t begin, int64_t end) {
        const int64_t columns = matrices[0]->columns, chunk = chunk_of(columns);
        for (int64_t input = 0; input < columns; input += chunk)
            for (int64_t block = begin; block < end; ++block) {
                for (int64_t which = 0; which < num_matrices; ++which)
                    add(which, block, block - begin, input, std::min(chunk, columns - input));
                if (input + chunk >= columns) finish(block, block - begin);
            }
    }

private:
    float* sums_of(int64_t which, int64_t place, int64_t rows) const {
        return sums + ((place * num_matrices + which) * row_blocks + rows) * BLOCK_SIZE;
    }

    void add(int64_t which, int64_t block, int64_t place, int64_t input, int64_t inputs) {
        const Matrix& m = *matrices[which];
        const int64_t steps = inputs / DEPTH, apart = SIDE * (m.is_tiled ? m.columns : inputs);
        const uint16_t* right = tiles;
        if (m.is_tiled) {
            right = static_cast<const uint16_t*>(m.weight) + block * 2 * apart + input * SIDE;
        } else {
            Unpacked::write(m, block * BLOCK_COLUMNS, input, inputs, tiles);
            Unpacked::write(m, block * BLOCK_COLUMNS + SIDE, input, inputs, tiles + apart);
        }
        for (int64_t rows = 0; rows < row_blocks; ++rows) {
            const int64_t first = rows * BLOCK_ROWS, left = count - first;
            float* to = sums_of(which, place, rows);
            const auto nothing = [](int64_t) {};
            const uint16_t* from = (left < SIDE ? rest : x + first * m.columns) + input;
            if (left >= BLOCK_ROWS) {
                multiply_block<2>(from, m.columns, right, apart, steps, input > 0, to, nothing);
                continue;
            }
            multiply_block<1>(from, m.columns, right, apart, steps, input > 0, to, nothing);
            if (left > SIDE)
                multiply_block<1>(rest + input, m.columns, right, apart, steps, input > 0, to + SIDE * BLOCK_COLUMNS,
                                  nothing);
        }
    }

    void finish(int64_t block, int64_t place) const {
        const int64_t width = matrices[0]->rows, out = block * BLOCK_COLUMNS;
        for (int64_t row = 0; row < count; ++row) {
            __m512 halves[2];
            for (int64_t half = 0; half < 2; ++half) {
                const auto product = [&](int64_t which) {
                    const float* bias = matrices[which]->bias;
                    const float* from = sums_of(which, place, row / BLOCK_ROWS) + row % BLOCK_ROWS * BLOCK_COLUMNS;
                    const __m512 sum = _mm512_load_ps(from + half * LANES);
                    return bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + out + half * LANES)) : sum;
                };
                halves[half] = product(0);
                if (num_matrices == 2) halves[half] = _mm512_mul_ps(silu(halves[half]), product(1));
            }
            store_halves(y + row * width + out, halves[0], halves[1]);
        }
    }

    const Matrix* matrices[2];
    const int64_t num_matrices;
    const uint16_t* x;
    uint16_t* y;
    const int64_t count, row_blocks;
    float* sums;      // (blocks, matrices, row_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    uint16_t* rest;   // the tokens that do not fill a tile
    uint16_t* tiles;  // of a matrix of 8 or 4 bits
};

}  // namespace

// `x` (T, K) times the transposed matrix, to `y` (T, N), both bfloat16; of two matrices, silu(first) * second. K is a
// multiple of 32, and so are N and what shares a scale.
extern "C" void fastvlm_tile_products(Parallel parallel, int32_t num_threads, const Matrix* matrix, const Matrix* other,
                                      const uint16_t* x, int64_t num_tokens, uint16_t* y) {
    const Matrix& m = *matrix;
    const int64_t blocks = m.rows / BLOCK_ROWS, rounds = (blocks + GROUP * num_threads - 1) / (GROUP * num_threads);
    const int64_t size = (blocks + rounds * num_threads - 1) / (rounds * num_threads);
    for (int64_t begin = 0; begin < num_tokens; begin += MOST_TOKENS) {
        const int64_t count = std::min(MOST_TOKENS, num_tokens - begin);
        share(parallel, num_threads, (blocks + size - 1) / size, [&] {
            return [&, shapes = TileShapes(),
                    columns = Columns(m, other, x + begin * m.columns, count, y + begin * m.rows, size)](
                       int64_t part) mutable { columns.multiply(part * size, std::min(part * size + size, blocks)); };
        });
    }
}

#endif
