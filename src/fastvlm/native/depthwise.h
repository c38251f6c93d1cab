// A depthwise convolution of maps whose channels lie last: 3 x 3 or 7 x 7, stride 1 or 2, perhaps with GELU (AVX-512).
//
// Sums of 16 neighbouring outputs of 16 channels stay in registers, and each input that is loaded meets all weights of
// its row there: products are the limit, not loads. A thread goes down a tile of the map with the last lines of inputs
// in a ring in its cache: in float32, zeros around the map, a vector's next to each other. Sums, bias and GELU are
// float32.
//
// Letters: P images, h, w feature grid, C channels.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_DEPTHWISE 1
#include "gelu.h"
#include "lanes.h"
#include "threads.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t WIDE = 16, NARROW = 8;  // neighbouring outputs whose sums are made together
constexpr int64_t TILE_COLUMNS = 32, TILE_VECTORS = 12;
constexpr int64_t PARTS = 4;       // for each thread, if the map has enough
constexpr int64_t LEAST_ROWS = 8;  // of a part: lines around it are read by its neighbours, too

struct alignas(64) Vector {
    float lanes[LANES];
};

struct Convolution {       // fields as in fastvlm/model/depthwise.py
    const Vector* weight;  // (times, vectors, kernel * kernel); what is missing to a vector is zero
    const Vector* bias;    // (times, vectors)
    int64_t channels, kernel, stride;
    int64_t times;  // outputs of each input; the first ones of all inputs come first, then the second ones
    int64_t has_gelu;
};

struct Maps {          // as there
    const void* from;  // (P, h, w, C); for the stem what it is made of
    void* to;          // (P, h', w', times * C)
    int64_t is_half, num_images, height, width;
};

// A part of one row of inputs: positions from `left`, vectors from `first` to `last`.
struct Span {
    int64_t image, row, left, count, first, last;
};

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

inline __m512 load(const uint16_t* from, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }

// To the nearest, ties to even.
inline void store(uint16_t* to, __mmask16 mask, __m512 value) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(value);
    __m256i halves;
    std::memcpy(&halves, &rounded, sizeof halves);
    _mm256_mask_storeu_epi16(to, mask, halves);
#else
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 is_none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i bits_of_all = _mm512_mask_mov_epi32(nearest, is_none, _mm512_set1_epi32(0x7fc00000));
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits_of_all, 16)));
#endif
}

// COLUMNS neighbouring outputs; for rows of the kernel from `begin` to `end`, their first input lies at x[row].
template <int KERNEL, int STRIDE, int COLUMNS, typename Take>
inline void convolve(const std::array<const Vector*, KERNEL>& x, int64_t begin, int64_t end, const Vector* weight,
                     __m512 bias, const Take& take) {
    __m512 sums[COLUMNS];
    for (auto& sum : sums) sum = bias;
    for (int64_t row = begin; row < end; ++row) {
        __m512 by[KERNEL];
#pragma GCC unroll 7
        for (int i = 0; i < KERNEL; ++i) by[i] = _mm512_load_ps(weight + row * KERNEL + i);
#pragma GCC unroll 37
        for (int i = 0; i < STRIDE * (COLUMNS - 1) + KERNEL; ++i) {
            const __m512 input = _mm512_load_ps(x[row] + i);
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column)
                if (const int tap = i - STRIDE * column; tap >= 0 && tap < KERNEL)
                    sums[column] = _mm512_fmadd_ps(input, by[tap], sums[column]);
        }
    }
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column) take(column, sums[column]);
}

// Inputs come from `source`: source(span, line) writes them, `inputs` vectors of a line for each vector of channels.
template <int KERNEL, int STRIDE, typename T, typename Source>
class Tiles {
public:
    Tiles(const Convolution& conv, const Maps& maps, const Gelu& by, int64_t num_threads, Source source)
        : conv(conv), maps(maps), by(by), source(source) {
        height = (maps.height - 1) / STRIDE + 1, width = (maps.width - 1) / STRIDE + 1;
        vectors = (conv.channels + LANES - 1) / LANES;
        groups = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
        across = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
        const int64_t whole = maps.num_images * groups * across, wanted = (PARTS * num_threads + whole - 1) / whole;
        rows = std::max((height + wanted - 1) / wanted, std::min(height, LEAST_ROWS));
        down = (height + rows - 1) / rows;
        const int64_t outputs = (std::min(width, TILE_COLUMNS) + NARROW - 1) / NARROW * NARROW;
        inputs = STRIDE * (outputs - 1) + KERNEL;
    }

    int64_t parts() const { return maps.num_images * down * across * groups; }

    std::vector<Vector> ring() const { return std::vector<Vector>(KERNEL * TILE_VECTORS * inputs); }

    void run(int64_t part, std::vector<Vector>& ring) const {
        const int64_t group = part % groups, column = part / groups % across * TILE_COLUMNS;
        const int64_t top = part / groups / across % down * rows, image = part / groups / across / down;
        const int64_t first = group * TILE_VECTORS, last = std::min(first + TILE_VECTORS, vectors);
        const auto line = [&](int64_t row) { return ring.data() + row % KERNEL * TILE_VECTORS * inputs; };
        int64_t next = std::max(top * STRIDE - MARGIN, int64_t{0});
        for (int64_t row = top; row < std::min(top + rows, height); ++row) {
            const int64_t above = row * STRIDE - MARGIN;
            for (; next < std::min(above + KERNEL, maps.height); ++next)
                source(Span{image, next, column * STRIDE - MARGIN, inputs, first, last}, line(next));
            for (int64_t vector = first; vector < last; ++vector) {
                std::array<const Vector*, KERNEL> x;
                for (int64_t i = 0; i < KERNEL; ++i)
                    x[i] = line(std::max(above + i, int64_t{0})) + (vector - first) * inputs;
                for (int64_t time = 0; time < conv.times; ++time) write(x, image, row, column, vector, time);
            }
        }
    }

private:
    static constexpr int64_t MARGIN = KERNEL / 2;

    // One row of a tile's outputs, `x` the lines they are made of.
    void write(std::array<const Vector*, KERNEL> x, int64_t image, int64_t row, int64_t column, int64_t vector,
               int64_t time) const {
        const int64_t apart = conv.times * conv.channels, which = time * vectors + vector;
        const int64_t above = row * STRIDE - MARGIN;
        const int64_t begin = std::max(-above, int64_t{0}), end = std::min(maps.height - above, int64_t{KERNEL});
        const __mmask16 mask = first_lanes(conv.channels - vector * LANES);
        const Vector* weight = conv.weight + which * KERNEL * KERNEL;
        const __m512 bias = _mm512_load_ps(conv.bias + which);
        T* own = static_cast<T*>(maps.to) + ((image * height + row) * width + column) * apart + time * conv.channels +
                 vector * LANES;
        for (int64_t left = std::min(width - column, TILE_COLUMNS); left > 0;) {
            const auto take = [&](int64_t i, __m512 sum) {
                if (i >= left) return;
                store(own + i * apart, mask, conv.has_gelu ? gelu(sum, by) : sum);
                __builtin_prefetch(own + (i + width) * apart, 1);
            };
            const int64_t size = left > NARROW ? WIDE : NARROW;
            if (left > NARROW) {
                convolve<KERNEL, STRIDE, WIDE>(x, begin, end, weight, bias, take);
            } else {
                convolve<KERNEL, STRIDE, NARROW>(x, begin, end, weight, bias, take);
            }
            for (auto& input : x) input += size * STRIDE;
            own += size * apart, left -= size;
        }
    }

    const Convolution& conv;
    const Maps& maps;
    const Gelu& by;
    const Source source;
    int64_t height, width, vectors, groups, across, rows, down, inputs;
};

// Outputs are made of what `source` gives.
template <int KERNEL, int STRIDE, typename T, typename Source>
void run(Parallel parallel, int32_t num_threads, const Convolution& conv, const Maps& maps, const Gelu& by,
         Source source) {
    const Tiles<KERNEL, STRIDE, T, Source> tiles(conv, maps, by, num_threads, source);
    share(parallel, num_threads, tiles.parts(), [&] {
        return [&, ring = tiles.ring()](int64_t part) mutable { tiles.run(part, ring); };
    });
}

}  // namespace

#else
#define HAS_DEPTHWISE 0
#endif
