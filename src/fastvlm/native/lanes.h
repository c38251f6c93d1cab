// Vectors of 16 floats, whole or in part.

#pragma once

#include <cstdint>
#include <immintrin.h>

namespace {

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1 << count) - 1);
}

}  // namespace
