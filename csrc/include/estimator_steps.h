// One step of an estimator of advantages, for CPU and CUDA code; formulas: advantage.py.

#ifndef SLIPSTREAM_ESTIMATOR_STEPS_H
#define SLIPSTREAM_ESTIMATOR_STEPS_H

#include "slipstream.h"

#ifdef __CUDACC__
#define SLIPSTREAM_STEP __host__ __device__ __forceinline__
#else
#define SLIPSTREAM_STEP inline
#endif

namespace slipstream {

template <int32_t kEstimator>
struct Needs {
    static constexpr bool kValues = kEstimator != SLIPSTREAM_RETURN;
    static constexpr bool kRatios = kEstimator == SLIPSTREAM_VTRACE;
    static constexpr bool kAdvantages = kEstimator == SLIPSTREAM_GAE || kEstimator == SLIPSTREAM_VTRACE;
};

// Not std::min: like PyTorch's clamp it lets NaN through.
SLIPSTREAM_STEP float at_most(float value, float cap) { return value > cap ? cap : value; }

// What later steps of a segment hand to the one before. none: there are none, and value and target are the bootstrap's.
template <typename Scan>
struct Later {
    Scan scan;
    float value, target;
    bool none;
};

template <typename Scan>
SLIPSTREAM_STEP Later<Scan> after_the_end(float bootstrap) {
    return {Scan{0}, bootstrap, bootstrap, true};
}

// The scan of a step is input + decay times the scan of the next one.
struct Step {
    float input, decay, rho;
};

template <int32_t kEstimator, typename Scan>
SLIPSTREAM_STEP Step step_of(const slipstream_estimator& how, const Later<Scan>& later, float value, float reward,
                             float ratio) {
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

// How the input of a step that is not the last one grows with the value of the next.
template <int32_t kEstimator>
SLIPSTREAM_STEP float slope_of(const slipstream_estimator& how, const Step& step) {
    if (kEstimator == SLIPSTREAM_RETURN) return 0.0f;
    return how.discount * (kEstimator == SLIPSTREAM_TD_LAMBDA ? how.rest : step.rho);
}

struct Estimate {
    float advantage, target;
};

// What a token gets, 0 unless it is sampled; `later` becomes what the token before it is handed.
template <int32_t kEstimator, typename Scan>
SLIPSTREAM_STEP Estimate take_step(const slipstream_estimator& how, Later<Scan>& later, bool sampled, float value,
                                   float reward, float ratio) {
    using Need = Needs<kEstimator>;
    const Step step = step_of<kEstimator>(how, later, value, reward, ratio);
    const Scan scan = static_cast<Scan>(step.input) + static_cast<Scan>(step.decay) * later.scan;
    const float scanned = static_cast<float>(scan);
    const float aim = Need::kAdvantages ? value + scanned : scanned;
    const float gain = Need::kRatios ? step.rho * ((reward + how.discount * later.target) - value) : scanned;
    // Selected, not branched on: where sampled tokens stand is hard to predict.
    later.scan = sampled ? scan : later.scan;
    later.value = sampled ? value : later.value;
    later.target = sampled ? aim : later.target;
    later.none = later.none && !sampled;
    return {sampled ? gain : 0.0f, sampled ? aim : 0.0f};
}

// Whether no array is null that the estimator reads or writes.
inline bool arrays_are_there(const slipstream_steps& in, int32_t kind, const float* advantage, const float* target) {
    const bool values = kind == SLIPSTREAM_RETURN || in.value != nullptr;
    const bool ratios = kind != SLIPSTREAM_VTRACE || in.ratio != nullptr;
    const bool outputs = target != nullptr && (kind == SLIPSTREAM_TD_LAMBDA || kind == SLIPSTREAM_RETURN ||
                                               advantage != nullptr);
    return values && ratios && outputs && in.reward != nullptr && in.sampled != nullptr;
}

}  // namespace slipstream

#endif
