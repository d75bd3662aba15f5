// Affine reverse scan over packed segments, as one flat scan: reduce each tile, then scan it with what follows it.
//
// A token is the map x -> a x + b, and a stretch of tokens the composition of its own. The last token of a segment has
// a = 0, so nothing passes from one segment into another, and no keys are needed.

#include <cub/block/block_scan.cuh>

#include "segment_tiles.cuh"

using namespace slipstream;

namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;
constexpr int kTile = kThreads * kItems;

struct Affine {
    float a, b;
};

// `later` is applied after `earlier`; selected where a is 0, because 0 * inf would be NaN.
__device__ __forceinline__ Affine compose(Affine earlier, Affine later) {
    return {later.a * earlier.a, later.a == 0.0f ? later.b : fmaf(later.a, earlier.b, later.b)};
}

struct Compose {
    __device__ __forceinline__ Affine operator()(const Affine& earlier, const Affine& later) const {
        return compose(earlier, later);
    }
};

using BlockScan = cub::BlockScan<Affine, kThreads>;

struct Shared {
    typename BlockScan::TempStorage scan;
    unsigned ends[kTile / 32];
};

// What all tiles after `tile` give, nearest tiles first; done as soon as a segment has ended.
__device__ float carry_into(const Affine* tiles, int64_t tile, int64_t count,
                            typename BlockScan::TempStorage& storage) {
    Affine total = {1.0f, 0.0f};
    for (int64_t first = tile + 1; first < count && total.a != 0.0f; first += kThreads) {
        const int64_t mine = first + kThreads - 1 - threadIdx.x;
        const Affine one = mine < count ? tiles[mine] : Affine{1.0f, 0.0f};
        Affine before, window;
        BlockScan(storage).ExclusiveScan(one, before, Affine{1.0f, 0.0f}, Compose(), window);
        total = compose(window, total);
        __syncthreads();
    }
    return total.b;
}

// kWrite false: writes the composition of each tile. kWrite true: scans the tiles with what follows them.
template <bool kWrite>
__global__ void __launch_bounds__(kThreads)
    scan_tile(const float* decay, const float* input, const int64_t* cu_seqlens, int64_t segments, int64_t tokens,
              bool vectors, Affine* tiles, float* output) {
    __shared__ Shared shared;
    const int64_t tile_first = static_cast<int64_t>(blockIdx.x) * kTile;
    // Thread 0 has the last tokens, so that a scan over threads runs backwards over tokens.
    const int mine = (kThreads - 1 - static_cast<int>(threadIdx.x)) * kItems;
    const int64_t first = tile_first + mine;
    // Loads before the search, which waits for memory several times.
    float a[kItems], b[kItems];
    load_tokens<kItems>(decay, first, tokens, vectors, a);
    load_tokens<kItems>(input, first, tokens, vectors, b);
    for (int i = threadIdx.x; i < kTile / 32; i += kThreads) shared.ends[i] = 0;
    __syncthreads();
    visit_ends<kThreads>(cu_seqlens, segments, tile_first, min(tile_first + kTile, tokens),
                         [&](int token, int64_t) { atomicOr(&shared.ends[token / 32], 1u << (token % 32)); });
    __syncthreads();
    const unsigned ends = shared.ends[mine / 32] >> (mine % 32);
    Affine total = {1.0f, 0.0f};
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        if (ends >> i & 1u) a[i] = 0.0f;
        total = compose(total, {a[i], b[i]});
    }
    float carry = 0.0f;
    if (kWrite) carry = carry_into(tiles, blockIdx.x, gridDim.x, shared.scan);
    Affine before, whole;
    BlockScan(shared.scan).ExclusiveScan(total, before, Affine{kWrite ? 0.0f : 1.0f, carry}, Compose(), whole);
    if (!kWrite) {
        if (threadIdx.x == 0) tiles[blockIdx.x] = whole;
        return;
    }
    float value = before.b;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        value = a[i] == 0.0f ? b[i] : fmaf(a[i], value, b[i]);
        b[i] = value;
    }
    store_tokens<kItems>(output, first, tokens, vectors, b);
}

}  // namespace

extern "C" int32_t slipstream_cuda_segment_scan_f32(const float* decay, const float* input, const int64_t* cu_seqlens,
                                                    int64_t segments, int64_t tokens, void* workspace,
                                                    int64_t workspace_bytes, float* output, void* stream) {
    if (segments < 0 || tokens < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (cu_seqlens == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (tokens == 0) return SLIPSTREAM_OK;
    if (decay == nullptr || input == nullptr || output == nullptr || workspace == nullptr)
        return SLIPSTREAM_NULL_POINTER;
    const int64_t tiles = (tokens + kTile - 1) / kTile;
    if (workspace_bytes < tiles * static_cast<int64_t>(sizeof(Affine))) return SLIPSTREAM_TOO_SMALL;
    const bool vectors = aligned(decay, 16) && aligned(input, 16) && aligned(output, 16);
    const auto grid = static_cast<unsigned>(tiles);
    auto* compositions = static_cast<Affine*>(workspace);
    const cudaStream_t queue = stream_of(stream);
    scan_tile<false>
        <<<grid, kThreads, 0, queue>>>(decay, input, cu_seqlens, segments, tokens, vectors, compositions, output);
    scan_tile<true>
        <<<grid, kThreads, 0, queue>>>(decay, input, cu_seqlens, segments, tokens, vectors, compositions, output);
    return queued();
}
