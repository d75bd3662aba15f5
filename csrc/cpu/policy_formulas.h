// Formulas of the policy loss for eight tokens at a time: clamp, correction, surrogate and penalty of objective.py.

#ifndef SLIPSTREAM_POLICY_FORMULAS_H
#define SLIPSTREAM_POLICY_FORMULAS_H

#include "lanes.h"
#include "slipstream.h"

namespace slipstream {

typedef slipstream_objective Objective;

// Log-ratios are held to this magnitude before exp, so that no ratio overflows.
constexpr float kLimit = 20.0f;

// Comparisons here are such that NaN, which must reach the loss, is never dropped.
INLINE Floats within(const Floats& value, float low, float high) {
    return value < low ? splat(low) : value > high ? splat(high) : value;
}

INLINE Floats clamped(const Floats& log_ratio) { return within(log_ratio, -kLimit, kLimit); }

// Where the clamped log-ratio has no slope.
INLINE Ints stuck(const Floats& log_ratio) { return (log_ratio < -kLimit) | (log_ratio > kLimit); }

struct Corrected {
    Floats importance;
    Ints capped, rejected;
};

// What becomes of the proximal / behavior ratio.
INLINE Corrected corrected(const Floats& ratio, const Objective& goal) {
    if (goal.correction == SLIPSTREAM_CORRECTION_NONE) return {splat(1.0f), Ints{}, Ints{}};
    const Ints above = ratio > goal.importance_cap;
    if (goal.correction == SLIPSTREAM_CORRECTION_TRUNCATE) {
        return {above ? splat(goal.importance_cap) : ratio, above, Ints{}};
    }
    const Ints out = above | (ratio < goal.importance_floor);
    return {out ? Floats{} : ratio, Ints{}, out};
}

struct Term {
    Floats loss, slope;
    Ints bounded, dual;
};

// The loss by the current / proximal ratio; `moved` is its logarithm before the clamp.
INLINE Term surrogate(const Floats& moved, const Floats& ratio, const Floats& logprob, const Floats& advantage,
                      const Floats& importance, const Objective& goal) {
    const Floats factor = -importance * advantage;
    const float low = goal.ratio_low, high = goal.ratio_high;
    switch (goal.surrogate) {
        case SLIPSTREAM_SURROGATE_CISPO: {
            const Floats slope = factor * within(ratio, low, high);
            return {slope * logprob, slope, (ratio < low) | (ratio > high), Ints{}};
        }
        case SLIPSTREAM_SURROGATE_TOPR: {
            const Ints harmful = advantage < 0.0f;
            const Floats slope = factor * (harmful ? within(ratio, 0.0f, 1.0f) : splat(1.0f));
            return {slope * logprob, slope, harmful & (ratio > 1.0f), Ints{}};
        }
        case SLIPSTREAM_SURROGATE_SAPO: {
            const Floats heat = advantage > 0.0f ? splat(goal.gate_positive) : splat(goal.gate_negative);
            // Held to what exp_lanes takes, where the gate has long been open or shut.
            const Floats gate = 1.0f / (1.0f + exp_lanes(within(heat * (1.0f - ratio), -87.0f, 87.0f)));
            const Floats slope = factor * 4.0f * gate * (1.0f - gate) * ratio;
            return {factor * 4.0f / heat * gate, stuck(moved) ? Floats{} : slope, Ints{}, Ints{}};
        }
        default: {
            const Ints bounded = advantage >= 0.0f ? ratio > high : ratio < low;
            const Ints dual = (advantage < 0.0f) & (ratio > goal.dual_clip);
            const Floats bound = dual ? splat(goal.dual_clip) : within(ratio, low, high);
            const Ints held = bounded | dual, still = held | stuck(moved);
            return {factor * (held ? bound : ratio), still ? Floats{} : factor * ratio, bounded, dual};
        }
    }
}

struct Penalty {
    Floats value, slope;
};

// The penalty of a current / reference log-ratio; `near` is what the clamp leaves of it, `inverse` is exp(-near).
INLINE Penalty penalised(const Floats& drift, const Floats& near, const Floats& inverse, int32_t kind) {
    switch (kind) {
        case SLIPSTREAM_PENALTY_K2:
            return {0.5f * near * near, stuck(drift) ? Floats{} : near};
        case SLIPSTREAM_PENALTY_K3:
            return {inverse - 1.0f + near, stuck(drift) ? Floats{} : 1.0f - inverse};
        case SLIPSTREAM_PENALTY_K3_WITH_K2_GRADIENT:
            return {inverse - 1.0f + near, stuck(drift) ? Floats{} : near};
        default:
            return {Floats{}, Floats{}};
    }
}

}  // namespace slipstream

#endif  // SLIPSTREAM_POLICY_FORMULAS_H
