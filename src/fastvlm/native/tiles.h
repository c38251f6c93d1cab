// Products of bfloat16 in the tiles of AMX: 16 rows of 64 bytes, 16,384 products in one instruction.
//
// The left factor lies row by row, as it is; the right one is laid out in tiles of 32 inputs and 16 columns, in which
// two neighbouring inputs of a column are neighbours.

#pragma once

#include <cstdint>
#include <cstring>

#include "bytes.h"

#if HAS_BYTE_PRODUCTS && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#if HAS_TILES

namespace {

constexpr int64_t SIDE = 16;   // rows of a tile, and columns of the right factor and of sums
constexpr int64_t DEPTH = 32;  // inputs in a tile
constexpr int64_t TILE_SIZE = SIDE * DEPTH;
constexpr int64_t BLOCK_ROWS = 2 * SIDE, BLOCK_COLUMNS = 2 * SIDE;  // sums that fill four tiles
constexpr int64_t BLOCK_SIZE = BLOCK_ROWS * BLOCK_COLUMNS;

// Keeps the compiler from moving what is written and read past instructions on tiles, whose memory it does not see.
inline void settle(const void* what = nullptr) { asm volatile("" ::"r"(what) : "memory"); }

// The shapes of all eight tiles, as long as this lives; then what they were before comes back.
class TileShapes {
public:
    TileShapes() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } ours;
        _tile_storeconfig(before);
        settle(&ours);
        _tile_loadconfig(&ours);
    }
    ~TileShapes() {
        settle(before);
        if (before[0]) {
            _tile_loadconfig(before);
        } else {
            _tile_release();
        }
    }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;

private:
    alignas(64) uint8_t before[64];
};

// Room that a thread keeps from call to call for a class: the system must clear each page of what is fresh.
template <typename Owner, typename Kind>
class Room {
public:
    static Kind* of(int64_t size) {
        thread_local std::vector<Line> kept;
        const size_t lines = (size * sizeof(Kind) + sizeof(Line) - 1) / sizeof(Line);
        if (kept.size() < lines) kept.resize(lines);
        return reinterpret_cast<Kind*>(kept.data());
    }

private:
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
};

// Sums (ROWS by 2 tiles, lines of BLOCK_COLUMNS) of `left`, rows `stride` numbers apart, times `right`, whose columns
// of tiles are `apart` numbers apart; added to `sums` if `is_more`, or written there. Between steps of DEPTH inputs,
// between(step).
template <int ROWS, typename Between>
inline void multiply_block(const uint16_t* left, int64_t stride, const uint16_t* right, int64_t apart, int64_t steps,
                           bool is_more, float* sums, const Between& between) {
    const int64_t bytes = stride * sizeof *left, line = BLOCK_COLUMNS * sizeof *sums;
    settle();
    if (is_more) {
        _tile_loadd(0, sums, line);
        _tile_loadd(1, sums + SIDE, line);
        if constexpr (ROWS == 2) {
            _tile_loadd(2, sums + SIDE * BLOCK_COLUMNS, line);
            _tile_loadd(3, sums + SIDE * BLOCK_COLUMNS + SIDE, line);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, left + step * DEPTH, bytes);
        _tile_loadd(6, right + step * TILE_SIZE, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (ROWS == 2) {
            _tile_loadd(5, left + SIDE * stride + step * DEPTH, bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        _tile_loadd(7, right + apart + step * TILE_SIZE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (ROWS == 2) _tile_dpbf16ps(3, 5, 7);
        between(step);
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + SIDE, line);
    if constexpr (ROWS == 2) {
        _tile_stored(2, sums + SIDE * BLOCK_COLUMNS, line);
        _tile_stored(3, sums + SIDE * BLOCK_COLUMNS + SIDE, line);
    }
    settle();
}

// Two vectors of floats as one of bfloat16, to the nearest.
inline __m512i halves_of(__m512 first, __m512 second) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    __m512i halves;
    std::memcpy(&halves, &both, sizeof halves);
    return halves;
}

inline void store_halves(uint16_t* to, __m512 first, __m512 second) {
    _mm512_storeu_si512(to, halves_of(first, second));
}

inline __m512 load_halves(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Rows become columns.
inline void transpose(__m512i (&rows)[SIDE]) {
    __m512i half[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    }
}

}  // namespace
#endif
