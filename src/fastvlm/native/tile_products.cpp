// A matrix times many vectors in tiles of AMX: what reading a prompt in bfloat16 spends its time on.
//
// The matrix is the left factor and stays where it lies, row by row; what is laid out anew are the vectors. Numbers of
// 8 and 4 bits become bfloat16 some inputs at a time, in the cache: where a row has one scale, exactly, and the scale
// follows in float32.
//
// Letters: T tokens, K inputs and N outputs of a matrix.

#include "matrix.h"
#include "tiles.h"

#if HAS_TILES

namespace {

constexpr int64_t MOST_TOKENS = 512;  // at once
constexpr int64_t CHUNK = 512;        // inputs whose rows of weights stay in the first cache
constexpr int64_t GROUP = 8;          // blocks of rows for which a chunk of the vectors stays in the second one

// Tokens as right factors: tiles of DEPTH inputs and SIDE tokens, those of the same tokens behind each other.
class Tokens {
public:
    Tokens(const uint16_t* x, int64_t count, int64_t size)
        : count(count), size(size), tiles((count + SIDE - 1) / SIDE), sums(tiles * SIDE), x(x), laid_out(tiles * SIDE * size) {}

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
            uint16_t* to = laid_out.data() + first * size + step * TILE_SIZE;
            for (int64_t i = 0; i < SIDE; ++i) _mm512_storeu_si512(to + i * DEPTH, rows[i]);
        }
        for (int64_t i = 0; i < SIDE; ++i) sums[first + i] = _mm512_reduce_add_ps(totals[i]);
    }

    const uint16_t* tile(int64_t index, int64_t input) const {
        return laid_out.data() + index * SIDE * size + input / DEPTH * TILE_SIZE;
    }

    const int64_t count, size, tiles;
    std::vector<float> sums;  // (T): of the members

private:
    const uint16_t* x;
    std::vector<uint16_t> laid_out;
};

// What one thread needs.
class Rows {
public:
    Rows(const Matrix& m, const Tokens& tokens, uint16_t* y, int64_t blocks)
        : m(m),
          tokens(tokens),
          y(y),
          is_whole(m.bits == 8 && m.group == m.columns),
          pairs((tokens.tiles + 1) / 2),
          sums(blocks * pairs * BLOCK_ROWS * BLOCK_COLUMNS),
          floats(m.bits < 16 ? BLOCK_ROWS * CHUNK : 0) {}

    // Products of BLOCK_ROWS rows in each of some blocks.
    void multiply(int64_t begin, int64_t end) {
        const int64_t chunks = (m.columns + CHUNK - 1) / CHUNK;
        const int64_t chunk = (m.columns / DEPTH + chunks - 1) / chunks * DEPTH;
        for (int64_t input = 0; input < m.columns; input += chunk)
            for (int64_t block = begin; block < end; ++block) {
                const int64_t count = std::min(chunk, m.columns - input);
                const bool is_last = block + 1 == end;
                add(block, block - begin, input, count, is_last ? begin : block + 1, is_last ? input + chunk : input);
                if (input + chunk >= m.columns) finish(block, block - begin);
            }
    }

private:
    void add(int64_t block, int64_t place, int64_t input, int64_t count, int64_t next_block, int64_t next_input) {
        const int64_t row = block * BLOCK_ROWS, steps = count / DEPTH, apart = tokens.size * SIDE;
        const uint16_t* weight = static_cast<const uint16_t*>(m.weight);
        const uint16_t *left = weight + row * m.columns + input, *coming = weight;
        int64_t stride = m.columns, lines = 0, line = 0;
        if (m.bits < 16) {
            for (int64_t i = 0; i < BLOCK_ROWS; ++i) unpack_some(row + i, input, count, floats.data() + i * count);
            left = floats.data(), stride = count;
        } else if (next_input < m.columns) {  // ask for what comes next, a line of each row in turn
            coming += next_block * BLOCK_ROWS * m.columns + next_input;
            lines = (BLOCK_ROWS + pairs - 1) / pairs;
        }
        const auto ask = [&](int64_t) {
            for (const int64_t until = line + lines; line < until; ++line) {
                const int64_t own = line % BLOCK_ROWS, at = line / BLOCK_ROWS * DEPTH;
                _mm_prefetch(reinterpret_cast<const char*>(coming + own * m.columns + at), _MM_HINT_T1);
            }
        };
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const uint16_t* right = tokens.tile(2 * pair, input);
            float* to = sums.data() + (place * pairs + pair) * BLOCK_ROWS * BLOCK_COLUMNS;
            if (2 * pair + 1 < tokens.tiles) {
                multiply_block<2>(left, stride, right, apart, steps, input > 0, to, ask);
            } else {
                multiply_block<1>(left, stride, right, apart, steps, input > 0, to, ask);
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
            const float* from = sums.data() + (place * pairs + tile / 2) * BLOCK_ROWS * BLOCK_COLUMNS + tile % 2 * SIDE;
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
    std::vector<float> sums;  // (blocks, pairs, BLOCK_ROWS, BLOCK_COLUMNS)
    std::vector<uint16_t> floats;
};

}  // namespace

// `x` (T, K) times the transposed matrix, to `y` (T, N), both bfloat16; K is a multiple of 32 and so are N and what
// shares a scale.
extern "C" void fastvlm_tile_products(Parallel parallel, int32_t num_threads, const Matrix* matrix, const uint16_t* x,
                                      int64_t num_tokens, uint16_t* y) {
    const Matrix& m = *matrix;
    for (int64_t begin = 0; begin < num_tokens; begin += MOST_TOKENS) {
        Tokens tokens(x + begin * m.columns, std::min(MOST_TOKENS, num_tokens - begin), m.columns);
        share(parallel, num_threads, tokens.tiles, [&] { return [&](int64_t tile) { tokens.lay_out(tile); }; });
        const int64_t blocks = m.rows / BLOCK_ROWS, rounds = (blocks + GROUP * num_threads - 1) / (GROUP * num_threads);
        const int64_t size = (blocks + rounds * num_threads - 1) / (rounds * num_threads);
        share(parallel, num_threads, (blocks + size - 1) / size, [&] {
            return [&, shapes = TileShapes(), rows = Rows(m, tokens, y + begin * m.rows, size)](int64_t part) mutable {
                rows.multiply(part * size, std::min(part * size + size, blocks));
            };
        });
    }
}

#endif
