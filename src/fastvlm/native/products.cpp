// A matrix of 8- or 4-bit numbers times many vectors: what reading a prompt spends its time on.
//
// Vectors become whole numbers with a scale for every group of inputs, or for ROW_BLOCK of them where a row of weights
// has one. Beside 8-bit weights they have 16 bits, as for few tokens (matrix.h), and their bytes are multiplied apart;
// beside 4-bit weights 12, of which the upper eight are multiplied with 16 times the weights: then one sum holds all.
//
// Letters: T tokens, K inputs and N outputs of a matrix.

#include "matrix.h"

#if HAS_BYTE_PRODUCTS

namespace {

// As `multiply_tile<true>`; the rows are the upper parts of numbers of 12 bits, the lower parts lie `lower` behind.
__attribute__((noinline)) void multiply_pairs(const int8_t* rows, int64_t stride, int64_t lower, const int8_t* panel,
                                              int64_t inputs, __m512i (*out)[2]) {
    __m512i sums[TILE][2];
    for (auto& row : sums) row[0] = row[1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4) {
        const __m512i first = _mm512_loadu_si512(panel + k * PANEL_WIDTH);
        const __m512i second = _mm512_loadu_si512(panel + k * PANEL_WIDTH + 64);
        const __m512i first_up = _mm512_slli_epi16(first, 4), second_up = _mm512_slli_epi16(second, 4);
#pragma GCC unroll 12
        for (int64_t row = 0; row < TILE; ++row) {
            int32_t four;
            std::memcpy(&four, rows + row * stride + k, sizeof four);
            __m512i same = _mm512_set1_epi32(four);
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], first_up, same);
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], second_up, same);
            std::memcpy(&four, rows + lower + row * stride + k, sizeof four);
            same = _mm512_set1_epi32(four);
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], first, same);
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], second, same);
        }
    }
#pragma GCC unroll 12
    for (int64_t row = 0; row < TILE; ++row) {
        out[row][0] = sums[row][0];
        out[row][1] = sums[row][1];
    }
}

struct Shape {
    explicit Shape(const Matrix& m)
        : is_whole(m.group == m.columns),
          groups(m.columns / m.group),
          block(is_whole ? ROW_BLOCK : m.group),
          blocks((m.columns + block - 1) / block) {}

    const bool is_whole;
    const int64_t groups, block, blocks;
};

// The vectors.
class Rows {
public:
    Rows(const Matrix& m, int64_t count)
        : shape(m),
          size(m.columns),
          is_paired(m.bits == 4),
          per_tile(is_paired ? TILE : TILE / 2),
          bytes((count + per_tile - 1) / per_tile * per_tile * 2 * size),
          scales(count * shape.blocks),
          sums(count * shape.groups) {}

    void read(int64_t token, const float* x) {
        const unsigned bits = is_paired ? 4 : 8, cut = 32 - bits;  // of the lower part, which has a sign, too
        const float steps = static_cast<float>(127 << bits);       // so that the upper part cannot overflow
        for (int64_t block = 0; block < shape.blocks; ++block) {
            const int64_t begin = block * shape.block, end = std::min(begin + shape.block, size);
            __m512 largest = _mm512_setzero_ps(), strange = largest;
            for (int64_t i = begin; i < end; i += LANES) {
                const __m512 some = _mm512_maskz_loadu_ps(first_lanes(end - i), x + i);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
                strange = _mm512_fmadd_ps(some, _mm512_setzero_ps(), strange);  // NaN if one is infinite or none
            }
            const float most = _mm512_reduce_max_ps(largest);
            const float scale = most / steps + _mm512_reduce_add_ps(strange);
            __m512i sum = _mm512_setzero_si512();
            const __m512 inverse = _mm512_set1_ps(most > 0 ? steps / most : 0);
            int8_t* high = bytes.data() + (token / per_tile * 2 * per_tile + token % per_tile) * size;
            for (int64_t i = begin; i < end; i += LANES) {
                const __mmask16 mask = first_lanes(end - i);
                __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
                sum = _mm512_add_epi32(sum, whole);
                if (is_paired) whole = _mm512_permutexvar_epi32(EVEN_FIRST, whole);
                const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, cut), cut);
                const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), bits);
                _mm512_mask_cvtepi32_storeu_epi8(high + i, mask, upper);
                _mm512_mask_cvtepi32_storeu_epi8(high + lower() + i, mask, low);
            }
            scales[token * shape.blocks + block] = scale;
            // of what is multiplied, not of what was given: then rounding is weighed with weights, not with numbers
            sums[token * shape.groups + (shape.is_whole ? 0 : block)] +=
                scale * static_cast<float>(_mm512_reduce_add_epi32(sum));
        }
    }

    const int8_t* tile(int64_t token) const { return bytes.data() + token * 2 * size; }

    int64_t lower() const { return per_tile * size; }  // where lower parts lie behind the upper ones

    const Shape shape;
    const int64_t size;
    const bool is_paired;
    const int64_t per_tile;  // tokens

private:
    // Of eight numbers that lie in four bytes the lower halves come first, as `Panel` unpacks them.
    const __m512i EVEN_FIRST = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    std::vector<int8_t> bytes;

public:
    std::vector<float> scales, sums;  // (T, blocks), (T, groups)
};

// PANEL_WIDTH rows of the matrix, from `first`; past its end the last one again.
class Panel {
public:
    Panel(const Matrix& m, const Shape& shape)
        : m(m), shape(shape), bytes(m.columns * PANEL_WIDTH), scales(shape.groups * PANEL_WIDTH), biases(scales.size()) {}

    void read(int64_t first) {
        const int64_t stride = m.columns * m.bits / 8;
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t begin = first + half * LANES;
            const uint8_t* from = static_cast<const uint8_t*>(m.weight) + std::min(begin, m.rows - 1) * stride;
            int32_t offsets[LANES];
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t row = std::min(begin + lane, m.rows - 1);
                offsets[lane] = static_cast<int32_t>((row - std::min(begin, m.rows - 1)) * stride);
                for (int64_t group = 0; group < shape.groups; ++group) {
                    const int64_t to = group * PANEL_WIDTH + half * LANES + lane;
                    scales[to] = load(m.scales, row * shape.groups + group, m.scale_bits);
                    biases[to] = load(m.biases, row * shape.groups + group, m.scale_bits);
                }
            }
            const __m512i where = _mm512_loadu_si512(offsets), lower = _mm512_set1_epi8(15);
            int8_t* to = bytes.data() + half * 64;
            for (int64_t i = 0; i < stride; i += 4) {
                const __m512i four = _mm512_i32gather_epi32(where, from + i, 1);
                if (m.bits == 8) {
                    _mm512_storeu_si512(to + i * PANEL_WIDTH, four);
                } else {
                    _mm512_storeu_si512(to + 2 * i * PANEL_WIDTH, _mm512_and_si512(four, lower));
                    _mm512_storeu_si512(to + (2 * i + 4) * PANEL_WIDTH,
                                        _mm512_and_si512(_mm512_srli_epi32(four, 4), lower));
                }
            }
        }
    }

    // Products of a tile of tokens, from `token` on, to `y` (T, N).
    void multiply(const Rows& x, int64_t token, int64_t count, int64_t first, float* y) const {
        __m512i sums[TILE][2];
        __m512 totals[TILE][2];
        for (auto& row : totals) row[0] = row[1] = _mm512_setzero_ps();
        for (int64_t block = 0; block < shape.blocks; ++block) {
            const int64_t begin = block * shape.block, end = std::min(begin + shape.block, m.columns);
            const int8_t *rows = x.tile(token) + begin, *numbers = bytes.data() + begin * PANEL_WIDTH;
            if (x.is_paired) {
                multiply_pairs(rows, m.columns, x.lower(), numbers, end - begin, sums);
            } else {
                multiply_tile<true>(rows, m.columns, numbers, end - begin, sums);
            }
            for (int64_t t = 0; t < count; ++t) {
                const __m512 scale = _mm512_set1_ps(x.scales[(token + t) * shape.blocks + block]);
                for (int64_t half = 0; half < 2; ++half) {
                    __m512 sum = _mm512_cvtepi32_ps(sums[t][half]);
                    if (!x.is_paired)
                        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256),
                                              _mm512_cvtepi32_ps(sums[x.per_tile + t][half]));
                    sum = _mm512_mul_ps(sum, scale);
                    __m512& total = totals[t][half];
                    total = shape.is_whole ? _mm512_add_ps(total, sum)
                                           : grouped(x, token + t, block, half, sum, total);
                }
            }
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t n = first + half * LANES;
                if (n >= m.rows) continue;
                const __mmask16 mask = first_lanes(m.rows - n);
                __m512 total = totals[t][half];
                if (shape.is_whole) total = grouped(x, token + t, 0, half, total, _mm512_setzero_ps());
                if (m.bias != nullptr) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, m.bias + n));
                _mm512_mask_storeu_ps(y + (token + t) * m.rows + n, mask, total);
            }
    }

private:
    // scale * (numbers . x) + bias * (sum of x), of a group, more.
    __m512 grouped(const Rows& x, int64_t token, int64_t group, int64_t half, __m512 product, __m512 total) const {
        const int64_t at = group * PANEL_WIDTH + half * LANES;
        const __m512 sum = _mm512_set1_ps(x.sums[token * shape.groups + group]);
        total = _mm512_fmadd_ps(product, _mm512_loadu_ps(scales.data() + at), total);
        return _mm512_fmadd_ps(sum, _mm512_loadu_ps(biases.data() + at), total);
    }

    const Matrix& m;
    const Shape& shape;
    std::vector<int8_t> bytes;
    std::vector<float> scales, biases;  // (groups, PANEL_WIDTH)
};

}  // namespace

// `x` (T, K) times the transposed matrix, whose groups are multiples of 16 inputs or whole rows, to `y` (T, N).
extern "C" void fastvlm_products(Parallel parallel, int32_t num_threads, const Matrix* matrix, const float* x,
                                 int64_t num_tokens, float* y) {
    const Matrix& m = *matrix;
    Rows rows(m, num_tokens);
    share(parallel, num_threads, num_tokens, [&] {
        return [&](int64_t token) { rows.read(token, x + token * m.columns); };
    });
    share(parallel, num_threads, (m.rows + PANEL_WIDTH - 1) / PANEL_WIDTH, [&] {
        return [&, panel = Panel(m, rows.shape)](int64_t part) mutable {
            panel.read(part * PANEL_WIDTH);
            for (int64_t token = 0; token < num_tokens; token += rows.per_tile)
                panel.multiply(rows, token, std::min(rows.per_tile, num_tokens - token), part * PANEL_WIDTH, y);
        };
    });
}

#endif
