// Affine reverse scan over packed segments: GAE, V-trace and discounted returns are choices of its coefficients.

#include "slipstream.h"

namespace {

bool segments_are_valid(const int64_t* cu_seqlens, int64_t segments, int64_t tokens) {
    if (cu_seqlens[0] != 0 || cu_seqlens[segments] != tokens) return false;
    for (int64_t s = 0; s < segments; ++s) {
        if (cu_seqlens[s + 1] < cu_seqlens[s]) return false;
    }
    return true;
}

}  // namespace

extern "C" int32_t slipstream_segment_scan_f32(const float* decay, const float* input, const int64_t* cu_seqlens,
                                               int64_t segments, int64_t tokens, int32_t threads, float* output) {
    if (segments < 0 || tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (cu_seqlens == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (tokens > 0 && (decay == nullptr || input == nullptr || output == nullptr)) return SLIPSTREAM_NULL_POINTER;
    if (!segments_are_valid(cu_seqlens, segments, tokens)) return SLIPSTREAM_BAD_SEGMENTS;

    const int workers = threads < 1 ? 1 : threads;
    // Below this many tokens a thread team costs more than the scan.
    constexpr int64_t kParallelTokens = 1 << 15;
    (void)workers;
    (void)kParallelTokens;
    // Dynamic: lengths of trajectories differ by an order of magnitude.
#pragma omp parallel for schedule(dynamic, 4) num_threads(workers) if (workers > 1 && tokens >= kParallelTokens)
    for (int64_t s = 0; s < segments; ++s) {
        double carry = 0.0;
        for (int64_t t = cu_seqlens[s + 1] - 1; t >= cu_seqlens[s]; --t) {
            // Double, as in the reference: with decay near 1 float32 loses the tail of a long sum.
            carry = static_cast<double>(input[t]) + static_cast<double>(decay[t]) * carry;
            output[t] = static_cast<float>(carry);
        }
    }
    return SLIPSTREAM_OK;
}
