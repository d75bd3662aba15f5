// Rows of logits, one sweep each: statistics of the softmax, and the gradient of log-probability, entropy and
// log-sum-exp. Eight lanes and a fixed order of parts make the bits the same for every instruction set and number of
// threads.

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "slipstream.h"

namespace {

using namespace slipstream;

// Columns of one part: their logits stay in the first-level cache between the two passes over them.
constexpr int64_t kPart = 1024;
// Fewer logits are done sooner by one thread than a team is woken.
constexpr int64_t kParallelLogits = 1 << 15;
constexpr float kLn2 = 0.693147181f;
constexpr float kLeast = -1e30f;

// u = tanh(u): a polynomial near 0, where the quotient of exponentials would lose digits.
INLINE void tanh_lanes(Floats& u) {
    const Floats magnitude = u < 0.0f ? -u : u;
    Floats decay = magnitude * (-2.0f * kLog2E);
    exp2_lanes(decay);
    const Floats quotient = (1.0f - decay) / (1.0f + decay);
    const Floats square = u * u;
    Floats series = Floats{} + 62.0f / 2835.0f;
    series = series * square - 17.0f / 315.0f;
    series = series * square + 2.0f / 15.0f;
    series = series * square - 1.0f / 3.0f;
    series = (series * square) * u + u;
    u = magnitude < 0.25f ? series : (u < 0.0f ? -quotient : quotient);
}

INLINE float sum_lanes(const Floats& x) {
    float half[kLanes];
    store(half, x);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) half[lane] += half[lane + width];
    }
    return half[0];
}

INLINE float max_lanes(const Floats& x) {
    float most = x[0];
    for (int lane = 1; lane < kLanes; ++lane) most = x[lane] > most ? x[lane] : most;
    return most;
}

struct Statistics {
    float peak, total, weighted;
};

// The statistics of two neighbouring parts as one.
INLINE Statistics merged(const Statistics& left, const Statistics& right) {
    const float peak = left.peak > right.peak ? left.peak : right.peak;
    const float left_shift = (left.peak - peak) * kLog2E, right_shift = (right.peak - peak) * kLog2E;
    const float left_scale = std::exp2(left_shift), right_scale = std::exp2(right_shift);
    return {peak, left_scale * left.total + right_scale * right.total,
            left_scale * (left.weighted + left_shift * left.total) +
                right_scale * (right.weighted + right_shift * right.total)};
}

struct Logits {
    const float* bias;
    float inverse_temperature, softcap;
    bool change;
};

// x becomes inverse_temperature * cap(x + bias).
INLINE void apply(Floats& x, const Logits& how, const Floats& bias) {
    x = x + bias;
    if (how.softcap > 0.0f) {
        x = x * (1.0f / how.softcap);
        tanh_lanes(x);
        x = x * how.softcap;
    }
    x = x * how.inverse_temperature;
}

// Makes the logits of one part where they are to be changed, and returns the greatest.
INLINE float peak_of(float* row, int64_t start, int64_t stop, const Logits& how) {
    Floats peak = Floats{} + kLeast;
    for (int64_t v = start; v < stop; v += kLanes) {
        const int64_t count = stop - v;
        Floats x, bias = Floats{};
        count >= kLanes ? load(x, row + v) : load_some(x, row + v, count, kLeast);
        if (how.change) {
            if (how.bias != nullptr) {
                count >= kLanes ? load(bias, how.bias + v) : load_some(bias, how.bias + v, count, 0.0f);
            }
            apply(x, how, bias);
            if (count < kLanes) {
                store_some(row + v, x, count);
                for (int lane = static_cast<int>(count); lane < kLanes; ++lane) x[lane] = kLeast;
            } else {
                store(row + v, x);
            }
        }
        peak = x > peak ? x : peak;
    }
    return max_lanes(peak);
}

INLINE Statistics statistics_of(const float* row, int64_t start, int64_t stop, float peak) {
    Floats total = Floats{}, weighted = Floats{};
    for (int64_t v = start; v < stop; v += kLanes) {
        Floats x;
        stop - v >= kLanes ? load(x, row + v) : load_some(x, row + v, stop - v, kLeast);
        const Floats exponent = (x - peak) * kLog2E;
        Floats power = exponent;
        exp2_lanes(power);
        total = total + power;
        weighted = weighted + power * exponent;
    }
    return {peak, sum_lanes(total), sum_lanes(weighted)};
}

FOR_EACH_INSTRUCTION_SET Statistics part_statistics(float* row, int64_t start, int64_t stop, const Logits& how) {
    return statistics_of(row, start, stop, peak_of(row, start, stop, how));
}

FOR_EACH_INSTRUCTION_SET Statistics row_statistics(float* row, int64_t columns, const Logits& how) {
    Statistics whole = {kLeast, 0.0f, 0.0f};
    for (int64_t start = 0; start < columns; start += kPart) {
        const int64_t stop = start + kPart < columns ? start + kPart : columns;
        const Statistics part = statistics_of(row, start, stop, peak_of(row, start, stop, how));
        whole = start == 0 ? part : merged(whole, part);
    }
    return whole;
}

struct Scores {
    float logprob, entropy, logsumexp;
};

Scores scores_of(const Statistics& whole, float at_label) {
    const float spread = std::log(whole.total);
    return {(at_label - whole.peak) - spread, spread - kLn2 * (whole.weighted / whole.total), whole.peak + spread};
}

// Runs `visit(row, its logits, what is to happen to them)` on every row.
template <typename Visit>
void each_row(float* logits, const float* bias, const float* inverse_temperature, int32_t per_row, float softcap,
              int64_t rows, int64_t columns, int32_t threads, const Visit& visit) {
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1 && rows * columns >= kParallelLogits)
    for (int64_t n = 0; n < rows; ++n) {
        const float inverse = inverse_temperature[per_row != 0 ? n : 0];
        const bool change = bias != nullptr || softcap > 0.0f || inverse != 1.0f;
        visit(n, logits + n * columns, Logits{bias, inverse, softcap, change});
    }
}

struct RowGradient {
    float logsumexp, entropy, logprob, of_entropy, of_logsumexp, inverse_temperature, softcap;
};

INLINE void gradient_lanes(Floats& x, const RowGradient& g, float base) {
    const Floats log_p = x - g.logsumexp;
    Floats p = log_p * kLog2E;
    exp2_lanes(p);
    Floats slope = Floats{} + g.inverse_temperature;
    if (g.softcap > 0.0f) {
        const Floats ratio = x * (1.0f / (g.inverse_temperature * g.softcap));
        slope = slope * (1.0f - ratio * ratio);
    }
    x = p * (base - g.of_entropy * (log_p + g.entropy)) * slope;
}

FOR_EACH_INSTRUCTION_SET void row_gradient(float* row, int64_t columns, int64_t label, const RowGradient& g) {
    const bool here = label >= 0 && label < columns;
    float at_label = 0.0f;
    if (here) {
        const float ratio = g.softcap > 0.0f ? row[label] / (g.inverse_temperature * g.softcap) : 0.0f;
        at_label = g.logprob * g.inverse_temperature * (1.0f - ratio * ratio);
    }
    const float base = g.of_logsumexp - g.logprob;
    int64_t v = 0;
    for (; v + kLanes <= columns; v += kLanes) {
        Floats x;
        load(x, row + v);
        gradient_lanes(x, g, base);
        store(row + v, x);
    }
    if (v < columns) {
        Floats x;
        load_some(x, row + v, columns - v, 0.0f);
        gradient_lanes(x, g, base);
        store_some(row + v, x, columns - v);
    }
    if (here) row[label] += at_label;
}

}  // namespace

extern "C" int32_t slipstream_logit_scores_f32(float* logits, const int64_t* labels, const float* bias,
                                               const float* inverse_temperature, int32_t per_row, float softcap,
                                               int64_t rows, int64_t columns, int32_t threads, float* logprob,
                                               float* entropy, float* logsumexp) {
    if (rows < 0 || columns < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (rows == 0) return SLIPSTREAM_OK;
    if (labels == nullptr || inverse_temperature == nullptr || logprob == nullptr || entropy == nullptr ||
        logsumexp == nullptr || logits == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    for (int64_t n = 0; n < rows; ++n) {
        if (labels[n] < 0 || labels[n] >= columns) return SLIPSTREAM_BAD_LABEL;
    }
    each_row(logits, bias, inverse_temperature, per_row, softcap, rows, columns, threads,
             [=](int64_t n, float* row, const Logits& how) {
                 const Statistics whole = row_statistics(row, columns, how);
                 const Scores scores = scores_of(whole, row[labels[n]]);
                 logprob[n] = scores.logprob;
                 entropy[n] = scores.entropy;
                 logsumexp[n] = scores.logsumexp;
             });
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_logit_parts_f32(float* logits, const int64_t* labels, const float* bias,
                                              const float* inverse_temperature, int32_t per_row, float softcap,
                                              int64_t rows, int64_t columns, int32_t threads, float* parts) {
    if (rows < 0 || columns < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (rows == 0 || columns == 0) return SLIPSTREAM_OK;
    if (labels == nullptr || inverse_temperature == nullptr || parts == nullptr || logits == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    each_row(logits, bias, inverse_temperature, per_row, softcap, rows, columns, threads,
             [=](int64_t n, float* row, const Logits& how) {
                 float* part = parts + n;
                 for (int64_t start = 0; start < columns; start += kPart, part += 4 * rows) {
                     const int64_t stop = start + kPart < columns ? start + kPart : columns;
                     const Statistics found = part_statistics(row, start, stop, how);
                     part[0] = found.peak;
                     part[rows] = found.total;
                     part[2 * rows] = found.weighted;
                     part[3 * rows] = labels[n] >= start && labels[n] < stop ? row[labels[n]] : 0.0f;
                 }
             });
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_merge_parts_f32(const float* parts, int64_t count, int64_t rows, float* whole) {
    if (count < 0 || rows < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (rows > 0 && (whole == nullptr || (count > 0 && parts == nullptr))) return SLIPSTREAM_NULL_POINTER;
    for (int64_t n = 0; n < rows; ++n) {
        Statistics found = {kLeast, 0.0f, 0.0f};
        float at_label = 0.0f;
        for (int64_t k = 0; k < count; ++k) {
            const float* part = parts + 4 * rows * k + n;
            const Statistics next = {part[0], part[rows], part[2 * rows]};
            found = k == 0 ? next : merged(found, next);
            at_label += part[3 * rows];
        }
        whole[n] = found.peak;
        whole[rows + n] = found.total;
        whole[2 * rows + n] = found.weighted;
        whole[3 * rows + n] = at_label;
    }
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_finish_parts_f32(const float* whole, int64_t rows, float* logprob, float* entropy,
                                               float* logsumexp) {
    if (rows < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (rows == 0) return SLIPSTREAM_OK;
    if (whole == nullptr || logprob == nullptr || entropy == nullptr || logsumexp == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    for (int64_t n = 0; n < rows; ++n) {
        const Scores scores = scores_of({whole[n], whole[rows + n], whole[2 * rows + n]}, whole[3 * rows + n]);
        logprob[n] = scores.logprob;
        entropy[n] = scores.entropy;
        logsumexp[n] = scores.logsumexp;
    }
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_logit_gradient_f32(float* logits, const int64_t* labels, const float* logsumexp,
                                                 const float* entropy, const float* grad_logprob,
                                                 const float* grad_entropy, const float* grad_logsumexp,
                                                 const float* inverse_temperature, int32_t per_row, float softcap,
                                                 const int64_t* chosen, int64_t count, int64_t columns,
                                                 int32_t threads) {
    if (count < 0 || columns < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (count == 0 || columns == 0) return SLIPSTREAM_OK;
    if (logits == nullptr || labels == nullptr || logsumexp == nullptr || entropy == nullptr ||
        inverse_temperature == nullptr || chosen == nullptr) {
        return SLIPSTREAM_NULL_POINTER;
    }
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1 && count * columns >= kParallelLogits)
    for (int64_t k = 0; k < count; ++k) {
        const int64_t n = chosen[k];
        const RowGradient g = {logsumexp[n],
                               entropy[n],
                               grad_logprob == nullptr ? 0.0f : grad_logprob[n],
                               grad_entropy == nullptr ? 0.0f : grad_entropy[n],
                               grad_logsumexp == nullptr ? 0.0f : grad_logsumexp[n],
                               inverse_temperature[per_row != 0 ? n : 0],
                               softcap};
        row_gradient(logits + n * columns, columns, labels[n], g);
    }
    // In order, and never upwards: no row is written over before it has moved.
    for (int64_t k = 0; k < count; ++k) {
        if (chosen[k] != k) {
            std::memcpy(logits + k * columns, logits + chosen[k] * columns, sizeof(float) * columns);
        }
    }
    return SLIPSTREAM_OK;
}
