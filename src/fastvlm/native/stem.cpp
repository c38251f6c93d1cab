// The encoder's first two convolutions in one: 3 x 3 of stride 2 over the pixels with GELU, then depthwise 3 x 3 of
// stride 2, perhaps with GELU (AVX-512). What the first makes of a picture of 1024 pixels, 25 million numbers, is never
// in memory.
//
// Letters: P images, H, W pixels, h, w the grid between the two convolutions, C channels.

#include "depthwise.h"

#if HAS_DEPTHWISE

namespace {

constexpr int64_t COLORS = 3, SIDE = 3, STEP = 2;
constexpr int TAPS = SIDE * SIDE * COLORS;
constexpr int COLUMNS = 13;  // of the first convolution made together: five times 13 are the inputs of a whole tile
constexpr int64_t LINE = ((TILE_COLUMNS - 1) * STEP + SIDE - 1) * STEP + SIDE;  // pixels under a whole tile

struct First {              // fields as in fastvlm/model/stem.py
    const Vector* weight;   // (vectors, SIDE, SIDE, COLORS); what is missing to a vector is zero
    const Vector* bias;     // (vectors)
    int64_t height, width;  // of the pictures
};

// COUNT vectors of COLUMNS neighbouring positions; their pixels begin at x, in lines of LINE.
template <int COUNT>
inline void make(const float* x, const Vector* weight, const Vector* bias, const Gelu& by, Vector* line,
                 int64_t apart) {
    __m512 sums[COUNT][COLUMNS];
    for (int v = 0; v < COUNT; ++v)
        for (auto& sum : sums[v]) sum = _mm512_load_ps(bias + v);
    for (int64_t row = 0; row < SIDE; ++row, x += LINE * COLORS, weight += SIDE * COLORS) {
        for (int tap = 0; tap < SIDE * COLORS; ++tap) {
            __m512 weights[COUNT];
            for (int v = 0; v < COUNT; ++v) weights[v] = _mm512_load_ps(weight + v * TAPS + tap);
#pragma GCC unroll 13
            for (int column = 0; column < COLUMNS; ++column) {
                const __m512 pixel = _mm512_set1_ps(x[column * STEP * COLORS + tap]);
#pragma GCC unroll 2
                for (int v = 0; v < COUNT; ++v) sums[v][column] = _mm512_fmadd_ps(pixel, weights[v], sums[v][column]);
            }
        }
    }
    for (int v = 0; v < COUNT; ++v)
        for (int column = 0; column < COLUMNS; ++column)
            _mm512_store_ps(line + v * apart + column, gelu(sums[v][column], by));
}

// Inputs of the second convolution, made of pixels.
template <typename T>
struct Made {
    const First& first;
    const Maps& maps;
    const Gelu& by;

    void operator()(const Span& span, Vector* line) const {
        float pixels[SIDE * LINE * COLORS];
        copy(span, pixels);
        for (int64_t vector = span.first; vector < span.last; vector += 2) {
            const Vector *weight = first.weight + vector * TAPS, *bias = first.bias + vector;
            Vector* own = line + (vector - span.first) * span.count;
            for (int64_t i = 0; i < span.count; i += COLUMNS) {
                const int64_t begin = std::min(i, span.count - COLUMNS);
                const float* x = pixels + begin * STEP * COLORS;
                if (vector + 1 < span.last) {
                    make<2>(x, weight, bias, by, own + begin, span.count);
                } else {
                    make<1>(x, weight, bias, by, own + begin, span.count);
                }
            }
        }
        const int64_t before = std::max(-span.left, int64_t{0}), end = std::min(maps.width - span.left, span.count);
        for (int64_t vector = span.first; vector < span.last; ++vector, line += span.count) {
            std::fill(line, line + before, Vector{});
            std::fill(line + end, line + span.count, Vector{});
        }
    }

    // Lines of pixels as floats, zeros around the picture.
    void copy(const Span& span, float* to) const {
        const int64_t left = span.left * STEP - 1, count = (span.count - 1) * STEP + SIDE;
        const int64_t begin = std::max(-left, int64_t{0}), end = std::min(first.width - left, count);
        for (int64_t i = 0; i < SIDE; ++i, to += LINE * COLORS) {
            std::fill(to, to + count * COLORS, 0.0f);
            const int64_t row = span.row * STEP - 1 + i;
            if (row < 0 || row >= first.height) continue;
            const T* from =
                static_cast<const T*>(maps.from) + ((span.image * first.height + row) * first.width + left) * COLORS;
            for (int64_t at = begin * COLORS; at < end * COLORS; at += LANES) {
                const __mmask16 mask = first_lanes(end * COLORS - at);
                store(to + at, mask, load(from + at, mask));
            }
        }
    }
};

template <typename T>
void run_made(Parallel parallel, int32_t num_threads, const First& first, const Convolution& conv, const Maps& maps,
              const Gelu& by) {
    run<SIDE, STEP, T>(parallel, num_threads, conv, maps, by, Made<T>{first, maps, by});
}

}  // namespace

extern "C" {

// `conv` is the second convolution; `maps` has pixels (P, H, W, COLORS), what the second makes of them, and h and w.
void fastvlm_stem(Parallel parallel, int32_t num_threads, const First* first, const Convolution* conv, const Maps* maps,
                  const Gelu* by) {
    const auto choose = maps->is_half ? run_made<uint16_t> : run_made<float>;
    choose(parallel, num_threads, *first, *conv, *maps, *by);
}

}  // extern "C"

#endif
