// One pass of the policy loss over tokens: loss, gradients and metrics. Formulas: kernels/slipstream_kernels/objective.py.
// Eight lanes, and sums of fixed blocks that are added up in order, make the bits the same for every instruction set
// and number of threads.

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "slipstream.h"

namespace {

using namespace slipstream;

typedef slipstream_policy_inputs Inputs;
typedef slipstream_objective Objective;

// Log-ratios are held to this magnitude before exp, so that no ratio overflows.
constexpr float kLimit = 20.0f;
constexpr float kMost = 3.4028234663852886e38f;
// Tokens whose sums stay in float, eight to a lane, before they go to double.
constexpr int64_t kGroup = 8 * kLanes;
// Tokens with sums of their own.
constexpr int64_t kBlock = 1024;
// Blocks whose sums are on the stack at a time.
constexpr int64_t kRound = 128;
// Fewer tokens are done sooner by one thread than a team is woken.
constexpr int64_t kParallelTokens = 1 << 14;

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

INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x}; }
INLINE Floats counted(Ints mask) { return mask ? splat(1.0f) : Floats{}; }

// Comparisons are such that NaN, which must reach the loss, is never dropped.
INLINE Floats within(Floats value, float low, float high) {
    return value < low ? splat(low) : value > high ? splat(high) : value;
}
INLINE Floats clamped(Floats log_ratio) { return within(log_ratio, -kLimit, kLimit); }
// Where the clamped log-ratio has no slope.
INLINE Ints stuck(Floats log_ratio) { return (log_ratio < -kLimit) | (log_ratio > kLimit); }

INLINE Floats exponential(Floats x) {
    exp_lanes(x);
    return x;
}

struct Corrected {
    Floats importance;
    Ints capped, rejected;
};

INLINE Corrected corrected(Floats mismatch, const Objective& goal) {
    if (goal.correction == SLIPSTREAM_CORRECTION_NONE) return {splat(1.0f), Ints{}, Ints{}};
    const Floats ratio = exponential(clamped(mismatch));
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

// The loss of a ratio, the current / proximal one, times `factor`; `moved` is its logarithm before the clamp.
INLINE Term surrogate(Floats moved, Floats ratio, Floats logprob, Floats advantage, Floats factor,
                      const Objective& goal) {
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
            // Held to what exp takes; the gate is shut or open long before.
            const Floats gate = 1.0f / (1.0f + exponential(within(heat * (1.0f - ratio), -87.0f, 87.0f)));
            const Floats slope = factor * 4.0f * gate * (1.0f - gate) * ratio;
            return {factor * 4.0f / heat * gate, stuck(moved) ? Floats{} : slope, Ints{}, Ints{}};
        }
        default: {
            const Ints bounded = advantage >= 0.0f ? ratio > high : ratio < low;
            const Ints dual = (advantage < 0.0f) & (ratio > goal.dual_clip);
            const Floats bound = dual ? splat(goal.dual_clip) : within(ratio, low, high);
            const Ints still = bounded | dual;
            return {factor * (still ? bound : ratio), still | stuck(moved) ? Floats{} : factor * ratio, bounded, dual};
        }
    }
}

struct Penalty {
    Floats value, slope;
};

// `near` is the clamped drift, and `inverse` is exp(-near).
INLINE Penalty penalised(Floats drift, Floats near, Floats inverse, int32_t kind) {
    const Floats slope = kind == SLIPSTREAM_PENALTY_K3 ? 1.0f - inverse : near;
    switch (kind) {
        case SLIPSTREAM_PENALTY_K2:
            return {0.5f * near * near, stuck(drift) ? Floats{} : slope};
        case SLIPSTREAM_PENALTY_K3:
        case SLIPSTREAM_PENALTY_K3_WITH_K2_GRADIENT:
            return {inverse - 1.0f + near, stuck(drift) ? Floats{} : slope};
        default:
            return {Floats{}, Floats{}};
    }
}

// Adds d, d^2 / 2 and r - 1 - log r, where r is exp(d) or exp(-d).
INLINE void add_divergences(Floats* sums, int at, Floats log_ratio, Floats ratio, Floats log_of_ratio) {
    sums[at] += log_ratio;
    sums[at + 1] += 0.5f * log_ratio * log_ratio;
    sums[at + 2] += ratio - 1.0f - log_of_ratio;
}

// Where a vector of tokens is, and which of them have a positive weight.
struct Place {
    int64_t start, count;
    Ints live;
};

// Other tokens are 0 before any arithmetic: 0 * inf would be NaN.
INLINE Floats lived(const float* from, const Place& at) {
    Floats x;
    at.count >= kLanes ? load(x, from + at.start) : load_some(x, from + at.start, at.count, 0.0f);
    return at.live ? x : Floats{};
}

INLINE void put(float* to, const Place& at, Floats x) {
    at.count >= kLanes ? store(to + at.start, x) : store_some(to + at.start, x, at.count);
}

struct Gradients {
    float *logprob, *entropy;
};

// Takes the penalty off the advantage or adds it to the loss, and returns its slope.
INLINE Floats add_reference(Floats drift, Floats share, Floats& advantage, const Objective& goal, Floats* sums) {
    const Floats near = clamped(drift), inverse = exponential(-near);
    add_divergences(sums, kReference, near, inverse, -near);
    if (goal.penalty == SLIPSTREAM_PENALTY_K1_IN_REWARD) advantage -= goal.kl_coefficient * near;
    const Penalty penalty = penalised(drift, near, inverse, goal.penalty);
    sums[kLossKl] += share * (goal.kl_coefficient * penalty.value);
    return goal.kl_coefficient * penalty.slope;
}

INLINE void add_outcome(const Place& at, Floats advantage, const Corrected& weight, const Term& term, Floats* sums) {
    const Ints positive = advantage > 0.0f, negative = advantage < 0.0f;
    sums[kImportance] += at.live ? weight.importance : Floats{};
    sums[kAdvantagePositive] += positive ? advantage : Floats{};
    sums[kAdvantageNegative] += negative ? advantage : Floats{};
    sums[kTokens] += counted(at.live);
    sums[kPositive] += counted(positive);
    sums[kNegative] += counted(negative);
    sums[kClippedPositive] += counted(positive & term.bounded);
    sums[kClippedNegative] += counted(negative & term.bounded);
    sums[kDualClipped] += counted(term.dual);
    sums[kCapped] += counted(at.live & weight.capped);
    sums[kRejected] += counted(at.live & weight.rejected);
}

// Writes the gradients of at most one vector of tokens, and adds to the sums and extremes.
INLINE void add_tokens(const Inputs& in, const Objective& goal, int64_t start, int64_t count, const Gradients& to,
                       Floats* sums) {
    Place at = {start, count, ~Ints{}};
    at.live = lived(in.weight, at) > 0.0f;
    const Floats current = lived(in.logprob, at), behavior = lived(in.behavior, at);
    const Floats base = in.proximal == nullptr ? current : lived(in.proximal, at);
    const Floats raw = clamped(current - behavior), raw_ratio = exponential(raw);
    const Ints trusted = at.live & (raw_ratio >= goal.trust_low) & (raw_ratio <= goal.trust_high);
    const Floats share = trusted ? lived(in.share, at) : Floats{};
    Floats advantage = lived(in.advantage, at), penalty_slope = Floats{};
    if (in.reference != nullptr) {
        penalty_slope = add_reference(current - lived(in.reference, at), share, advantage, goal, sums);
    }
    Floats moved = current - base, ratio = exponential(clamped(moved));
    if (in.proximal != nullptr) add_divergences(sums, kProximal, clamped(moved), ratio, clamped(moved));
    if (in.moved != nullptr) {
        moved = lived(in.moved, at);
        ratio = exponential(clamped(moved));
    }
    if (in.entropy != nullptr) {
        const Floats entropy = lived(in.entropy, at), gradient = -goal.entropy_coefficient * share;
        put(to.entropy, at, gradient);
        sums[kLossEntropy] += gradient * entropy;
        sums[kEntropy] += entropy;
    }
    const Corrected weight = corrected(in.mismatch == nullptr ? base - behavior : lived(in.mismatch, at), goal);
    const Term term = surrogate(moved, ratio, current, advantage, -weight.importance * advantage, goal);
    put(to.logprob, at, share * (term.slope + penalty_slope));
    sums[kLossSurrogate] += share * term.loss;
    add_divergences(sums, kBehavior, raw, raw_ratio, raw);
    sums[kRatio] += at.live ? raw_ratio : Floats{};
    sums[kRatioSquare] += at.live ? raw_ratio * raw_ratio : Floats{};
    sums[kRatioMax] = at.live & (raw_ratio > sums[kRatioMax]) ? raw_ratio : sums[kRatioMax];
    sums[kRatioMin] = at.live & (raw_ratio < sums[kRatioMin]) ? raw_ratio : sums[kRatioMin];
    sums[kMasked] += counted(at.live & ~trusted);
    add_outcome(at, advantage, weight, term, sums);
}

// What a block of tokens, or all blocks up to one, add up to; the last two sums are extremes.
struct Totals {
    double sums[kSums];
    int64_t active;
};

INLINE void extend(Totals& totals, double most, double least) {
    totals.sums[kRatioMax] = most > totals.sums[kRatioMax] ? most : totals.sums[kRatioMax];
    totals.sums[kRatioMin] = least < totals.sums[kRatioMin] ? least : totals.sums[kRatioMin];
}

// Writes the gradients of a block of tokens, and sets its sums.
FOR_EACH_INSTRUCTION_SET void add_block(const Inputs& in, const Objective& goal, int64_t start, int64_t stop,
                                        const Gradients& to, Totals& totals) {
    Floats sums[kSums] = {};
    double lanes[kRatioMax][kLanes] = {};
    sums[kRatioMin] = splat(kMost);
    for (int64_t n = start; n < stop; n += kGroup) {
        for (int64_t at = n; at < stop && at < n + kGroup; at += kLanes) {
            stop - at >= kLanes ? add_tokens(in, goal, at, kLanes, to, sums)
                                : add_tokens(in, goal, at, stop - at, to, sums);
        }
        for (int place = 0; place < kRatioMax; ++place) {
            float some[kLanes];
            store(some, sums[place]);
            for (int lane = 0; lane < kLanes; ++lane) lanes[place][lane] += some[lane];
            sums[place] = Floats{};
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int place = 0; place < kRatioMax; ++place) totals.sums[place] += lanes[place][lane];
        extend(totals, sums[kRatioMax][lane], sums[kRatioMin][lane]);
    }
    totals.sums[kProximalCount] = in.proximal == nullptr ? 0.0 : totals.sums[kTokens];
    totals.sums[kReferenceCount] = in.reference == nullptr ? 0.0 : totals.sums[kTokens];
    totals.sums[kEntropyCount] = in.entropy == nullptr ? 0.0 : totals.sums[kTokens];
}

// Sets the first values of `active` to the tokens of [start, stop) that have a gradient, and returns their number.
int64_t list_active(const Gradients& of, int64_t start, int64_t stop, int64_t* active) {
    const float* other = of.entropy == nullptr ? of.logprob : of.entropy;
    int64_t count = 0;
    for (int64_t n = start; n < stop; ++n) {
        uint32_t bits[2];
        std::memcpy(bits, of.logprob + n, sizeof(float));
        std::memcpy(bits + 1, other + n, sizeof(float));
        active[count] = n;
        // Whether a bit beside the sign is set: so in NaN too, which must reach the weights' gradient.
        count += ((bits[0] | bits[1]) << 1) != 0;
    }
    return count;
}

// Returns the sums of no tokens.
Totals nothing() {
    Totals totals = {};
    totals.sums[kRatioMin] = kMost;
    return totals;
}

// Adds blocks of which the first begins at token `start`, each with its active tokens at its own place in `active`.
void merge(Totals& totals, const Totals* blocks, int64_t count, int64_t start, int64_t* active) {
    for (int64_t k = 0; k < count; ++k) {
        for (int place = 0; place < kRatioMax; ++place) totals.sums[place] += blocks[k].sums[place];
        extend(totals, blocks[k].sums[kRatioMax], blocks[k].sums[kRatioMin]);
        // Never upwards: no place is written over before it has moved.
        std::memmove(active + totals.active, active + start + k * kBlock, sizeof(int64_t) * blocks[k].active);
        totals.active += blocks[k].active;
    }
}

}  // namespace

extern "C" int32_t slipstream_policy_terms_f32(const slipstream_policy_inputs* inputs,
                                               const slipstream_objective* objective, int64_t tokens, int32_t threads,
                                               float* grad_logprob, float* grad_entropy, int64_t* active,
                                               int64_t* active_count, float* loss, float* metrics) {
    if (tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (inputs == nullptr || objective == nullptr || active_count == nullptr || loss == nullptr || metrics == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    const slipstream_policy_inputs& in = *inputs;
    if (tokens > 0 && (in.logprob == nullptr || in.behavior == nullptr || in.advantage == nullptr ||
                       in.weight == nullptr || in.share == nullptr || grad_logprob == nullptr || active == nullptr ||
                       (in.entropy != nullptr && grad_entropy == nullptr))) {
        return SLIPSTREAM_NULL_POINTER;
    }
    const Gradients gradients = {grad_logprob, in.entropy == nullptr ? nullptr : grad_entropy};
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
    Totals totals = nothing(), blocks[kRound];
    for (int64_t first = 0; first < tokens; first += kRound * kBlock) {
        const int64_t left = (tokens - first + kBlock - 1) / kBlock, count = left < kRound ? left : kRound;
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1 && tokens >= kParallelTokens)
        for (int64_t k = 0; k < count; ++k) {
            const int64_t start = first + k * kBlock, stop = tokens - start < kBlock ? tokens : start + kBlock;
            blocks[k] = nothing();
            add_block(in, *objective, start, stop, gradients, blocks[k]);
            blocks[k].active = list_active(gradients, start, stop, active + start);
        }
        merge(totals, blocks, count, first, active);
    }
    const double* sums = totals.sums;
    *active_count = totals.active;
    *loss = static_cast<float>(sums[kLossSurrogate] + sums[kLossKl] + sums[kLossEntropy]);
    for (int place = 0; place < kSums; ++place) metrics[place] = static_cast<float>(sums[place]);
    return SLIPSTREAM_OK;
}
