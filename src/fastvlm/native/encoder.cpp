// The two wide layers of a ConvFFN, weights and activations as bytes, and the skip around them.
//
// Positions go through in blocks whose hidden layer stays in the cache. Each position's activations are bytes with a
// scale and a zero of their own, taken from their range; sums of products are exact. Bias, GELU and skip are float32.
//
// Letters: R positions of a block, K inputs and N outputs of a layer.

#include <algorithm>
#include <cmath>

#include "bytes.h"

#if HAS_BYTE_PRODUCTS
#include "gelu.h"

namespace {

constexpr int64_t BLOCK = 4 * TILE;  // positions: they share what is read of the weights
constexpr int LANES = 16;
constexpr float STEPS = 255;

struct Layer {              // fields as in fastvlm/model/byte_ffn.py; padded to whole panels
    const int8_t* weight;   // (N / PANEL_WIDTH, K / 4, PANEL_WIDTH, 4)
    const float* scales;    // (N): weight = number * scale
    const float* sums;      // (N): of an output's numbers
    const float* bias;      // (N)
    int64_t inputs, outputs;
};

// A row's activations are (byte - zero) * scale.
struct Range {
    float scale, zero;
};

inline Range range(__m512 low, __m512 high, __m512 strange) {
    const float least = std::min(_mm512_reduce_min_ps(low), 0.0f), most = std::max(_mm512_reduce_max_ps(high), 0.0f);
    const float scale = std::max((most - least) / STEPS, 1e-30f);
    // NaN and infinity, which bytes cannot hold, become NaN for all that is made of the row
    return {scale + _mm512_reduce_add_ps(strange), std::nearbyint(-least / scale)};
}

// Bytes of one row of K floats.
inline void write_bytes(const float* x, int64_t size, Range to, int8_t* out) {
    const __m512 inverse = _mm512_set1_ps(1 / to.scale), zero = _mm512_set1_ps(to.zero);
    for (int64_t i = 0; i < size; i += LANES) {
        const __mmask16 mask = first_lanes(size - i);
        const __m512 scaled = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse, zero);
        const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(scaled), _mm512_setzero_si512());
        _mm512_mask_cvtusepi32_storeu_epi8(out + i, mask, whole);
    }
}

// What one thread needs for a block.
struct Block {
    std::vector<int8_t> given, bytes;
    std::vector<float> hidden;
    Range ranges[BLOCK];
    __m512 low[BLOCK], high[BLOCK], strange[BLOCK];

    Block(const Layer& first, const Layer& second)
        : given(BLOCK * first.inputs), bytes(BLOCK * second.inputs), hidden(BLOCK * padded(first.outputs)) {}

    static int64_t padded(int64_t outputs) { return (outputs + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH; }

    void note(int64_t row, __mmask16 mask, __m512 x) {
        low[row] = _mm512_mask_min_ps(low[row], mask, low[row], x);
        high[row] = _mm512_mask_max_ps(high[row], mask, high[row], x);
        strange[row] = _mm512_mask3_fmadd_ps(x, _mm512_setzero_ps(), strange[row], mask);
    }

    void forget() {
        for (int64_t row = 0; row < BLOCK; ++row) low[row] = high[row] = strange[row] = _mm512_setzero_ps();
    }

    void run(const Layer& first, const Layer& second, const Gelu& by, const float* x, float* total, int64_t count) {
        const int64_t dim = first.inputs, wide = padded(first.outputs), tiles = (count + TILE - 1) / TILE;
        forget();
        for (int64_t row = 0; row < count; ++row) {
            const float* own = x + row * dim;
            for (int64_t i = 0; i < dim; i += LANES) {
                const __mmask16 mask = first_lanes(dim - i);
                note(row, mask, _mm512_maskz_loadu_ps(mask, own + i));
            }
            ranges[row] = range(low[row], high[row], strange[row]);
            write_bytes(own, dim, ranges[row], given.data() + row * dim);
        }
        forget();
        each_tile(first, given.data(), tiles, [&](int64_t row, int64_t out, __m512 sum) {
            const __m512 value = gelu(scaled(first, ranges[row], out, sum), by);
            _mm512_storeu_ps(hidden.data() + row * wide + out, value);
            note(row, 0xffff, value);
        });
        for (int64_t row = 0; row < count; ++row) {
            ranges[row] = range(low[row], high[row], strange[row]);
            write_bytes(hidden.data() + row * wide, second.inputs, ranges[row], bytes.data() + row * second.inputs);
        }
        each_tile(second, bytes.data(), tiles, [&](int64_t row, int64_t out, __m512 sum) {
            const int64_t left = second.outputs - out;
            if (row >= count || left <= 0) return;
            const __mmask16 mask = first_lanes(left);
            float* to = total + row * second.outputs + out;
            const __m512 value = scaled(second, ranges[row], out, sum);
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value));
        });
    }

    // For each position and LANES outputs: take(position, output, sum).
    template <typename Take>
    static void each_tile(const Layer& layer, const int8_t* x, int64_t tiles, const Take& take) {
        __m512i sums[TILE][2];
        for (int64_t n = 0; n < layer.outputs; n += PANEL_WIDTH)
            for (int64_t begin = 0; begin < tiles * TILE; begin += TILE) {
                multiply_tile<false>(x + begin * layer.inputs, layer.inputs, layer.weight + n * layer.inputs,
                                     layer.inputs, sums);
                for (int64_t row = 0; row < TILE; ++row)
                    for (int64_t half = 0; half < 2; ++half)
                        take(begin + row, n + half * LANES, _mm512_cvtepi32_ps(sums[row][half]));
            }
    }

    static __m512 scaled(const Layer& layer, Range range, int64_t out, __m512 sum) {
        const __m512 centred =
            _mm512_fnmadd_ps(_mm512_set1_ps(range.zero), _mm512_loadu_ps(layer.sums + out), sum);
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(range.scale), _mm512_loadu_ps(layer.scales + out));
        return _mm512_fmadd_ps(centred, scale, _mm512_loadu_ps(layer.bias + out));
    }
};

}  // namespace

extern "C" {

int fastvlm_multiplies_bytes() { return 1; }

// Add what a ConvFFN's wide layers make of `x` (P, C) to `total` (P, C).
void fastvlm_ffn(Parallel parallel, int32_t num_threads, const Layer* first, const Layer* second, const Gelu* by,
                 const float* x, float* total, int64_t num_positions) {
    share(parallel, num_threads, (num_positions + BLOCK - 1) / BLOCK, [&] {
        return [&, block = Block(*first, *second)](int64_t part) mutable {
            const int64_t begin = part * BLOCK, count = std::min(BLOCK, num_positions - begin);
            block.run(*first, *second, *by, x + begin * first->inputs, total + begin * second->outputs, count);
        };
    });
}

}  // extern "C"

#else

extern "C" int fastvlm_multiplies_bytes() { return 0; }

#endif
