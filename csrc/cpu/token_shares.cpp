// Each token's share of a policy loss, and the tokens that are trained at all.

#include "segments.h"
#include "slipstream.h"

namespace {

double weight_of(const float* weight, int64_t start, int64_t stop) {
    double total = 0.0;
    for (int64_t n = start; n < stop; ++n) total += weight[n];
    return total;
}

// The denominator of these tokens alone.
double own_normalizer(const float* weight, const int64_t* cu_seqlens, int64_t segments, int64_t tokens,
                      int32_t aggregation, float fixed_length) {
    if (aggregation == SLIPSTREAM_TOKEN_MEAN) return weight_of(weight, 0, tokens);
    if (aggregation == SLIPSTREAM_FIXED) return static_cast<double>(segments) * fixed_length;
    double trained = 0.0;
    for (int64_t s = 0; s < segments; ++s) trained += weight_of(weight, cu_seqlens[s], cu_seqlens[s + 1]) > 0.0;
    return trained;
}

}  // namespace

extern "C" int32_t slipstream_token_shares_f32(const float* weight, const int64_t* cu_seqlens, int64_t segments,
                                               int64_t tokens, int32_t aggregation, float fixed_length,
                                               const float* normalizer, float* share, int64_t* trained,
                                               int64_t* trained_bounds, int64_t* trained_count) {
    constexpr float kTiny = 1.17549435e-38f;
    if (segments < 0 || tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (cu_seqlens == nullptr || trained_bounds == nullptr || trained_count == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (tokens > 0 && (weight == nullptr || share == nullptr || trained == nullptr)) return SLIPSTREAM_NULL_POINTER;
    if (!segments_are_valid(cu_seqlens, segments, tokens)) return SLIPSTREAM_BAD_SEGMENTS;
    const float whole = normalizer != nullptr ? *normalizer
                                              : static_cast<float>(own_normalizer(weight, cu_seqlens, segments, tokens,
                                                                                  aggregation, fixed_length));
    const float divisor = whole < kTiny ? kTiny : whole;
    int64_t count = 0;
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t start = cu_seqlens[s], stop = cu_seqlens[s + 1];
        const bool mean = aggregation == SLIPSTREAM_SEQUENCE_MEAN_TOKEN_MEAN;
        const float length = mean ? static_cast<float>(weight_of(weight, start, stop)) : 1.0f;
        trained_bounds[s] = count;
        for (int64_t n = start; n < stop; ++n) {
            const bool live = weight[n] > 0.0f;
            share[n] = live ? weight[n] / divisor / length : 0.0f;
            trained[count] = n;
            count += live;
        }
    }
    trained_bounds[segments] = count;
    *trained_count = count;
    return SLIPSTREAM_OK;
}
