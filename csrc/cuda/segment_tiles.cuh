// What kernels share that scan packed segments backwards, a tile of tokens to a block.

#ifndef SLIPSTREAM_SEGMENT_TILES_CUH
#define SLIPSTREAM_SEGMENT_TILES_CUH

#include "launch.cuh"

namespace slipstream {

// Calls visit(token, segment) for each segment whose last token lies in the tile [first, last), with its place there;
// all threads of the block take part. Bounds that fall are passed over.
template <int kThreads, typename Visit>
__device__ __forceinline__ void visit_ends(const int64_t* cu_seqlens, int64_t segments, int64_t first, int64_t last,
                                           Visit visit) {
    // How many segments end at or before `first`: all threads probe, and the range shrinks kThreads times a round.
    int64_t low = 0, left = segments;
    while (left > 0) {
        const int64_t step = (left + kThreads - 1) / kThreads;
        const int64_t probe = (threadIdx.x + 1) * step;
        const int passed = __syncthreads_count(probe <= left && cu_seqlens[low + probe] <= first);
        low += passed * step;
        left = min(step - 1, left - passed * step);
    }
    for (int64_t s = low + threadIdx.x; s < segments; s += kThreads) {
        const int64_t end = cu_seqlens[s + 1];
        if (end > last) break;
        if (end > first && end > cu_seqlens[s]) visit(static_cast<int>(end - 1 - first), s);
    }
}

// Loads this thread's tokens, in order; tokens past the end are 0, which no other token sees.
template <int kItems>
__device__ __forceinline__ void load_tokens(const float* from, int64_t first, int64_t tokens, bool vectors,
                                            float* values) {
    if (vectors && first + kItems <= tokens) {
#pragma unroll
        for (int i = 0; i < kItems; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + first + i);
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) values[i] = first + i < tokens ? from[first + i] : 0.0f;
}

template <int kItems>
__device__ __forceinline__ void store_tokens(float* to, int64_t first, int64_t tokens, bool vectors,
                                             const float* values) {
    if (vectors && first + kItems <= tokens) {
#pragma unroll
        for (int i = 0; i < kItems; i += 4) {
            *reinterpret_cast<float4*>(to + first + i) =
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (first + i < tokens) to[first + i] = values[i];
    }
}

}  // namespace slipstream

#endif
