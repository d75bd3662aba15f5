// Affine reverse scan over packed segments: GAE, V-trace and discounted returns are choices of its coefficients.

#include "segments.h"
#include "slipstream.h"

namespace {

// Segments that advance side by side: each is one chain of dependent operations, whose latency the others hide.
constexpr int kLanes = 4;

// A segment on its way: the next token, how many are left, and what came before.
struct Lane {
    int64_t token;
    int64_t left;
    double carry;
};

// Advances all lanes by `steps` tokens.
inline void advance(const float* decay, const float* input, float* output, Lane* lanes, int64_t steps) {
    double a = lanes[0].carry, b = lanes[1].carry, c = lanes[2].carry, d = lanes[3].carry;
    int64_t i = lanes[0].token, j = lanes[1].token, k = lanes[2].token, l = lanes[3].token;
    for (int64_t step = 0; step < steps; ++step, --i, --j, --k, --l) {
        // Double, as in the reference: with decay near 1 float32 loses the tail of a long sum.
        a = static_cast<double>(input[i]) + static_cast<double>(decay[i]) * a;
        b = static_cast<double>(input[j]) + static_cast<double>(decay[j]) * b;
        c = static_cast<double>(input[k]) + static_cast<double>(decay[k]) * c;
        d = static_cast<double>(input[l]) + static_cast<double>(decay[l]) * d;
        output[i] = static_cast<float>(a);
        output[j] = static_cast<float>(b);
        output[k] = static_cast<float>(c);
        output[l] = static_cast<float>(d);
    }
    lanes[0] = {i, lanes[0].left - steps, a};
    lanes[1] = {j, lanes[1].left - steps, b};
    lanes[2] = {k, lanes[2].left - steps, c};
    lanes[3] = {l, lanes[3].left - steps, d};
}

inline void finish(const float* decay, const float* input, float* output, Lane lane) {
    for (; lane.left > 0; --lane.left, --lane.token) {
        lane.carry = static_cast<double>(input[lane.token]) + static_cast<double>(decay[lane.token]) * lane.carry;
        output[lane.token] = static_cast<float>(lane.carry);
    }
}

// Scans the segments first .. last - 1; a lane whose segment is done takes the next one.
void scan_segments(const float* decay, const float* input, const int64_t* cu_seqlens, int64_t first, int64_t last,
                   float* output) {
    Lane lanes[kLanes] = {};
    int64_t next = first;
    for (;;) {
        for (Lane& lane : lanes) {
            for (; lane.left == 0 && next < last; ++next) {
                lane = {cu_seqlens[next + 1] - 1, cu_seqlens[next + 1] - cu_seqlens[next], 0.0};
            }
        }
        int64_t steps = lanes[0].left;
        for (const Lane& lane : lanes) steps = lane.left < steps ? lane.left : steps;
        if (steps == 0) break;
        advance(decay, input, output, lanes, steps);
    }
    for (const Lane& lane : lanes) finish(decay, input, output, lane);
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
    const int64_t chunk = workers > 1 ? 4 * kLanes : segments;
    // Dynamic: lengths of trajectories differ by an order of magnitude.
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1 && tokens >= kParallelTokens)
    for (int64_t s = 0; s < segments; s += chunk) {
        scan_segments(decay, input, cu_seqlens, s, s + chunk < segments ? s + chunk : segments, output);
    }
    return SLIPSTREAM_OK;
}
