// How the kernels for deltas divide their work: warps, blocks of 512 values, tiles of 64 blocks.

#ifndef SLIPSTREAM_DELTA_TILES_CUH
#define SLIPSTREAM_DELTA_TILES_CUH

#include "delta_format.h"
#include "launch.cuh"
#include "mix64.cuh"

namespace slipstream {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kTileBlocks = 64;
constexpr int kBlocksOfWarp = kTileBlocks / kTileWarps;
constexpr int kScanThreads = 256;
constexpr int kSumBytes = 16;

inline __host__ __device__ int64_t tiles_of(int64_t count) {
    return (blocks_of(count) + kTileBlocks - 1) / kTileBlocks;
}

// The parts of a workspace; tiles has one element more than there are tiles, for the totals.
struct Workspace {
    DeltaHeader* header;
    uint64_t* sums;
    uint8_t* bitmaps;
    uint16_t* entries;
    ulonglong2* tiles;

    Workspace(void* memory, int64_t count) {
        auto* at = static_cast<uint8_t*>(memory);
        header = reinterpret_cast<DeltaHeader*>(at);
        at += sizeof(DeltaHeader);
        sums = reinterpret_cast<uint64_t*>(at);
        at += kSumBytes;
        tiles = reinterpret_cast<ulonglong2*>(at);
        at += sizeof(ulonglong2) * (tiles_of(count) + 1);
        bitmaps = at;
        at += kBitmapBytes * blocks_of(count);
        entries = reinterpret_cast<uint16_t*>(at);
    }
};
// 64 + 16 + 16 (blocks / 64 + 2) + 64 blocks + 2 blocks is at most 128 + 72 blocks.

// Which block a warp has in its turn `i`.
struct Place {
    int64_t count, block, first;
    int lane;
    bool exists, whole;

    __device__ Place(int64_t all, int i) : count(all) {
        block = static_cast<int64_t>(blockIdx.x) * kTileBlocks + threadIdx.x / kWarp * kBlocksOfWarp + i;
        first = block * kBlockValues;
        lane = threadIdx.x % kWarp;
        exists = first < count;
        whole = first + kBlockValues <= count;
    }
    __device__ int values() const { return static_cast<int>(min(kBlockValues, count - first)); }
};

// Exclusive sums over the lanes of a warp of two numbers, the second after all of the first.
struct Halves {
    int before[2];
    int total;

    // packed: the first number in the low 16 bits, the second in the high ones.
    __device__ explicit Halves(uint32_t packed) {
        uint32_t sum = packed;
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += other;
        }
        const uint32_t all = __shfl_sync(0xffffffffu, sum, kWarp - 1), exclusive = sum - packed;
        before[0] = static_cast<int>(exclusive & 0xffffu);
        before[1] = static_cast<int>((all & 0xffffu) + (exclusive >> 16));
        total = static_cast<int>((all & 0xffffu) + (all >> 16));
    }
};

// Where the gap of this lane's first changed value begins, in each half, and how many escapes it takes; a later one
// takes none, because the values of a lane are neighbours.
struct Gaps {
    int next[2];
    int escapes[2];

    // bits: this lane's bytes of the bitmap.
    __device__ Gaps(uint32_t bits, int lane) {
        int end_of_half = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t byte = bits >> (8 * half) & 0xffu;
            // One past the last changed value of this lane.
            const int end = 256 * half + 8 * lane + 32 - __clz(byte);
            const uint32_t changed = __ballot_sync(0xffffffffu, byte != 0);
            const uint32_t earlier = changed & ((1u << lane) - 1u);
            const int from_lane = __shfl_sync(0xffffffffu, end, earlier != 0 ? 31 - __clz(earlier) : 0);
            next[half] = earlier != 0 ? from_lane : end_of_half;
            const int first = 256 * half + 8 * lane + __ffs(byte) - 1;
            escapes[half] = byte != 0 ? (first - next[half]) / kEscape : 0;
            const int last_end = __shfl_sync(0xffffffffu, end, changed != 0 ? 31 - __clz(changed) : 0);
            if (changed != 0) end_of_half = last_end;
        }
    }
};

// Where the values and position bytes of a warp's next block begin.
struct Offsets {
    int64_t changed, bytes;

    // tile: the offsets of the warp's tile.
    __device__ Offsets(ulonglong2 tile, const uint16_t* entries, int64_t count) {
        const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileBlocks, blocks = blocks_of(count);
        const int before = threadIdx.x / kWarp * kBlocksOfWarp;
        int earlier_changed = 0, earlier_bytes = 0;
        for (int i = threadIdx.x % kWarp; i < before; i += kWarp) {
            const uint32_t entry = first + i < blocks ? entries[first + i] : 0;
            earlier_changed += entry_changed(entry);
            earlier_bytes += entry_bytes(entry);
        }
        changed = static_cast<int64_t>(tile.x) + __reduce_add_sync(0xffffffffu, earlier_changed);
        bytes = static_cast<int64_t>(tile.y) + __reduce_add_sync(0xffffffffu, earlier_bytes);
    }
    __device__ void advance(uint32_t entry) {
        changed += entry_changed(entry);
        bytes += entry_bytes(entry);
    }
};

// Inclusive sums over the lanes of a warp.
__device__ __forceinline__ ulonglong2 warp_scan(ulonglong2 sum) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const unsigned long long x = __shfl_up_sync(kAllLanes, sum.x, step), y = __shfl_up_sync(kAllLanes, sum.y, step);
        if (lane >= step) {
            sum.x += x;
            sum.y += y;
        }
    }
    return sum;
}

// Turns the sums of tiles into where each begins, and puts the totals behind them; one thread block.
static __global__ void __launch_bounds__(kScanThreads) scan_tiles(ulonglong2* tiles, int64_t count) {
    constexpr int kWarps = kScanThreads / kWarp;
    __shared__ ulonglong2 of_warp[kWarps];
    const int warp = threadIdx.x / kWarp;
    ulonglong2 total = {0, 0};
    for (int64_t first = 0; first < count; first += kScanThreads) {
        const int64_t tile = first + threadIdx.x;
        const ulonglong2 mine = tile < count ? tiles[tile] : make_ulonglong2(0, 0);
        const ulonglong2 upto = warp_scan(mine);
        if (threadIdx.x % kWarp == kWarp - 1) of_warp[warp] = upto;
        __syncthreads();
        ulonglong2 begin = {total.x + upto.x - mine.x, total.y + upto.y - mine.y};
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            const ulonglong2 sum = of_warp[other];
            if (other < warp) {
                begin.x += sum.x;
                begin.y += sum.y;
            }
            total.x += sum.x;
            total.y += sum.y;
        }
        if (tile < count) tiles[tile] = begin;
        // Before the next round overwrites the sums.
        __syncthreads();
    }
    if (threadIdx.x == 0) tiles[count] = total;
}

}  // namespace slipstream

#endif
