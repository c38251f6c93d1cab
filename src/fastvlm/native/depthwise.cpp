// Depthwise convolutions of a map in memory; see depthwise.h. Memory is fetched ahead, and as it lies there, many
// channels of a position at once.

#include "depthwise.h"

#if HAS_DEPTHWISE

namespace {

// Inputs as they lie in memory; those of the row that is read next are fetched.
template <int STRIDE, typename T>
struct Stored {
    const Maps& maps;
    int64_t channels;

    void operator()(const Span& span, Vector* line) const {
        const int64_t whole = std::min(span.last, channels / LANES), ahead = STRIDE * maps.width * channels;
        const __mmask16 mask = first_lanes(channels - whole * LANES);
        const T* map = static_cast<const T*>(maps.from) + (span.image * maps.height + span.row) * maps.width * channels;
        for (int64_t i = 0; i < span.count; ++i, ++line) {
            const T* own = map + (span.left + i) * channels;
            const bool is_inside = span.left + i >= 0 && span.left + i < maps.width;
            Vector* to = line;
            for (int64_t vector = span.first; vector < span.last; ++vector, to += span.count) {
                if (!is_inside) {
                    _mm512_store_ps(to, _mm512_setzero_ps());
                    continue;
                }
                __builtin_prefetch(own + ahead + vector * LANES, 0, 2);
                _mm512_store_ps(to, load(own + vector * LANES, vector < whole ? 0xffff : mask));
            }
        }
    }
};

template <int KERNEL, int STRIDE, typename T>
void run_stored(Parallel parallel, int32_t num_threads, const Convolution& conv, const Maps& maps, const Gelu& by) {
    run<KERNEL, STRIDE, T>(parallel, num_threads, conv, maps, by, Stored<STRIDE, T>{maps, conv.channels});
}

template <typename T>
constexpr auto runs(int64_t kernel, int64_t stride) {
    if (kernel == 3) return stride == 1 ? run_stored<3, 1, T> : run_stored<3, 2, T>;
    return stride == 1 ? run_stored<7, 1, T> : run_stored<7, 2, T>;
}

}  // namespace

extern "C" {

int fastvlm_has_depthwise() { return 1; }

// Maps are both float32 or both bfloat16.
void fastvlm_depthwise(Parallel parallel, int32_t num_threads, const Convolution* conv, const Maps* maps,
                       const Gelu* by) {
    const auto choose = maps->is_half ? runs<uint16_t> : runs<float>;
    choose(conv->kernel, conv->stride)(parallel, num_threads, *conv, *maps, *by);
}

}  // extern "C"

#else

extern "C" int fastvlm_has_depthwise() { return 0; }

#endif
