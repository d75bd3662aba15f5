// Advantages and returns of packed segments in one backward pass over their tokens. Each is the affine reverse scan of
// segment_scan.cpp, whose coefficients are made on the way; unsampled tokens carry everything across.

#include "segments.h"
#include "slipstream.h"

namespace {

// Below this many tokens a thread team costs more than the pass.
constexpr int64_t kParallelTokens = 1 << 14;
constexpr int64_t kSegmentsAtOnce = 8;

// Not std::min: like PyTorch's clamp it lets NaN through.
inline float at_most(float value, float cap) { return value > cap ? cap : value; }

// What later steps of a segment hand to the one before.
struct Later {
    double scan;
    float value, target;
    bool none;
};

struct Step {
    float input, decay, rho;
};

template <int32_t kEstimator>
inline Step step_of(const slipstream_estimator& how, const Later& later, float value, float reward, float ratio) {
    switch (kEstimator) {
        case SLIPSTREAM_GAE:
            return {(reward + how.discount * later.value) - value, how.decay, 1.0f};
        case SLIPSTREAM_TD_LAMBDA: {
            // After the last step the bootstrap value stands for the return too, so that it counts whole.
            const float share = (later.none ? how.trace : 0.0f) + how.rest;
            return {reward + (how.discount * share) * later.value, how.decay, 1.0f};
        }
        case SLIPSTREAM_VTRACE: {
            const float rho = at_most(ratio, how.rho_cap);
            return {rho * ((reward + how.discount * later.value) - value), how.decay * at_most(ratio, how.trace_cap), rho};
        }
        default:
            return {reward + how.discount * (later.none ? later.value : 0.0f), how.decay, 1.0f};
    }
}

template <int32_t kEstimator>
void estimate(const slipstream_steps& in, const slipstream_estimator& how, int64_t segment, float* advantage,
              float* target) {
    constexpr bool kValues = kEstimator != SLIPSTREAM_RETURN, kRatios = kEstimator == SLIPSTREAM_VTRACE;
    constexpr bool kAdvantages = kEstimator == SLIPSTREAM_GAE || kEstimator == SLIPSTREAM_VTRACE;
    const float bootstrap = in.bootstrap == nullptr ? 0.0f : in.bootstrap[segment];
    Later later = {0.0, bootstrap, bootstrap, true};
    for (int64_t t = in.cu_seqlens[segment + 1] - 1; t >= in.cu_seqlens[segment]; --t) {
        const bool sampled = in.sampled[t] != 0;
        const float value = kValues ? in.value[t] : 0.0f, reward = in.reward[t];
        const Step step = step_of<kEstimator>(how, later, value, reward, kRatios ? in.ratio[t] : 1.0f);
        // Double: with decay near 1 float32 loses the tail of a long sum.
        const double scan = static_cast<double>(step.input) + static_cast<double>(step.decay) * later.scan;
        const float scanned = static_cast<float>(scan);
        const float aim = kAdvantages ? value + scanned : scanned;
        if (kAdvantages) {
            const float gain =
                kRatios ? step.rho * ((reward + how.discount * later.target) - value) : scanned;
            advantage[t] = sampled ? gain : 0.0f;
        }
        target[t] = sampled ? aim : 0.0f;
        // Selected, not branched on: where sampled tokens stand is hard to predict.
        later.scan = sampled ? scan : later.scan;
        later.value = sampled ? value : later.value;
        later.target = sampled ? aim : later.target;
        later.none = later.none && !sampled;
    }
}

using Estimate = void (*)(const slipstream_steps&, const slipstream_estimator&, int64_t, float*, float*);

Estimate estimate_of(int32_t kind) {
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

bool arrays_are_there(const slipstream_steps& in, int32_t kind, const float* advantage, const float* target) {
    const bool values = kind == SLIPSTREAM_RETURN || in.value != nullptr;
    const bool ratios = kind != SLIPSTREAM_VTRACE || in.ratio != nullptr;
    const bool outputs = target != nullptr && (kind == SLIPSTREAM_TD_LAMBDA || kind == SLIPSTREAM_RETURN ||
                                               advantage != nullptr);
    return values && ratios && outputs && in.reward != nullptr && in.sampled != nullptr;
}

}  // namespace

extern "C" int32_t slipstream_estimate_f32(const slipstream_steps* steps, const slipstream_estimator* estimator,
                                           int32_t threads, float* advantage, float* target) {
    if (steps == nullptr || estimator == nullptr || steps->cu_seqlens == nullptr) return SLIPSTREAM_NULL_POINTER;
    const slipstream_steps& in = *steps;
    if (in.segments < 0 || in.tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (in.tokens > 0 && !arrays_are_there(in, estimator->kind, advantage, target)) return SLIPSTREAM_NULL_POINTER;
    if (!segments_are_valid(in.cu_seqlens, in.segments, in.tokens)) return SLIPSTREAM_BAD_SEGMENTS;
    const Estimate run = estimate_of(estimator->kind);
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
    // Dynamic: lengths of trajectories differ by an order of magnitude.
#pragma omp parallel for schedule(dynamic, kSegmentsAtOnce) num_threads(workers) \
    if (workers > 1 && in.tokens >= kParallelTokens)
    for (int64_t s = 0; s < in.segments; ++s) run(in, *estimator, s, advantage, target);
    return SLIPSTREAM_OK;
}
