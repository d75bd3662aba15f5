// One pass of the policy loss over tokens: loss, gradients and metrics. Eight lanes, and sums of fixed blocks that are
// added up in order, make the bits the same for every instruction set and number of threads.

#include <cstring>

#include "lanes.h"
#include "policy_formulas.h"
#include "slipstream.h"

namespace {

using namespace slipstream;

typedef slipstream_policy_inputs Inputs;

constexpr float kMost = 3.4028234663852886e38f;
// Tokens whose sums stay in float, eight to a lane, before they go to double.
constexpr int64_t kGroup = 8 * kLanes;
// Tokens with sums of their own.
constexpr int64_t kBlock = 1024;
// Blocks whose sums are on the stack at a time.
constexpr int64_t kRound = 128;
// Fewer tokens are done sooner by one thread than a team is woken.
constexpr int64_t kParallelTokens = 1 << 15;

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

INLINE Floats counted(const Ints& mask) { return mask ? splat(1.0f) : Floats{}; }

// Adds d, d^2 / 2 and r - 1 - log r, where r is exp(d) or exp(-d).
INLINE void add_divergences(Floats* sums, int at, const Floats& d, const Floats& ratio, const Floats& log_of_ratio) {
    sums[at] += d;
    sums[at + 1] += 0.5f * d * d;
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

INLINE void put(float* to, const Place& at, const Floats& x) {
    at.count >= kLanes ? store(to + at.start, x) : store_some(to + at.start, x, at.count);
}

INLINE Place place_of(const Inputs& in, int64_t start, int64_t count) {
    const Place all = {start, count, ~Ints{}};
    return {start, count, lived(in.weight, all) > 0.0f};
}

// Current / behavior, current / proximal and proximal / behavior of a vector of tokens.
struct Ratios {
    Floats raw, moved, mismatch;
};

// Returns the logarithms before the clamp.
INLINE Ratios log_ratios(const Inputs& in, const Place& at) {
    const Floats current = lived(in.logprob, at), behavior = lived(in.behavior, at);
    const Floats base = in.proximal == nullptr ? current : lived(in.proximal, at);
    return {current - behavior, in.moved == nullptr ? current - base : lived(in.moved, at),
            in.mismatch == nullptr ? base - behavior : lived(in.mismatch, at)};
}

struct Gradients {
    float *logprob, *entropy;
};

// Takes the penalty off the advantage or adds it to the loss, and returns its slope.
INLINE Floats add_reference(const Floats& drift, const Floats& share, const Objective& goal, Floats& advantage,
                            Floats* sums) {
    const Floats near = clamped(drift), inverse = exp_lanes(-near);
    add_divergences(sums, kReference, near, inverse, -near);
    if (goal.penalty == SLIPSTREAM_PENALTY_K1_IN_REWARD) advantage -= goal.kl_coefficient * near;
    const Penalty penalty = penalised(drift, near, inverse, goal.penalty);
    sums[kLossKl] += share * (goal.kl_coefficient * penalty.value);
    return goal.kl_coefficient * penalty.slope;
}

INLINE void add_outcome(const Place& at, const Floats& advantage, const Corrected& weight, const Term& term,
                        Floats* sums) {
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

INLINE void add_proximal(const Inputs& in, const Place& at, const Floats& ratio, Floats* sums) {
    const Floats moved = clamped(lived(in.logprob, at) - lived(in.proximal, at));
    // A segment's ratio is not the token's.
    add_divergences(sums, kProximal, moved, in.moved == nullptr ? ratio : exp_lanes(moved), moved);
}

INLINE void add_raw(const Place& at, const Floats& raw, const Floats& ratio, Floats* sums) {
    add_divergences(sums, kBehavior, raw, ratio, raw);
    sums[kRatio] += at.live ? ratio : Floats{};
    sums[kRatioSquare] += at.live ? ratio * ratio : Floats{};
    sums[kRatioMax] = (at.live & (ratio > sums[kRatioMax])) ? ratio : sums[kRatioMax];
    sums[kRatioMin] = (at.live & (ratio < sums[kRatioMin])) ? ratio : sums[kRatioMin];
}

// Writes the gradients of a vector of tokens, and adds to the sums and extremes.
INLINE void add_tokens(const Inputs& in, const Objective& goal, const Place& at, const Ratios& ratios,
                       const Gradients& to, Floats* sums) {
    const Ratios logs = log_ratios(in, at);
    const Floats current = lived(in.logprob, at), share = lived(in.share, at);
    Floats advantage = lived(in.advantage, at), penalty_slope = Floats{};
    if (in.reference != nullptr) {
        penalty_slope = add_reference(current - lived(in.reference, at), share, goal, advantage, sums);
    }
    if (in.proximal != nullptr) add_proximal(in, at, ratios.moved, sums);
    if (in.entropy != nullptr) {
        const Floats entropy = lived(in.entropy, at), gradient = -goal.entropy_coefficient * share;
        put(to.entropy, at, gradient);
        sums[kLossEntropy] += gradient * entropy;
        sums[kEntropy] += entropy;
    }
    const Corrected weight = corrected(ratios.mismatch, goal);
    const Term term = surrogate(logs.moved, ratios.moved, current, advantage, weight.importance, goal);
    const Ints held = ((advantage > 0.0f) & (ratios.raw > goal.trust_high)) |
                      ((advantage < 0.0f) & (ratios.raw < goal.trust_low));
    const Floats free_share = held ? Floats{} : share;
    put(to.logprob, at, free_share * term.slope + share * penalty_slope);
    sums[kLossSurrogate] += free_share * term.loss;
    sums[kMasked] += counted(held);
    add_raw(at, clamped(logs.raw), ratios.raw, sums);
    add_outcome(at, advantage, weight, term, sums);
}

// Adds at most kGroup tokens; `whole` says that there are no fewer.
INLINE void add_group(const Inputs& in, const Objective& goal, int64_t start, int64_t stop, bool whole,
                      const Gradients& to, Floats* sums) {
    // First all ratios: one exp takes long, but many can be under way at once.
    Ratios ratios[kGroup / kLanes];
    for (int64_t n = start, k = 0; n < stop; n += kLanes, ++k) {
        const Ratios logs = log_ratios(in, place_of(in, n, whole ? kLanes : stop - n));
        ratios[k].raw = exp_lanes(clamped(logs.raw));
        ratios[k].moved = exp_lanes(clamped(logs.moved));
        ratios[k].mismatch = exp_lanes(clamped(logs.mismatch));
    }
    for (int64_t n = start, k = 0; n < stop; n += kLanes, ++k) {
        add_tokens(in, goal, place_of(in, n, whole ? kLanes : stop - n), ratios[k], to, sums);
    }
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
        stop - n >= kGroup ? add_group(in, goal, n, n + kGroup, true, to, sums)
                           : add_group(in, goal, n, stop, false, to, sums);
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
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1 && tokens >= kParallelTokens)
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
