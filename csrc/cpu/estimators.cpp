// Advantages and returns of packed segments in one backward pass over their tokens. Each is the affine reverse scan of
// segment_scan.cpp, whose coefficients are made on the way; unsampled tokens carry everything across.

#include "estimator_steps.h"
#include "segments.h"

using namespace slipstream;

namespace {

// Below this many tokens a thread team costs more than the pass.
constexpr int64_t kParallelTokens = 1 << 14;
constexpr int64_t kSegmentsAtOnce = 8;

template <int32_t kEstimator>
void estimate(const slipstream_steps& in, const slipstream_estimator& how, int64_t segment, float* advantage,
              float* target) {
    using Need = Needs<kEstimator>;
    // Double: with decay near 1 float32 loses the tail of a long sum.
    auto later = after_the_end<double>(in.bootstrap == nullptr ? 0.0f : in.bootstrap[segment]);
    for (int64_t t = in.cu_seqlens[segment + 1] - 1; t >= in.cu_seqlens[segment]; --t) {
        const Estimate made =
            take_step<kEstimator>(how, later, in.sampled[t] != 0, Need::kValues ? in.value[t] : 0.0f, in.reward[t],
                                  Need::kRatios ? in.ratio[t] : 1.0f);
        if (Need::kAdvantages) advantage[t] = made.advantage;
        target[t] = made.target;
    }
}

using Pass = void (*)(const slipstream_steps&, const slipstream_estimator&, int64_t, float*, float*);

Pass pass_of(int32_t kind) {
    switch (kind) {
        case SLIPSTREAM_GAE:
            return estimate<SLIPSTREAM_GAE>;
        case SLIPSTREAM_TD_LAMBDA:
            return estimate<SLIPSTREAM_TD_LAMBDA>;
        case SLIPSTREAM_VTRACE:
            return estimate<SLIPSTREAM_VTRACE>;
        default:
            return estimate<SLIPSTREAM_RETURN>;
    }
}

}  // namespace

extern "C" int32_t slipstream_estimate_f32(const slipstream_steps* steps, const slipstream_estimator* estimator,
                                           int32_t threads, float* advantage, float* target) {
    if (steps == nullptr || estimator == nullptr || steps->cu_seqlens == nullptr) return SLIPSTREAM_NULL_POINTER;
    const slipstream_steps& in = *steps;
    if (in.segments < 0 || in.tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (in.tokens > 0 && !arrays_are_there(in, estimator->kind, advantage, target)) return SLIPSTREAM_NULL_POINTER;
    if (!segments_are_valid(in.cu_seqlens, in.segments, in.tokens)) return SLIPSTREAM_BAD_SEGMENTS;
    const Pass run = pass_of(estimator->kind);
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
    // Dynamic: lengths of trajectories differ by an order of magnitude.
#pragma omp parallel for schedule(dynamic, kSegmentsAtOnce) num_threads(workers) \
    if (workers > 1 && in.tokens >= kParallelTokens)
    for (int64_t s = 0; s < in.segments; ++s) run(in, *estimator, s, advantage, target);
    return SLIPSTREAM_OK;
}
