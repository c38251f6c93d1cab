// GELU by a polynomial, which takes half a cycle a number; an error function would take two.

#pragma once

#include <immintrin.h>

namespace {

constexpr int TERMS = 13;

struct Gelu {  // relu(x) - p(min(|x|, end)), p a polynomial in 2 |x| / end - 1, highest power first
    float end;
    float terms[TERMS];
};

inline __m512 gelu(__m512 x, const Gelu& by) {
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(by.end));
    const __m512 at = _mm512_fmsub_ps(size, _mm512_set1_ps(2 / by.end), _mm512_set1_ps(1));
    __m512 value = _mm512_set1_ps(by.terms[0]);
    for (int i = 1; i < TERMS; ++i) value = _mm512_fmadd_ps(value, at, _mm512_set1_ps(by.terms[i]));
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), value);  // in this order NaN stays NaN
}

}  // namespace
