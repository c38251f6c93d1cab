// The two wide layers of a ConvFFN in bfloat16 and the skip around them, in tiles of AMX; what lies between them is
// never written to memory.
//
// Positions go through in blocks whose hidden layer stays in the second cache of a core, while the weights pass by.
// GELU of one block of sums is computed while the tiles multiply the next one. Sums, bias, GELU and skip are float32.
//
// Letters: R positions of a block, K inputs and N outputs of a layer.

#include <algorithm>

#include "tiles.h"

#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include "gelu.h"

namespace {

constexpr int64_t HIDDEN_BYTES = 1 << 20, LEAST_POSITIONS = 128;
constexpr int64_t LANES = 16;

struct Layer {               // fields as in fastvlm/model/tile_ffn.py
    const uint16_t* weight;  // (N / SIDE, K / DEPTH, DEPTH / 2, SIDE, 2)
    const float* bias;       // (N)
    int64_t inputs, outputs;
};

// What one thread needs.
class Block {
public:
    Block(const Layer& first, const Layer& second, const Gelu& by, int64_t size)
        : first(first),
          second(second),
          by(by),
          hidden(Room<Block, uint16_t>::of(size * first.outputs + BLOCK_ROWS * first.inputs)),
          rest(hidden + size * first.outputs) {}

    void run(const uint16_t* x, uint16_t* total, int64_t count) {
        const int64_t whole = count / BLOCK_ROWS * BLOCK_ROWS;
        if (whole < count) {  // what is missing to a block is zero
            std::fill(rest, rest + BLOCK_ROWS * first.inputs, 0);
            std::copy(x + whole * first.inputs, x + count * first.inputs, rest);
        }
        const auto rows = [&](int64_t row) { return row < whole ? x + row * first.inputs : rest; };
        widen(rows, count);
        narrow(total, count);
    }

private:
    template <typename Rows>
    void widen(const Rows& rows, int64_t count) {
        const int64_t steps = first.inputs / DEPTH, apart = first.inputs * SIDE, width = first.outputs;
        const int64_t lines = BLOCK_ROWS / steps + (BLOCK_ROWS % steps != 0);  // of the last sums, in each step
        int64_t now = 0, last_row = 0, last_out = -1;
        const auto finish = [&](int64_t begin, int64_t end) {
            const float* from = sums[1 - now];
            const __m512 left = _mm512_loadu_ps(first.bias + last_out),
                         right = _mm512_loadu_ps(first.bias + last_out + LANES);
            for (int64_t line = begin; line < end; ++line) {
                const float* own = from + line * BLOCK_COLUMNS;
                store_halves(hidden + (last_row + line) * width + last_out,
                             gelu(_mm512_add_ps(_mm512_load_ps(own), left), by),
                             gelu(_mm512_add_ps(_mm512_load_ps(own + LANES), right), by));
            }
        };
        for (int64_t out = 0; out < width; out += BLOCK_COLUMNS)
            for (int64_t row = 0; row < count; row += BLOCK_ROWS) {
                const auto between = [&](int64_t step) {
                    if (last_out >= 0) finish(step * lines, std::min(step * lines + lines, BLOCK_ROWS));
                };
                multiply_block<2>(rows(row), first.inputs, first.weight + out / SIDE * apart, apart, steps, false,
                                  sums[now], between);
                last_row = row, last_out = out, now = 1 - now;
            }
        finish(0, BLOCK_ROWS);
    }

    void narrow(uint16_t* total, int64_t count) {
        const int64_t steps = second.inputs / DEPTH, apart = second.inputs * SIDE, width = second.outputs;
        for (int64_t out = 0; out < width; out += BLOCK_COLUMNS)
            for (int64_t row = 0; row < count; row += BLOCK_ROWS) {
                multiply_block<2>(hidden + row * second.inputs, second.inputs, second.weight + out / SIDE * apart,
                                  apart, steps, false, sums[0], [](int64_t) {});
                const __m512 left = _mm512_loadu_ps(second.bias + out),
                             right = _mm512_loadu_ps(second.bias + out + LANES);
                for (int64_t line = 0; line < std::min(BLOCK_ROWS, count - row); ++line) {
                    uint16_t* to = total + (row + line) * width + out;
                    const float* own = sums[0] + line * BLOCK_COLUMNS;
                    store_halves(
                        to, _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(own), left), load_halves(to)),
                        _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(own + LANES), right), load_halves(to + LANES)));
                }
            }
    }

    const Layer first, second;
    const Gelu by;
    uint16_t *hidden, *rest;
    alignas(64) float sums[2][BLOCK_ROWS * BLOCK_COLUMNS];
};

}  // namespace

extern "C" {

// Ask the system to let this program use tiles; whether it does.
int fastvlm_has_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Add what a ConvFFN's wide layers make of `x` (P, C) to `total` (P, C).
void fastvlm_tile_ffn(Parallel parallel, int32_t num_threads, const Layer* first, const Layer* second, const Gelu* by,
                      const uint16_t* x, uint16_t* total, int64_t num_positions) {
    const auto whole = [](int64_t count) { return std::max(count / BLOCK_ROWS, int64_t{1}) * BLOCK_ROWS; };
    const int64_t most = std::max(whole(HIDDEN_BYTES / (2 * first->outputs)), LEAST_POSITIONS);
    const int64_t size = std::min(most, whole((num_positions + num_threads - 1) / num_threads + BLOCK_ROWS - 1));
    share(parallel, num_threads, (num_positions + size - 1) / size, [&] {
        return [&, shapes = TileShapes(), block = Block(*first, *second, *by, size)](int64_t part) mutable {
            const int64_t begin = part * size, count = std::min(size, num_positions - begin);
            block.run(x + begin * first->inputs, total + begin * first->inputs, count);
        };
    });
}

}  // extern "C"

#else

extern "C" int fastvlm_has_tiles() { return 0; }

#endif
