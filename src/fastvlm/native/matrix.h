// Matrices in the formats of weights, and their products with a vector. Sums are float32.
//
// Loops over LANES are written so that the compiler turns them into the widest vectors of the machine. Only products of
// bytes, which no compiler finds, are spelled out, for processors with AVX512-VNNI; others make floats of the bytes.
//
// Letters: K inputs and N outputs of a matrix.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t AHEAD = 4096;  // bytes: what a core asks memory for by itself comes too late for short rows

// Ask for what will be read soon; past the end nothing happens.
inline void fetch_ahead(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + AHEAD); }

struct Matrix {           // (N, K) row by row; fields as in fastvlm/model/native.py
    const void* weight;   // float32, bfloat16, bytes, or two 4-bit numbers a byte, the lower half first
    const void* scales;   // (N, groups), for 8 and 4 bits: weight = number * scale + bias of its group
    const void* biases;
    const float* bias;    // (N) or null: added to the output
    int64_t rows, columns, group;
    int32_t bits;         // 32, 16, 8 or 4
    int32_t scale_bits;   // 32 or 16: format of scales and biases
    int32_t is_tiled;     // of 16 bits: not row by row but as right factor of AMX's tiles, (N / 16, K / 32, 16, 16, 2)
};

typedef float Floats __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef uint32_t Pairs __attribute__((vector_size(4 * LANES), may_alias, aligned(2)));  // of bfloat16, in place

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float load(const void* base, int64_t index, int bits) {
    if (bits == 32) return static_cast<const float*>(base)[index];
    return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16);
}

inline uint32_t halve(float value) {  // to bfloat16: to the nearest, ties to even
    uint32_t raw;
    std::memcpy(&raw, &value, sizeof raw);
    return (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
}

inline void store(void* base, int64_t index, int bits, float value) {
    if (bits == 32) {
        static_cast<float*>(base)[index] = value;
        return;
    }
    static_cast<uint16_t*>(base)[index] = static_cast<uint16_t>(halve(value));
}

inline float sum(const float* lanes) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

// One vector as the kernels read it: in order, and its even and odd members apart (packed pairs are read as pairs).
struct Vector {
    std::vector<float> plain, even, odd;

    explicit Vector(int64_t size) : plain(size), even(size / 2 + 1), odd(size / 2 + 1) {}

    // Take what was written to `plain` from an even place on.
    void split(int64_t begin, int64_t count) {
        const float* from = plain.data() + begin;
        float *left = even.data() + begin / 2, *right = odd.data() + begin / 2;
        for (int64_t i = 0; i < count / 2; ++i) {
            left[i] = from[2 * i];
            right[i] = from[2 * i + 1];
        }
        if (count & 1) left[count / 2] = from[count - 1];
    }
};

// A row of an 8- or 4-bit matrix as floats.
void unpack(const Matrix& m, int64_t row, float* out) {
    const int64_t num_groups = m.columns / m.group;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + row * m.columns * m.bits / 8;
    for (int64_t group = 0; group < num_groups; ++group) {
        const float scale = load(m.scales, row * num_groups + group, m.scale_bits);
        const float bias = load(m.biases, row * num_groups + group, m.scale_bits);
        for (int64_t i = group * m.group; i < (group + 1) * m.group; ++i) {
            const int number = m.bits == 8 ? weight[i] : (i & 1 ? weight[i / 2] >> 4 : weight[i / 2] & 15);
            out[i] = static_cast<float>(number) * scale + bias;
        }
    }
}

// The same as bfloat16, two numbers at a time.
template <int BITS>
void unpack(const Matrix& m, int64_t row, uint16_t* out) {
    const int64_t num_groups = m.columns / m.group, pairs = m.group / 2;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + row * m.columns * BITS / 8;
    for (int64_t group = 0; group < num_groups; ++group) {
        const float scale = load(m.scales, row * num_groups + group, m.scale_bits);
        const float bias = load(m.biases, row * num_groups + group, m.scale_bits);
        const uint8_t* numbers = weight + group * m.group * BITS / 8;
        const auto half = [&](int number) { return halve(static_cast<float>(number) * scale + bias); };
        uint16_t* own = out + group * m.group;
        int64_t i = 0;
        for (; i + LANES <= pairs; i += LANES) {
            uint32_t halves[LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int first = BITS == 8 ? numbers[2 * (i + lane)] : numbers[i + lane] & 15;
                const int second = BITS == 8 ? numbers[2 * (i + lane) + 1] : numbers[i + lane] >> 4;
                halves[lane] = half(first) | half(second) << 16;
            }
            std::memcpy(own + 2 * i, halves, sizeof halves);
        }
        for (i *= 2; i < m.group; ++i)
            own[i] = static_cast<uint16_t>(
                half(BITS == 8 ? numbers[i] : (i & 1 ? numbers[i / 2] >> 4 : numbers[i / 2] & 15)));
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

constexpr int64_t STRIP = 16;  // rows of a matrix whose products are taken together
constexpr int64_t TOKENS = 4;  // that are multiplied with a row, or a strip in tiles, while it is in registers

// Rows that are read together, each from a part of memory of its own unless they are left over: a core fetches ahead
// within a page, so one stream alone waits at every page's end.
#if defined(__AVX512F__)
constexpr int64_t STREAMS = 4;  // their sums stay in registers
#else
constexpr int64_t STREAMS = 1;
#endif

// So that a sum is the same to the last bit wherever it is asked for and beside whatever others.
#define NOT_INLINED __attribute__((noinline))

// N rows of bfloat16, `stride` apart, times several vectors.
template <int N, int T>
NOT_INLINED void dot_bfloat16(const Matrix& m, int64_t first, int64_t stride, const Vector* x, float (*out)[N]) {
    const int64_t size = m.columns;
    const uint16_t* weight[N];
    for (int row = 0; row < N; ++row)
        weight[row] = static_cast<const uint16_t*>(m.weight) + (first + row * stride) * size;
    Floats lanes[N][T] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        Floats even[N], odd[N];
#pragma GCC unroll 4
        for (int row = 0; row < N; ++row) {
            const Pairs* pairs = reinterpret_cast<const Pairs*>(weight[row] + i);
            fetch_ahead(pairs);
            even[row] = reinterpret_cast<Floats>(*pairs << 16);
            odd[row] = reinterpret_cast<Floats>(*pairs & 0xffff0000u);
        }
#pragma GCC unroll 4
        for (int token = 0; token < T; ++token) {
            const Floats left = *reinterpret_cast<const Floats*>(x[token].even.data() + i / 2);
            const Floats right = *reinterpret_cast<const Floats*>(x[token].odd.data() + i / 2);
#pragma GCC unroll 4
            for (int row = 0; row < N; ++row) {
                lanes[row][token] += even[row] * left;
                lanes[row][token] += odd[row] * right;
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < N; ++row)
#pragma GCC unroll 4
        for (int token = 0; token < T; ++token) {
            float total = 0;
            for (int lane = 0; lane < LANES; ++lane) total += lanes[row][token][lane];
            for (int64_t j = i; j < size; ++j) total += load(weight[row], j, 16) * x[token].plain[j];
            out[token][row] = total;
        }
}

template <int N>
void dot_bfloat16(const Matrix& m, int64_t first, int64_t stride, const Vector* x, int64_t num_tokens,
                  float (*out)[N]) {
    switch (num_tokens) {
        case 1: return dot_bfloat16<N, 1>(m, first, stride, x, out);
        case 2: return dot_bfloat16<N, 2>(m, first, stride, x, out);
        case 3: return dot_bfloat16<N, 3>(m, first, stride, x, out);
        default: return dot_bfloat16<N, TOKENS>(m, first, stride, x, out);
    }
}

// The same of N strips that lie in tiles, `stride` rows apart.
template <int N, int T>
NOT_INLINED void dot_tiles(const Matrix& m, int64_t first, int64_t stride, const Vector* x, float (*out)[N][STRIP]) {
    const uint16_t* weight[N];
    for (int n = 0; n < N; ++n) weight[n] = static_cast<const uint16_t*>(m.weight) + (first + n * stride) * m.columns;
    Floats sums[N][T][2] = {};
    for (int64_t pair = 0; pair < m.columns / 2; ++pair) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Pairs* pairs = reinterpret_cast<const Pairs*>(weight[n] + pair * 2 * STRIP);
            fetch_ahead(pairs);
            const Floats even = reinterpret_cast<Floats>(*pairs << 16);
            const Floats odd = reinterpret_cast<Floats>(*pairs & 0xffff0000u);
#pragma GCC unroll 2
            for (int token = 0; token < T; ++token) {
                sums[n][token][0] += even * x[token].even[pair];
                sums[n][token][1] += odd * x[token].odd[pair];
            }
        }
    }
    for (int token = 0; token < T; ++token)
        for (int n = 0; n < N; ++n) {
            const Floats total = sums[n][token][0] + sums[n][token][1];
            std::memcpy(out[token][n], &total, sizeof total);
        }
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
constexpr int64_t BLOCK = 32;       // inputs that share a scale, where the weights' scales change as often
constexpr int64_t ROW_BLOCK = 512;  // where a row of weights has one: sums of so many products fit 32 bits

// Whether a row of weights has one scale and `dot_row` takes it.
inline bool has_whole_rows(const Matrix& m) { return m.bits == 8 && m.group == m.columns; }

// Whether `dot_numbers` takes the groups of a matrix: LANES blocks are a whole number of them.
inline bool has_even_groups(const Matrix& m) { return m.group % BLOCK == 0 && LANES * BLOCK % m.group == 0; }

// A vector as whole numbers of 16 bits, x = scale * (256 high + low), halves of a byte each: rounded 256 times finer
// than 8 bits would. For 4-bit weights the even members come first, then the odd ones, as pairs are packed.
class Numbers {
public:
    void read(const Vector& x, int64_t size, int bits, int64_t block_size) {
        const int64_t num_blocks = (size + block_size - 1) / block_size;
        stride = round_up(bits == 8 ? size : size / 2);
        for (auto* bytes : {&high, &low}) bytes->assign((bits == 8 ? 1 : 2) * stride, 0);
        for (auto* floats : {&scales, &sums}) floats->assign(round_up(num_blocks), 0);
        total = 0;
        for (int64_t block = 0; block < num_blocks; ++block) {
            const int64_t begin = block * block_size, end = std::min(begin + block_size, size);
            __m512 largest = _mm512_setzero_ps(), broken = largest;
            for (int64_t i = begin; i < end; i += LANES) {
                const __m512 some = _mm512_maskz_loadu_ps(first_lanes(end - i), x.plain.data() + i);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
                broken = _mm512_fmadd_ps(some, _mm512_setzero_ps(), broken);  // NaN if one is infinite or none
            }
            const float most = _mm512_reduce_max_ps(largest);
            scales[block] = most / 32512 + _mm512_reduce_add_ps(broken);  // 127 * 256: the upper half cannot overflow
            const float inverse = most > 0 ? 32512 / most : 0;
            const int sum = bits == 8 ? cut(x.plain.data(), begin, end, inverse, 0)
                                      : cut(x.even.data(), begin / 2, end / 2, inverse, 0) +
                                            cut(x.odd.data(), begin / 2, end / 2, inverse, stride);
            // of what is multiplied, not of what was given: then rounding is weighed with weights, not with numbers
            sums[block] = scales[block] * static_cast<float>(sum);
            total += sums[block];
        }
    }

    std::vector<int8_t> high, low;
    std::vector<float> scales, sums;  // of each block; zeros behind the last
    float total = 0;                  // of the sums
    int64_t stride = 0;               // where the odd members begin

private:
    static int64_t round_up(int64_t size) { return (size + 63) / 64 * 64; }

    int cut(const float* x, int64_t begin, int64_t end, float inverse, int64_t to) {  // returns the sum
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i += LANES) {
            const __mmask16 mask = first_lanes(end - i);
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(inverse));
            const __m512i number = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, number);
            const __m512i lower = _mm512_srai_epi32(_mm512_slli_epi32(number, 24), 24);
            const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(number, lower), 8);
            _mm512_mask_cvtepi32_storeu_epi8(low.data() + to + i, mask, lower);
            _mm512_mask_cvtepi32_storeu_epi8(high.data() + to + i, mask, upper);
        }
        return _mm512_reduce_add_epi32(sum);
    }
};

inline __m512i load_bytes(const uint8_t* from, int64_t left) {
    return left < 64 ? _mm512_maskz_loadu_epi8((1ull << left) - 1, from) : _mm512_loadu_si512(from);
}

// LANES numbers of an array in one of the formats of `load`, those of the mask.
inline __m512 load_floats(const void* base, int64_t index, int bits, __mmask16 mask) {
    if (bits == 32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + index);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 join(__m512i high, __m512i low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

// `dot_groups` with products of bytes, of N rows of 8 bits with one scale each, `stride` apart.
template <int N>
NOT_INLINED void dot_row(const Matrix& m, int64_t first, int64_t stride, const Numbers& x, float* out) {
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + first * m.columns;
    const int64_t apart = stride * m.columns;
    __m512 total[N];
    for (auto& one : total) one = _mm512_setzero_ps();
    for (int64_t block = 0, i = 0; i < m.columns; ++block) {
        const int64_t end = std::min(i + ROW_BLOCK, m.columns);
        __m512i high[N], low[N];
        for (int n = 0; n < N; ++n) high[n] = low[n] = _mm512_setzero_si512();
        for (; i < end; i += 64) {
            const __m512i upper = _mm512_loadu_si512(x.high.data() + i), lower = _mm512_loadu_si512(x.low.data() + i);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const uint8_t* from = weight + n * apart + i;
                const __m512i bytes = load_bytes(from, m.columns - i);
                fetch_ahead(from);
                high[n] = _mm512_dpbusd_epi32(high[n], bytes, upper);
                low[n] = _mm512_dpbusd_epi32(low[n], bytes, lower);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            total[n] = _mm512_fmadd_ps(join(high[n], low[n]), _mm512_set1_ps(x.scales[block]), total[n]);
    }
    for (int n = 0; n < N; ++n) {
        const int64_t row = first + n * stride;
        out[n] = load(m.scales, row, m.scale_bits) * _mm512_reduce_add_ps(total[n]) +
                 load(m.biases, row, m.scale_bits) * x.total;
    }
}

// 64 bytes of a vector's numbers as they meet those of weights: pairs of the latter have even and odd members.
template <int BITS>
struct Part {
    Part(const Numbers& x, int64_t at) {
        for (int odd = 0; odd < (BITS == 8 ? 1 : 2); ++odd) {
            high[odd] = _mm512_loadu_si512(x.high.data() + at + odd * x.stride);
            low[odd] = _mm512_loadu_si512(x.low.data() + at + odd * x.stride);
        }
    }

    // Products with 64 bytes of weights: a lane sums four neighbouring bytes, or pairs.
    __m512 times(__m512i bytes) const {
        const __m512i zero = _mm512_setzero_si512();
        if constexpr (BITS == 8) {
            return join(_mm512_dpbusd_epi32(zero, bytes, high[0]), _mm512_dpbusd_epi32(zero, bytes, low[0]));
        } else {
            const __m512i nibble = _mm512_set1_epi8(15), even = _mm512_and_si512(bytes, nibble);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
            return join(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even, high[0]), odd, high[1]),
                        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even, low[0]), odd, low[1]));
        }
    }

    __m512i high[2], low[2];
};

// The same of weights with a scale for each group; see `has_even_groups`.
template <int BITS, int N>
NOT_INLINED void dot_numbers(const Matrix& m, int64_t first, int64_t stride, const Numbers& x, float* out) {
    constexpr int64_t BLOCKS = 512 / BITS / BLOCK, STEPS = LANES / BLOCKS;  // in 64 bytes, which are a step
    const int64_t num_groups = m.columns / m.group, per_group = m.group / BLOCK, num_bytes = m.columns * BITS / 8;
    const uint8_t* weight = static_cast<const uint8_t*>(m.weight) + first * num_bytes;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i group_of_block = _mm512_srli_epi32(lanes, static_cast<unsigned>(__builtin_ctzll(per_group)));
    const __m512i block_of_lane = _mm512_srli_epi32(lanes, BITS == 8 ? 3 : 2);
    __m512 total[N];
    for (auto& one : total) one = _mm512_setzero_ps();
    for (int64_t block = 0; block * BLOCK < m.columns; block += LANES) {
        const int64_t group = block / per_group;
        const __mmask16 mask = first_lanes(num_groups - group);
        const __m512 sums = _mm512_loadu_ps(x.sums.data() + block), scales = _mm512_loadu_ps(x.scales.data() + block);
        __m512 factors[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const auto of_blocks = [&](const void* base) {
                const int64_t at = (first + n * stride) * num_groups + group;
                return _mm512_permutexvar_ps(group_of_block, load_floats(base, at, m.scale_bits, mask));
            };
            total[n] = _mm512_fmadd_ps(of_blocks(m.biases), sums, total[n]);
            factors[n] = _mm512_mul_ps(of_blocks(m.scales), scales);
        }
#pragma GCC unroll 8
        for (int64_t step = 0; step < STEPS; ++step) {
            const int64_t at = (block + step * BLOCKS) * BLOCK * BITS / 8;
            if (at >= num_bytes) break;
            const Part<BITS> part(x, at);
            const __m512i which = _mm512_add_epi32(block_of_lane, _mm512_set1_epi32(static_cast<int>(step * BLOCKS)));
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const uint8_t* from = weight + n * stride * num_bytes + at;
                const __m512i bytes = load_bytes(from, num_bytes - at);
                fetch_ahead(from);
                total[n] = _mm512_fmadd_ps(part.times(bytes), _mm512_permutexvar_ps(which, factors[n]), total[n]);
            }
        }
    }
    for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(total[n]);
}
#endif

// A row of any format but bfloat16.
NOT_INLINED float dot_one(const Matrix& m, int64_t row, const Vector& x, const float* sums) {
    switch (m.bits) {
        case 32: return dot_float(static_cast<const float*>(m.weight) + row * m.columns, x.plain.data(), m.columns);
        case 8: return dot_groups<8>(m, row, x, sums);
        default: return dot_groups<4>(m, row, x, sums);
    }
}

}  // namespace
