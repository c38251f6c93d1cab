// Exponentials of 16 floats: 2^n times a polynomial of what is left, to 1e-7.

#pragma once

#include <immintrin.h>

namespace {

// 2^x, and 0 for 2^-126 and less, which the processor would take hundreds of cycles for.
inline __m512 power_of_two(__m512 x) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // or NaN, which stays
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);    // x - floor(x)
    __m512 sum = _mm512_set1_ps(0.00187757668f);
    for (const float term : {0.00898934014f, 0.0558263179f, 0.240153617f, 0.693153073f, 0.999999925f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
    return _mm512_maskz_scalef_ps(is_normal, sum, x);  // sum * 2^floor(x)
}

inline __m512 silu(__m512 x) {
    const __m512 exponential = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));  // of -x
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential));
}

}  // namespace
