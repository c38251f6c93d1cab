// Attention in bfloat16, in tiles of AMX.
//
// Keys are the rows of the scores and queries the columns: what belongs to a query stays in its lane of a vector, and
// two rows of weights make one of the right factor that the second product reads. Keys come in chunks whose scores stay
// in the first cache, weighed against the highest score so far (arXiv 2205.14135); while the weights of a chunk are
// computed, the tiles make the scores of the next one. Scores, weights and sums are float32, and the weights that are
// multiplied with the values, and their sum, are those rounded to bfloat16.
//
// Letters: E width of a head.

#include <algorithm>
#include <cmath>

#include "tiles.h"

#if HAS_TILES
#include "exponential.h"

namespace {

constexpr int64_t MOST_WIDTH = 256;                          // as in fastvlm/model/tile_attention.py
constexpr int64_t CHUNK = 128, BLOCKS = CHUNK / BLOCK_ROWS;  // keys, and blocks of them
constexpr float SLACK = 8;  // so many powers of two above the highest score so far may a later one be

struct Strides {  // in numbers
    int64_t row, head, position;

    int64_t operator()(int64_t own_row, int64_t own_head, int64_t own_position) const {
        return own_row * row + own_head * head + own_position * position;
    }
};

struct Attention {  // fields as in fastvlm/model/tile_attention.py
    const uint16_t *query, *key, *value;
    uint16_t* out;
    Strides of_query, of_key, of_value, of_out;
    int64_t num_rows, num_heads, num_kv_heads, num_queries, num_keys, width;
    int32_t is_causal;  // the last query sees all keys, each before it one less
};

// Keys and values of all heads, chunk by chunk, what is missing to a chunk zero: keys (CHUNK, E), as they are, and
// values (E, CHUNK).
class Context {
public:
    explicit Context(const Attention& a)
        : chunks((a.num_keys + CHUNK - 1) / CHUNK),
          a(a),
          laid_out(Room<Context, uint16_t>::of(parts() * 2 * CHUNK * a.width)) {}

    int64_t parts() const { return a.num_rows * a.num_kv_heads * chunks; }

    void lay_out(int64_t part) const {
        const int64_t row = part / chunks / a.num_kv_heads, head = part / chunks % a.num_kv_heads;
        const int64_t first = part % chunks * CHUNK, count = std::min(CHUNK, a.num_keys - first), width = a.width;
        uint16_t *keys = laid_out + part * 2 * CHUNK * width, *values = keys + CHUNK * width;
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(keys + i * width, a.key + a.of_key(row, head, first + i), width * sizeof *keys);
        std::memset(keys + count * width, 0, (CHUNK - count) * width * sizeof *keys);
        for (int64_t begin = 0; begin < CHUNK; begin += DEPTH)
            for (int64_t column = 0; column < width; column += SIDE) {
                const auto some = [&](int64_t i) {
                    if (i >= count) return _mm512_setzero_si512();
                    const uint16_t* from = a.value + a.of_value(row, head, first + i) + column;
                    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
                };
                __m512i pairs[SIDE];
                for (int64_t i = 0; i < SIDE; ++i)
                    pairs[i] = _mm512_or_si512(some(begin + 2 * i), _mm512_slli_epi32(some(begin + 2 * i + 1), 16));
                transpose(pairs);
                for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(values + (column + i) * CHUNK + begin, pairs[i]);
            }
    }

    const uint16_t* keys(int64_t row, int64_t head, int64_t chunk) const {
        return laid_out + ((row * a.num_kv_heads + head) * chunks + chunk) * 2 * CHUNK * a.width;
    }

    const uint16_t* values(int64_t row, int64_t head, int64_t chunk) const {
        return keys(row, head, chunk) + CHUNK * a.width;
    }

private:
    const int64_t chunks;
    const Attention& a;
    uint16_t* const laid_out;
};

// What one thread needs: queries (BLOCK_COLUMNS) of a head and what they see.
class Block {
public:
    Block(const Attention& a, const Context& context)
        : a(a),
          context(context),
          scale(static_cast<float>(1 / std::log(2.0) / std::sqrt(static_cast<double>(a.width)))) {}

    void run(int64_t own_row, int64_t own_head, int64_t own_first) {
        row = own_row, head = own_head, kv_head = head / (a.num_heads / a.num_kv_heads), first = own_first;
        read_queries();
        const int64_t before = a.num_keys - a.num_queries;
        const int64_t seen = a.is_causal ? std::min(a.num_keys, before + first + BLOCK_COLUMNS) : a.num_keys;
        const int64_t blocks = (seen + BLOCK_ROWS - 1) / BLOCK_ROWS;
        for (int64_t block = 0; block < std::min(BLOCKS, blocks); ++block) score(block);
        for (int64_t block = 0; block < std::min(BLOCKS, blocks); ++block) look(block);
        for (int64_t begin = 0; begin < blocks; begin += BLOCKS) {
            const int64_t end = std::min(begin + BLOCKS, blocks);
            take_highest(begin == 0);
            for (int64_t block = begin; block < end; ++block) {
                const bool is_more = block + BLOCKS < blocks;
                if (is_more) score(block + BLOCKS);
                weigh(block);
                if (is_more) look(block + BLOCKS);
            }
            const uint16_t* values = context.values(row, kv_head, begin / BLOCKS);
            for (int64_t column = 0; column < a.width; column += BLOCK_ROWS)
                multiply_block<2>(values + column * CHUNK, CHUNK, weights, BLOCKS * TILE_SIZE, end - begin, begin > 0,
                                  mixed + column * BLOCK_COLUMNS, [](int64_t) {});
        }
        finish();
    }

private:
    void read_queries() {
        const int64_t count = a.num_queries - first;
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t step = 0; step < a.width / DEPTH; ++step) {
                __m512i rows[SIDE];
                for (int64_t i = 0; i < SIDE; ++i) {
                    const int64_t own = half * SIDE + i;
                    const uint16_t* from = a.query + a.of_query(row, head, first + own) + step * DEPTH;
                    rows[i] = own < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
                }
                transpose(rows);
                uint16_t* to = queries + half * SIDE * a.width + step * TILE_SIZE;
                for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(to + i * DEPTH, rows[i]);
            }
    }

    float* scores(int64_t block) { return kept[block % (2 * BLOCKS)]; }

    void score(int64_t block) {
        const uint16_t* keys = context.keys(row, kv_head, block / BLOCKS) + block % BLOCKS * BLOCK_ROWS * a.width;
        multiply_block<2>(keys, a.width, queries, SIDE * a.width, a.width / DEPTH, false, scores(block),
                          [](int64_t) {});
    }

    // Hide what no query may see, and find the highest scores.
    void look(int64_t block) {
        float* own = scores(block);
        const int64_t key = block * BLOCK_ROWS, last = key + BLOCK_ROWS - 1, before = a.num_keys - a.num_queries;
        if (last >= a.num_keys || (a.is_causal && last > before + first))
            for (int64_t i = 0; i < BLOCK_ROWS; ++i)
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t lanes =
                        a.is_causal ? key + i - before - first - half * SIDE : 0;  // that do not see it
                    const bool is_none = key + i >= a.num_keys;
                    const __mmask16 hidden = is_none ? 0xffff : first_lanes(std::max(lanes, int64_t{0}));
                    _mm512_mask_store_ps(own + i * BLOCK_COLUMNS + half * SIDE, hidden, _mm512_set1_ps(-INFINITY));
                }
        __m512 left = peak[0], right = peak[1];
        for (int64_t i = 0; i < BLOCK_ROWS; ++i) {
            left = _mm512_max_ps(left, _mm512_load_ps(own + i * BLOCK_COLUMNS));
            right = _mm512_max_ps(right, _mm512_load_ps(own + i * BLOCK_COLUMNS + SIDE));
        }
        peak[0] = left, peak[1] = right;
    }

    // Measure weights from the highest scores from now on, those of the next chunk included, if they differ by much.
    void take_highest(bool is_first) {
        __mmask16 is_much = 0;
        __m512 higher[2];
        for (int64_t half = 0; half < 2; ++half) {
            higher[half] = _mm512_mul_ps(peak[half], _mm512_set1_ps(scale));
            peak[half] = _mm512_set1_ps(-INFINITY);
            is_much |=
                _mm512_cmp_ps_mask(higher[half], _mm512_add_ps(highest[half], _mm512_set1_ps(SLACK)), _CMP_GT_OQ);
        }
        for (int64_t half = 0; half < 2; ++half) {
            if (is_first) {
                highest[half] = higher[half];
                total[half] = _mm512_setzero_ps();
            } else if (is_much) {
                const __m512 next = _mm512_max_ps(higher[half], highest[half]);
                const __m512 factor = power_of_two(_mm512_sub_ps(highest[half], next));
                highest[half] = next;
                total[half] = _mm512_mul_ps(total[half], factor);
                for (int64_t i = 0; i < a.width; ++i) {
                    float* own = mixed + i * BLOCK_COLUMNS + half * SIDE;
                    _mm512_store_ps(own, _mm512_mul_ps(_mm512_load_ps(own), factor));
                }
            }
        }
    }

    void weigh(int64_t block) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(SIDE));
        const __m512i order = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        const __m512 by = _mm512_set1_ps(scale);
        const auto weigh_two = [&](const float* own, __m512 above, uint16_t* to, __m512& sum) {
            const __m512 first = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(own), by, above));
            const __m512 second = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(own + BLOCK_COLUMNS), by, above));
            const __m512i pairs = _mm512_permutexvar_epi16(order, halves_of(first, second));
            _mm512_store_si512(to, pairs);
            sum = add_pairs(sum, pairs);
        };
        const float* own = scores(block);
        uint16_t* to = weights + block % BLOCKS * TILE_SIZE;
        const __m512 left = highest[0], right = highest[1];
        __m512 left_sum = total[0], right_sum = total[1];
        for (int64_t key = 0; key < BLOCK_ROWS; key += 2) {
            weigh_two(own + key * BLOCK_COLUMNS, left, to + key * SIDE, left_sum);
            weigh_two(own + key * BLOCK_COLUMNS + SIDE, right, to + BLOCKS * TILE_SIZE + key * SIDE, right_sum);
        }
        total[0] = left_sum, total[1] = right_sum;
    }

    void finish() {
        for (int64_t half = 0; half < 2; ++half) {
            const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1), total[half]);
            for (int64_t column = 0; column < a.width; column += BLOCK_COLUMNS) {
                __m512i lines[2][SIDE];
                for (int64_t i = 0; i < BLOCK_COLUMNS; ++i) {
                    const __m512 sum = _mm512_load_ps(mixed + (column + i) * BLOCK_COLUMNS + half * SIDE);
                    lines[i / SIDE][i % SIDE] = _mm512_castps_si512(_mm512_mul_ps(sum, factor));
                }
                transpose(lines[0]);
                transpose(lines[1]);
                for (int64_t i = 0; i < std::min(SIDE, a.num_queries - first - half * SIDE); ++i)
                    store_halves(a.out + a.of_out(row, head, first + half * SIDE + i) + column,
                                 _mm512_castsi512_ps(lines[0][i]), _mm512_castsi512_ps(lines[1][i]));
            }
        }
    }

    static __m512 add_pairs(__m512 sum, __m512i pairs) {
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        __m512bh left, right;
        std::memcpy(&left, &pairs, sizeof left);
        std::memcpy(&right, &ones, sizeof right);
        return _mm512_dpbf16_ps(sum, left, right);
    }

    const Attention& a;
    const Context& context;
    const float scale;  // of scores, whose exponentials are powers of two
    int64_t row, head, kv_head, first;
    __m512 peak[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};  // of scores in the next chunk
    __m512 highest[2] = {}, total[2] = {};                     // what weights are measured from; their sums
    alignas(64) uint16_t queries[BLOCK_COLUMNS * MOST_WIDTH];  // (2, E / DEPTH, DEPTH / 2, SIDE, 2)
    alignas(64) float kept[2 * BLOCKS][BLOCK_SIZE];            // scores of two chunks
    alignas(64) uint16_t weights[2 * BLOCKS * TILE_SIZE];      // (2, CHUNK / 2, SIDE, 2)
    alignas(64) float mixed[MOST_WIDTH * BLOCK_COLUMNS];       // values, not yet divided
};

}  // namespace

// The width is a multiple of 32, at most MOST_WIDTH.
extern "C" void fastvlm_tile_attention(Parallel parallel, int32_t num_threads, const Attention* attention) {
    const Attention& a = *attention;
    const Context context(a);
    share(parallel, num_threads, context.parts(), [&] { return [&](int64_t part) { context.lay_out(part); }; });
    const int64_t blocks = (a.num_queries + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    share(parallel, num_threads, a.num_rows * a.num_heads * blocks, [&] {
        return [&, shapes = TileShapes(), block = Block(a, context)](int64_t part) mutable {
            const int64_t head = part / blocks;
            block.run(head / a.num_heads, head % a.num_heads, part % blocks * BLOCK_COLUMNS);
        };
    });
}

#endif
