// Products of bytes, many rows with many: what prefill and the encoder spend their time on (AVX512-VNNI).
//
// Letters: K inputs and N outputs of a layer.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BYTE_PRODUCTS 1
#else
#define HAS_BYTE_PRODUCTS 0
#endif

#if HAS_BYTE_PRODUCTS
#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t TILE = 12, PANEL_WIDTH = 32;  // rows and outputs whose sums fill the registers, 24 of 32

// Sums of a tile: TILE rows of bytes, `stride` apart, times a panel (K / 4, PANEL_WIDTH, 4). One of both is signed:
// the rows or, by default, the panel. Apart from what is made of the sums, so that they stay in registers.
template <bool SIGNED_ROWS>
__attribute__((noinline)) void multiply_tile(const int8_t* rows, int64_t stride, const int8_t* panel, int64_t inputs,
                                             __m512i (*out)[2]) {
    __m512i sums[TILE][2];
    for (auto& row : sums) row[0] = row[1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4) {
        const __m512i first = _mm512_loadu_si512(panel + k * PANEL_WIDTH);
        const __m512i second = _mm512_loadu_si512(panel + k * PANEL_WIDTH + 64);
#pragma GCC unroll 12
        for (int64_t row = 0; row < TILE; ++row) {
            int32_t four;
            std::memcpy(&four, rows + row * stride + k, sizeof four);
            const __m512i same = _mm512_set1_epi32(four);
            if constexpr (SIGNED_ROWS) {
                sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], first, same);
                sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], second, same);
            } else {
                sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], same, first);
                sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], same, second);
            }
        }
    }
#pragma GCC unroll 12
    for (int64_t row = 0; row < TILE; ++row) {
        out[row][0] = sums[row][0];
        out[row][1] = sums[row][1];
    }
}

}  // namespace
#endif
