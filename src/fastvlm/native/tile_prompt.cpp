// What stands between the products of a prompt in bfloat16: norms and rotations, in float32.
//
// Letters: T tokens, D width, A heads, E width of a head.

#include <algorithm>
#include <cmath>

#include "tiles.h"

#if HAS_TILES

namespace {

constexpr int64_t LANES = 16, TOKENS = 8;  // of a part of the work

template <typename Take>
void each_token(Parallel parallel, int32_t num_threads, int64_t num_tokens, const Take& take) {
    share(parallel, num_threads, (num_tokens + TOKENS - 1) / TOKENS, [&] {
        return [&](int64_t part) {
            for (int64_t t = part * TOKENS; t < std::min(part * TOKENS + TOKENS, num_tokens); ++t) take(t);
        };
    });
}

inline void store_half(uint16_t* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(halves_of(values, values)));
}

}  // namespace

extern "C" {

// RMSNorm (arXiv 1910.07467) of `x` (T, D), D a multiple of 32, to `y`.
void fastvlm_tile_norm(Parallel parallel, int32_t num_threads, const uint16_t* x, const float* weight,
                       int64_t num_tokens, int64_t dim, float epsilon, uint16_t* y) {
    each_token(parallel, num_threads, num_tokens, [&](int64_t t) {
        const uint16_t* own = x + t * dim;
        __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < dim; i += 2 * LANES)
            for (int64_t half = 0; half < 2; ++half) {
                const __m512 some = load_halves(own + i + half * LANES);
                squares[half] = _mm512_fmadd_ps(some, some, squares[half]);
            }
        const float total = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
        const __m512 factor = _mm512_set1_ps(1 / std::sqrt(total / static_cast<float>(dim) + epsilon));
        const auto normed = [&](int64_t i) {
            return _mm512_mul_ps(_mm512_mul_ps(load_halves(own + i), factor), _mm512_loadu_ps(weight + i));
        };
        for (int64_t i = 0; i < dim; i += 2 * LANES) store_halves(y + t * dim + i, normed(i), normed(i + LANES));
    });
}

// Turn the pairs (x[i], x[i + E / 2]) of each head of `x` (T, A, E), in place, by the angle of its token (arXiv
// 2104.09864): `cosine` and `sine` (T, E), E a multiple of 32, whose halves are equal.
void fastvlm_tile_rotate(Parallel parallel, int32_t num_threads, uint16_t* x, const uint16_t* cosine,
                         const uint16_t* sine, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
    each_token(parallel, num_threads, num_tokens, [&](int64_t t) {
        const int64_t half = head_dim / 2;
        for (int64_t i = 0; i < half; i += LANES) {
            const __m512 c = load_halves(cosine + t * head_dim + i), s = load_halves(sine + t * head_dim + i);
            for (int64_t head = 0; head < num_heads; ++head) {
                uint16_t* own = x + (t * num_heads + head) * head_dim + i;
                const __m512 left = load_halves(own), right = load_halves(own + half);
                store_half(own, _mm512_fnmadd_ps(right, s, _mm512_mul_ps(left, c)));
                store_half(own + half, _mm512_fmadd_ps(left, s, _mm512_mul_ps(right, c)));
            }
        }
    });
}

}  // extern "C"

#endif
