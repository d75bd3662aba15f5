// Advantages and returns of packed segments: reduce each tile of tokens, then go through it with what follows it.
//
// What a token hands to the one before is its scan and its value, and a stretch of tokens maps what it is handed to
// what it hands on: scan -> a scan + c value + b, value -> v. Unsampled tokens map nothing; the last token of a segment
// takes what the segment ends with instead of what it is handed, so that nothing passes between segments.

#include <cub/block/block_scan.cuh>

#include "estimator_steps.h"
#include "segment_tiles.cuh"

using namespace slipstream;

namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;
constexpr int kTile = kThreads * kItems;
// As MAX_LOG_RATIO of the reference.
constexpr float kMostLogRatio = 20.0f;

constexpr unsigned kActs = 1;
// What is handed on is what a segment ends with: no step has been taken since.
constexpr unsigned kNoStep = 2;

struct Stretch {
    float a, b, c, v;
    unsigned flags;
};

__device__ __forceinline__ Stretch nothing() { return {1.0f, 0.0f, 0.0f, 0.0f, 0}; }

// 0 even of what is not finite: what a segment holds stays in it.
__device__ __forceinline__ float times(float factor, float value) { return factor == 0.0f ? 0.0f : factor * value; }

__device__ __forceinline__ Stretch compose(const Stretch& later, const Stretch& earlier) {
    if ((earlier.flags & kActs) == 0) return later;
    if ((later.flags & kActs) == 0) return earlier;
    return {times(earlier.a, later.a), earlier.b + times(earlier.a, later.b) + times(earlier.c, later.v),
            times(earlier.a, later.c), earlier.v, earlier.flags};
}

struct Compose {
    __device__ __forceinline__ Stretch operator()(const Stretch& later, const Stretch& earlier) const {
        return compose(later, earlier);
    }
};

// Whether what comes later is of no matter.
__device__ __forceinline__ bool is_closed(const Stretch& stretch) {
    return (stretch.flags & kActs) != 0 && stretch.a == 0.0f && stretch.c == 0.0f;
}

// What the end of a segment hands on. A return bootstraps from the scan too, and so does the last step's whole share.
template <int32_t kEstimator>
__device__ __forceinline__ Stretch end_of(float bootstrap) {
    return {0.0f, Needs<kEstimator>::kAdvantages ? 0.0f : bootstrap, 0.0f, bootstrap, kActs | kNoStep};
}

template <int32_t kEstimator>
__device__ __forceinline__ Stretch stretch_of(const slipstream_estimator& how, float value, float reward, float ratio) {
    const Step step = step_of<kEstimator>(how, Later<float>{0.0f, 0.0f, 0.0f, false}, value, reward, ratio);
    return {step.decay, step.input, slope_of<kEstimator>(how, step), value, kActs};
}

template <int32_t kEstimator>
__device__ __forceinline__ Later<float> handed_on(const Stretch& stretch) {
    if ((stretch.flags & kNoStep) != 0) return after_the_end<float>(stretch.v);
    return {stretch.b, stretch.v, stretch.v + stretch.b, false};
}

using BlockScan = cub::BlockScan<Stretch, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct Shared {
    typename BlockScan::TempStorage scan;
    unsigned ends[kTile / 32];
    float bootstrap[kTile];
};

// This thread's tokens. Thread 0 has the last ones, so that a scan over threads runs backwards over tokens.
struct Tokens {
    int64_t first;
    float value[kItems], reward[kItems], ratio[kItems];
    // A bit each.
    unsigned sampled, ends;
};

__device__ __forceinline__ unsigned load_sampled(const uint8_t* from, int64_t first, int64_t tokens, bool vectors) {
    unsigned sampled = 0;
    if (vectors && first + kItems <= tokens) {
        const uint2 eight = *reinterpret_cast<const uint2*>(from + first);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            sampled |= ((i < 4 ? eight.x : eight.y) >> 8 * (i % 4) & 0xffu) != 0 ? 1u << i : 0u;
        }
        return sampled;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) sampled |= first + i < tokens && from[first + i] != 0 ? 1u << i : 0u;
    return sampled;
}

template <int32_t kEstimator>
__device__ __forceinline__ Tokens load(const slipstream_steps& in, bool vectors, Shared& shared) {
    using Need = Needs<kEstimator>;
    const int64_t tile_first = static_cast<int64_t>(blockIdx.x) * kTile;
    const int mine = (kThreads - 1 - static_cast<int>(threadIdx.x)) * kItems;
    Tokens own;
    own.first = tile_first + mine;
    // Loads before the search, which waits for memory several times.
    own.sampled = load_sampled(in.sampled, own.first, in.tokens, vectors);
    load_tokens<kItems>(in.reward, own.first, in.tokens, vectors, own.reward);
    if (Need::kValues) load_tokens<kItems>(in.value, own.first, in.tokens, vectors, own.value);
    if (Need::kRatios) load_tokens<kItems>(in.ratio, own.first, in.tokens, vectors, own.ratio);
    for (int i = threadIdx.x; i < kTile / 32; i += kThreads) shared.ends[i] = 0;
    __syncthreads();
    visit_ends<kThreads>(in.cu_seqlens, in.segments, tile_first, min(tile_first + kTile, in.tokens),
                         [&](int token, int64_t segment) {
                             atomicOr(&shared.ends[token / 32], 1u << (token % 32));
                             shared.bootstrap[token] = in.bootstrap == nullptr ? 0.0f : in.bootstrap[segment];
                         });
    __syncthreads();
    own.ends = shared.ends[mine / 32] >> (mine % 32);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (!Need::kValues) own.value[i] = 0.0f;
        own.ratio[i] = Need::kRatios ? expf(at_most(own.ratio[i], kMostLogRatio)) : 1.0f;
    }
    return own;
}

template <int32_t kEstimator>
__device__ __forceinline__ Stretch stretch_of(const slipstream_estimator& how, const Tokens& own, const Shared& shared) {
    const int mine = (kThreads - 1 - static_cast<int>(threadIdx.x)) * kItems;
    Stretch total = nothing();
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        if ((own.ends >> i & 1u) != 0) total = end_of<kEstimator>(shared.bootstrap[mine + i]);
        if ((own.sampled >> i & 1u) != 0) {
            total = compose(total, stretch_of<kEstimator>(how, own.value[i], own.reward[i], own.ratio[i]));
        }
    }
    return total;
}

// What all tiles after `tile` hand on, nearest tiles first; done as soon as the rest is of no matter.
__device__ Stretch carry_into(const Stretch* tiles, int64_t tile, int64_t count,
                              typename BlockScan::TempStorage& storage) {
    // The nearest one alone, because it nearly always ends a segment.
    Stretch total = tile + 1 < count ? tiles[tile + 1] : nothing();
    for (int64_t first = tile + 2; first < count && !is_closed(total); first += kThreads) {
        const int64_t mine = first + kThreads - 1 - threadIdx.x;
        const Stretch one = mine < count ? tiles[mine] : nothing();
        Stretch before, window;
        BlockScan(storage).ExclusiveScan(one, before, nothing(), Compose(), window);
        total = compose(window, total);
        __syncthreads();
    }
    return total;
}

template <int32_t kEstimator>
__global__ void __launch_bounds__(kThreads)
    reduce_tile(slipstream_steps in, slipstream_estimator how, bool vectors, Stretch* tiles) {
    __shared__ Shared shared;
    const Tokens own = load<kEstimator>(in, vectors, shared);
    Stretch before, whole;
    BlockScan(shared.scan)
        .ExclusiveScan(stretch_of<kEstimator>(how, own, shared), before, nothing(), Compose(), whole);
    if (threadIdx.x == 0) tiles[blockIdx.x] = whole;
}

template <int32_t kEstimator>
__global__ void __launch_bounds__(kThreads)
    estimate_tile(slipstream_steps in, slipstream_estimator how, bool vectors, const Stretch* tiles, float* advantage,
                  float* target) {
    using Need = Needs<kEstimator>;
    __shared__ Shared shared;
    Tokens own = load<kEstimator>(in, vectors, shared);
    const Stretch carry = carry_into(tiles, blockIdx.x, gridDim.x, shared.scan);
    Stretch before, whole;
    BlockScan(shared.scan).ExclusiveScan(stretch_of<kEstimator>(how, own, shared), before, carry, Compose(), whole);
    const int mine = (kThreads - 1 - static_cast<int>(threadIdx.x)) * kItems;
    Later<float> later = handed_on<kEstimator>(before);
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        if ((own.ends >> i & 1u) != 0) later = after_the_end<float>(shared.bootstrap[mine + i]);
        const Estimate made = take_step<kEstimator>(how, later, (own.sampled >> i & 1u) != 0, own.value[i],
                                                    own.reward[i], own.ratio[i]);
        // In place of what has been read.
        own.value[i] = made.target;
        own.reward[i] = made.advantage;
    }
    store_tokens<kItems>(target, own.first, in.tokens, vectors, own.value);
    if (Need::kAdvantages) store_tokens<kItems>(advantage, own.first, in.tokens, vectors, own.reward);
}

template <int32_t kEstimator>
void queue_passes(const slipstream_steps& in, const slipstream_estimator& how, bool vectors, Stretch* tiles,
                  float* advantage, float* target, cudaStream_t queue) {
    const auto grid = static_cast<unsigned>((in.tokens + kTile - 1) / kTile);
    if (grid > 1) reduce_tile<kEstimator><<<grid, kThreads, 0, queue>>>(in, how, vectors, tiles);
    estimate_tile<kEstimator><<<grid, kThreads, 0, queue>>>(in, how, vectors, tiles, advantage, target);
}

bool may_use_vectors(const slipstream_steps& in, const float* advantage, const float* target) {
    // Null is aligned.
    return aligned(in.sampled, 8) && aligned(in.value, 16) && aligned(in.reward, 16) && aligned(in.ratio, 16) &&
           aligned(advantage, 16) && aligned(target, 16);
}

}  // namespace

extern "C" int32_t slipstream_cuda_estimate_f32(const slipstream_steps* steps, const slipstream_estimator* estimator,
                                                void* workspace, int64_t workspace_bytes, float* advantage,
                                                float* target, void* stream) {
    if (steps == nullptr || estimator == nullptr || steps->cu_seqlens == nullptr) return SLIPSTREAM_NULL_POINTER;
    const slipstream_steps& in = *steps;
    const slipstream_estimator& how = *estimator;
    if (in.segments < 0 || in.tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (in.tokens == 0) return SLIPSTREAM_OK;
    if (!arrays_are_there(in, how.kind, advantage, target)) return SLIPSTREAM_NULL_POINTER;
    auto* tiles = static_cast<Stretch*>(workspace);
    if (in.tokens > kTile) {
        if (tiles == nullptr) return SLIPSTREAM_NULL_POINTER;
        const int64_t bytes = (in.tokens + kTile - 1) / kTile * static_cast<int64_t>(sizeof(Stretch));
        if (workspace_bytes < bytes) return SLIPSTREAM_TOO_SMALL;
    }
    const bool vectors = may_use_vectors(in, advantage, target);
    const cudaStream_t queue = stream_of(stream);
    switch (how.kind) {
        case SLIPSTREAM_GAE:
            queue_passes<SLIPSTREAM_GAE>(in, how, vectors, tiles, advantage, target, queue);
            break;
        case SLIPSTREAM_TD_LAMBDA:
            queue_passes<SLIPSTREAM_TD_LAMBDA>(in, how, vectors, tiles, advantage, target, queue);
            break;
        case SLIPSTREAM_VTRACE:
            queue_passes<SLIPSTREAM_VTRACE>(in, how, vectors, tiles, advantage, target, queue);
            break;
        default:
            queue_passes<SLIPSTREAM_RETURN>(in, how, vectors, tiles, advantage, target, queue);
    }
    return queued();
}
