// One pass of the policy loss over tokens: loss, gradients and metrics. Formulas: kernels/slipstream_kernels/objective.py.

#include <cmath>

#include "slipstream.h"

namespace {

// Log-ratios are held to this magnitude before exp, so that no ratio overflows.
constexpr float kLimit = 20.0f;

// Places of the sums, in the order that the header gives.
enum Sum {
    kLossSurrogate, kLossKl, kLossEntropy,
    kRatio, kRatioSquare, kBehavior, kBehaviorK2, kBehaviorK3, kImportance,
    kProximal, kProximalK2, kProximalK3, kReference, kReferenceK2, kReferenceK3,
    kEntropy, kAdvantagePositive, kAdvantageNegative,
    kTokens, kPositive, kNegative, kClippedPositive, kClippedNegative, kDualClipped, kCapped, kRejected, kMasked,
    kProximalCount, kReferenceCount, kEntropyCount,
    kRatioMax, kRatioMin,
    kSums
};

// Not std::min and std::max: they drop NaN, which must reach the loss.
inline float within(float value, float low, float high) { return value < low ? low : value > high ? high : value; }
inline float clamped(float log_ratio) { return within(log_ratio, -kLimit, kLimit); }

struct Corrected {
    float importance;
    bool capped, rejected;
};

Corrected corrected(float mismatch, const slipstream_objective& goal) {
    if (goal.correction == SLIPSTREAM_CORRECTION_NONE) return {1.0f, false, false};
    const float ratio = std::exp(clamped(mismatch));
    const bool above = ratio > goal.importance_cap;
    if (goal.correction == SLIPSTREAM_CORRECTION_TRUNCATE) return {above ? goal.importance_cap : ratio, above, false};
    const bool out = above || ratio < goal.importance_floor;
    return {out ? 0.0f : ratio, false, out};
}

struct Term {
    float loss, slope;
    bool bounded, dual;
};

Term surrogate(float moved, float logprob, float advantage, float importance, const slipstream_objective& goal) {
    const float ratio = std::exp(clamped(moved)), factor = -importance * advantage;
    const bool stuck = std::fabs(moved) > kLimit;
    const float low = goal.ratio_low, high = goal.ratio_high;
    switch (goal.surrogate) {
        case SLIPSTREAM_SURROGATE_CISPO: {
            const float slope = factor * within(ratio, low, high);
            return {slope * logprob, slope, ratio < low || ratio > high, false};
        }
        case SLIPSTREAM_SURROGATE_TOPR: {
            const bool harmful = advantage < 0.0f;
            const float slope = factor * (harmful ? within(ratio, 0.0f, 1.0f) : 1.0f);
            return {slope * logprob, slope, harmful && ratio > 1.0f, false};
        }
        case SLIPSTREAM_SURROGATE_SAPO: {
            const float heat = advantage > 0.0f ? goal.gate_positive : goal.gate_negative;
            const float gate = 1.0f / (1.0f + std::exp(-heat * (ratio - 1.0f)));
            const float slope = factor * 4.0f * gate * (1.0f - gate) * ratio;
            return {factor * 4.0f / heat * gate, stuck ? 0.0f : slope, false, false};
        }
        default: {
            const bool bounded = advantage >= 0.0f ? ratio > high : ratio < low;
            const bool dual = advantage < 0.0f && ratio > goal.dual_clip;
            const float bound = dual ? goal.dual_clip : within(ratio, low, high);
            const bool still = bounded || dual;
            return {factor * (still ? bound : ratio), still || stuck ? 0.0f : factor * ratio, bounded, dual};
        }
    }
}

struct Penalty {
    float value, slope;
};

Penalty penalised(float drift, int32_t kind) {
    const float near = clamped(drift);
    const bool stuck = std::fabs(drift) > kLimit;
    switch (kind) {
        case SLIPSTREAM_PENALTY_K2:
            return {0.5f * near * near, stuck ? 0.0f : near};
        case SLIPSTREAM_PENALTY_K3: {
            const float inverse = std::exp(-near);
            return {inverse - 1.0f + near, stuck ? 0.0f : 1.0f - inverse};
        }
        case SLIPSTREAM_PENALTY_K3_WITH_K2_GRADIENT:
            return {std::exp(-near) - 1.0f + near, stuck ? 0.0f : near};
        default:
            return {0.0f, 0.0f};
    }
}

// Adds d, d^2 / 2 and exp(sign d) - 1 - sign d of a clamped log-ratio d.
void add_divergences(double* sums, int at, float log_ratio, float sign) {
    sums[at] += log_ratio;
    sums[at + 1] += 0.5f * log_ratio * log_ratio;
    sums[at + 2] += std::exp(sign * log_ratio) - 1.0f - sign * log_ratio;
}

}  // namespace

extern "C" int32_t slipstream_policy_terms_f32(const slipstream_policy_inputs* inputs,
                                               const slipstream_objective* objective, int64_t tokens,
                                               float* grad_logprob, float* grad_entropy, int64_t* active,
                                               int64_t* active_count, float* loss, float* metrics) {
    if (tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (inputs == nullptr || objective == nullptr || active_count == nullptr || loss == nullptr || metrics == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    const slipstream_policy_inputs& in = *inputs;
    const slipstream_objective& goal = *objective;
    if (tokens > 0 && (in.logprob == nullptr || in.behavior == nullptr || in.advantage == nullptr ||
                       in.weight == nullptr || in.share == nullptr || grad_logprob == nullptr || active == nullptr ||
                       (in.entropy != nullptr && grad_entropy == nullptr))) {
        return SLIPSTREAM_NULL_POINTER;
    }
    double sums[kSums] = {};
    sums[kRatioMin] = 3.4028234663852886e38;
    int64_t count = 0;
    for (int64_t n = 0; n < tokens; ++n) {
        grad_logprob[n] = 0.0f;
        if (in.entropy != nullptr) grad_entropy[n] = 0.0f;
        if (!(in.weight[n] > 0.0f)) continue;
        const float current = in.logprob[n], behavior = in.behavior[n];
        const float base = in.proximal == nullptr ? current : in.proximal[n];
        const float raw = clamped(current - behavior), raw_ratio = std::exp(raw);
        const bool trusted = raw_ratio >= goal.trust_low && raw_ratio <= goal.trust_high;
        const float share = trusted ? in.share[n] : 0.0f;
        float advantage = in.advantage[n], penalty_slope = 0.0f;
        if (in.reference != nullptr) {
            const float drift = current - in.reference[n];
            if (goal.penalty == SLIPSTREAM_PENALTY_K1_IN_REWARD) advantage -= goal.kl_coefficient * clamped(drift);
            const Penalty penalty = penalised(drift, goal.penalty);
            penalty_slope = goal.kl_coefficient * penalty.slope;
            sums[kLossKl] += share * (goal.kl_coefficient * penalty.value);
            add_divergences(sums, kReference, clamped(drift), -1.0f);
            sums[kReferenceCount] += 1.0;
        }
        if (in.proximal != nullptr) {
            add_divergences(sums, kProximal, clamped(current - base), 1.0f);
            sums[kProximalCount] += 1.0;
        }
        if (in.entropy != nullptr) {
            grad_entropy[n] = -goal.entropy_coefficient * share;
            sums[kLossEntropy] += grad_entropy[n] * in.entropy[n];
            sums[kEntropy] += in.entropy[n];
            sums[kEntropyCount] += 1.0;
        }
        const Corrected weight = corrected(in.mismatch == nullptr ? base - behavior : in.mismatch[n], goal);
        const Term term =
            surrogate(in.moved == nullptr ? current - base : in.moved[n], current, advantage, weight.importance, goal);
        grad_logprob[n] = share * (term.slope + penalty_slope);
        // Not "> 0 or < 0": NaN must reach the weights' gradient.
        active[count] = n;
        count += grad_logprob[n] != 0.0f || (in.entropy != nullptr && grad_entropy[n] != 0.0f);
        sums[kLossSurrogate] += share * term.loss;
        sums[kRatio] += raw_ratio;
        sums[kRatioSquare] += raw_ratio * raw_ratio;
        add_divergences(sums, kBehavior, raw, 1.0f);
        sums[kImportance] += weight.importance;
        const bool positive = advantage > 0.0f, negative = advantage < 0.0f;
        sums[kAdvantagePositive] += positive ? advantage : 0.0f;
        sums[kAdvantageNegative] += negative ? advantage : 0.0f;
        sums[kTokens] += 1.0;
        sums[kPositive] += positive;
        sums[kNegative] += negative;
        sums[kClippedPositive] += positive && term.bounded;
        sums[kClippedNegative] += negative && term.bounded;
        sums[kDualClipped] += term.dual;
        sums[kCapped] += weight.capped;
        sums[kRejected] += weight.rejected;
        sums[kMasked] += !trusted;
        sums[kRatioMax] = raw_ratio > sums[kRatioMax] ? raw_ratio : sums[kRatioMax];
        sums[kRatioMin] = raw_ratio < sums[kRatioMin] ? raw_ratio : sums[kRatioMin];
    }
    *active_count = count;
    *loss = static_cast<float>(sums[kLossSurrogate] + sums[kLossKl] + sums[kLossEntropy]);
    for (int place = 0; place < kSums; ++place) metrics[place] = static_cast<float>(sums[place]);
    return SLIPSTREAM_OK;
}
