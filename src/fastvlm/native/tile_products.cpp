// A matrix times many vectors in tiles of AMX: what reading a prompt in bfloat16 spends its time on.
//
// A matrix of bfloat16 lies in tiles, as the right factor; the vectors are the left one, as they come. One of 8 or 4 bits
// stays row by row and is the left factor, some inputs of it at a time as bfloat16 in the cache: where a row has one
// scale, exactly, and the scale follows in float32. Then it is the vectors that are laid out, and sums that are turned.
//
// Letters: T tokens, K inputs and N outputs of a matrix.

#include "matrix.h"
#include "tiles.h"

#if HAS_TILES
#include "exponential.h"

namespace {

constexpr int64_t MOST_TOKENS = 512;  // at once
constexpr int64_t CHUNK = 512;        // inputs whose rows of unpacked weights stay in the first cache
constexpr int64_t GROUP = 8;          // blocks of outputs for which a chunk of the vectors stays in the second one
constexpr int64_t WIDE_CHUNK = 1536;  // inputs of the vectors that stay there

// How inputs are divided, not more than `most` at a time.
inline int64_t evenly(int64_t inputs, int64_t most) {
    const int64_t chunks = (inputs + most - 1) / most;
    return (inputs / DEPTH + chunks - 1) / chunks * DEPTH;
}

// Products with matrices of bfloat16, what one thread needs. With a second matrix: silu(first) * second.
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
          rest(Room<Columns, uint16_t>::of(BLOCK_ROWS * m.columns)) {
        const int64_t whole = count / SIDE * SIDE, size = m.columns;  // what is missing to a tile is zero
        std::copy(x + whole * size, x + count * size, rest);
        std::fill(rest + (count - whole) * size, rest + SIDE * size, 0);
    }

    // Outputs of some blocks of BLOCK_COLUMNS.
    void multiply(int64_t begin, int64_t end) {
        const int64_t columns = matrices[0]->columns, chunk = evenly(columns, WIDE_CHUNK);
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
        const int64_t steps = inputs / DEPTH, apart = m.columns * SIDE;
        const uint16_t* right = static_cast<const uint16_t*>(m.weight) + block * 2 * apart + input / DEPTH * TILE_SIZE;
        for (int64_t rows = 0; rows < row_blocks; ++rows) {
            const int64_t first = rows * BLOCK_ROWS, left = count - first;
            float* to = sums_of(which, place, rows);
            const auto nothing = [](int64_t) {};
            const uint16_t* from = (left < SIDE ? rest : x + first * m.columns) + input;
            if (left >= BLOCK_ROWS) {
                multiply_block<2, 2>(from, m.columns, right, apart, steps, input > 0, to, nothing);
                continue;
            }
            multiply_block<1, 2>(from, m.columns, right, apart, steps, input > 0, to, nothing);
            if (left > SIDE)
                multiply_block<1, 2>(rest + input, m.columns, right, apart, steps, input > 0, to + SIDE * BLOCK_COLUMNS,
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
    float* sums;     // (blocks, matrices, row_blocks, BLOCK_ROWS, BLOCK_COLUMNS)
    uint16_t* rest;  // the tokens that do not fill a tile
};

// Tokens as right factors: tiles of DEPTH inputs and SIDE tokens, those of the same tokens behind each other.
class Tokens {
public:
    Tokens(const uint16_t* x, int64_t count, int64_t size)
        : count(count),
          size(size),
          tiles((count + SIDE - 1) / SIDE),
          sums(tiles * SIDE),
          x(x),
          laid_out(Room<Tokens, uint16_t>::of(tiles * SIDE * size)) {}

    void lay_out(int64_t tile) {
        const int64_t first = tile * SIDE;
        __m512 totals[SIDE];
        for (auto& total : totals) total = _mm512_setzero_ps();
        for (int64_t step = 0; step < size / DEPTH; ++step) {
            __m512i rows[SIDE];
            for (int64_t i = 0; i < SIDE; ++i) {
                rows[i] = _mm512_setzero_si512();
                if (first + i >= count) continue;
                const uint16_t* from = x + (first + i) * size + step * DEPTH;
                rows[i] = _mm512_loadu_si512(from);
                totals[i] = _mm512_add_ps(totals[i], _mm512_add_ps(load_halves(from), load_halves(from + LANES)));
            }
            transpose(rows);
            uint16_t* to = laid_out + first * size + step * TILE_SIZE;
            for (int64_t i = 0; i < SIDE; ++i) _mm512_storeu_si512(to + i * DEPTH, rows[i]);
        }
        for (int64_t i = 0; i < SIDE; ++i) sums[first + i] = _mm512_reduce_add_ps(totals[i]);
    }

    const uint16_t* tile(int64_t index, int64_t input) const {
        return laid_out + index * SIDE * size + input / DEPTH * TILE_SIZE;
    }

    const int64_t count, size, tiles;
    std::vector<float> sums;  // (T): of the members

private:
    const uint16_t* x;
    uint16_t* laid_out;
};

// Products with a matrix of 8 or 4 bits, what one thread needs.
class Rows {
public:
    Rows(const Matrix& m, const Tokens& tokens, uint16_t* y, int64_t blocks)
        : m(m),
          tokens(tokens),
          y(y),
          is_whole(m.bits == 8 && m.group == m.columns),
          pairs((tokens.tiles + 1) / 2),
          sums(Room<Rows, float>::of(blocks * pairs * BLOCK_SIZE)),
          floats(Room<Rows, uint16_t>::of(BLOCK_ROWS * CHUNK)) {}

    // Products of BLOCK_ROWS rows in each of some blocks.
    void multiply(int64_t begin, int64_t end) {
        const int64_t chunk = evenly(m.columns, CHUNK);
        for (int64_t input = 0; input < m.columns; input += chunk)
            for (int64_t block = begin; block < end; ++block) {
                add(block, block - begin, input, std::min(chunk, m.columns - input));
                if (input + chunk >= m.columns) finish(block, block - begin);
            }
    }

private:
    void add(int64_t block, int64_t place, int64_t input, int64_t count) {
        const int64_t steps = count / DEPTH, apart = tokens.size * SIDE;
        for (int64_t i = 0; i < BLOCK_ROWS; ++i) unpack_some(block * BLOCK_ROWS + i, input, count, floats + i * count);
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const uint16_t* right = tokens.tile(2 * pair, input);
            float* to = sums + (place * pairs + pair) * BLOCK_SIZE;
            const auto nothing = [](int64_t) {};
            if (2 * pair + 1 < tokens.tiles) {
                multiply_block<2, 2>(floats, count, right, apart, steps, input > 0, to, nothing);
            } else {
                multiply_block<2, 1>(floats, count, right, apart, steps, input > 0, to, nothing);
            }
        }
    }

    void unpack_some(int64_t row, int64_t begin, int64_t count, uint16_t* out) const {
        const int64_t groups = m.columns / m.group;
        const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + (row * m.columns + begin) * m.bits / 8;
        const auto scale = [&](int64_t i) { return load(m.scales, row * groups + (begin + i) / m.group, m.scale_bits); };
        const auto bias = [&](int64_t i) { return load(m.biases, row * groups + (begin + i) / m.group, m.scale_bits); };
        const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i nibbles = _mm512_set1_epi32(0x000f000f);
        __m512i table = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += DEPTH) {
            if (m.bits == 4) {
                if (i == 0 || (begin + i) % m.group == 0)
                    table = halves_of(_mm512_fmadd_ps(numbers, _mm512_set1_ps(scale(i)), _mm512_set1_ps(bias(i))));
                fetch_ahead(weight + i / 2);
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i / 2)));
                const __m512i which = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), nibbles);
                _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(which, table));
                continue;
            }
            fetch_ahead(weight + i);
            const auto some = [&](int64_t at) {
                return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + at))));
            };
            __m512 first = some(i), second = some(i + LANES);
            if (!is_whole) {
                const __m512 by = _mm512_set1_ps(scale(i)), more = _mm512_set1_ps(bias(i));
                first = _mm512_fmadd_ps(first, by, more), second = _mm512_fmadd_ps(second, by, more);
            }
            store_halves(out + i, first, second);
        }
    }

    void finish(int64_t block, int64_t place) {
        const int64_t row = block * BLOCK_ROWS;
        __m512 scale[2], offset[2], bias[2];
        for (int64_t half = 0; half < 2; ++half) {
            float scales[LANES], offsets[LANES];
            for (int64_t i = 0; i < LANES && is_whole; ++i) {
                scales[i] = load(m.scales, row + half * LANES + i, m.scale_bits);
                offsets[i] = load(m.biases, row + half * LANES + i, m.scale_bits);
            }
            scale[half] = is_whole ? _mm512_loadu_ps(scales) : _mm512_set1_ps(1);
            offset[half] = is_whole ? _mm512_loadu_ps(offsets) : _mm512_setzero_ps();
            bias[half] = m.bias ? _mm512_loadu_ps(m.bias + row + half * LANES) : _mm512_setzero_ps();
        }
        for (int64_t tile = 0; tile < tokens.tiles; ++tile) {
            const float* from = sums + (place * pairs + tile / 2) * BLOCK_SIZE + tile % 2 * SIDE;
            __m512i lines[2][SIDE];
            for (int64_t i = 0; i < BLOCK_ROWS; ++i) lines[i / SIDE][i % SIDE] = _mm512_loadu_si512(from + i * BLOCK_COLUMNS);
            transpose(lines[0]);
            transpose(lines[1]);
            for (int64_t i = 0; i < std::min(SIDE, tokens.count - tile * SIDE); ++i) {
                const __m512 sum = _mm512_set1_ps(tokens.sums[tile * SIDE + i]);
                const auto result = [&](int64_t half) {
                    const __m512 rest = _mm512_fmadd_ps(offset[half], sum, bias[half]);
                    return _mm512_fmadd_ps(_mm512_castsi512_ps(lines[half][i]), scale[half], rest);
                };
                store_halves(y + (tile * SIDE + i) * m.rows + row, result(0), result(1));
            }
        }
    }

    const Matrix& m;
    const Tokens& tokens;
    uint16_t* y;
    const bool is_whole;
    const int64_t pairs;      // of tiles of tokens
    float* sums;              // (blocks, pairs, BLOCK_ROWS, BLOCK_COLUMNS)
    uint16_t* floats;
};

}  // namespace

// `x` (T, K) times the transposed matrix, to `y` (T, N), both bfloat16; of two matrices, silu(first) * second, which is
// for those in tiles. K is a multiple of 32, and so are N and what shares a scale.
extern "C" void fastvlm_tile_products(Parallel parallel, int32_t num_threads, const Matrix* matrix, const Matrix* other,
                                      const uint16_t* x, int64_t num_tokens, uint16_t* y) {
    const Matrix& m = *matrix;
    const int64_t blocks = m.rows / BLOCK_ROWS, rounds = (blocks + GROUP * num_threads - 1) / (GROUP * num_threads);
    const int64_t size = (blocks + rounds * num_threads - 1) / (rounds * num_threads);
    for (int64_t begin = 0; begin < num_tokens; begin += MOST_TOKENS) {
        const int64_t count = std::min(MOST_TOKENS, num_tokens - begin);
        const auto each = [&](auto& some, int64_t part) {
            some.multiply(part * size, std::min(part * size + size, blocks));
        };
        const uint16_t* from = x + begin * m.columns;
        uint16_t* to = y + begin * m.rows;
        if (m.is_tiled) {
            share(parallel, num_threads, (blocks + size - 1) / size, [&] {
                return [&, shapes = TileShapes(), columns = Columns(m, other, from, count, to, size)](
                           int64_t part) mutable { each(columns, part); };
            });
            continue;
        }
        Tokens tokens(from, count, m.columns);
        share(parallel, num_threads, tokens.tiles, [&] { return [&](int64_t tile) { tokens.lay_out(tile); }; });
        share(parallel, num_threads, (blocks + size - 1) / size, [&] {
            return [&, shapes = TileShapes(), rows = Rows(m, tokens, to, size)](int64_t part) mutable {
                each(rows, part);
            };
        });
    }
}

#endif
