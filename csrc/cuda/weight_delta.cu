// Encoding deltas between two versions of 16-bit weights; the byte format is stated in slipstream.h.
//
// One warp takes a block of 512 values, one thread block a tile of 64 of them. Lane l has the values 8 l .. 8 l + 7 of
// each half of a block: byte l and byte 32 + l of its bitmap. A plan reads the weights once and keeps bitmaps, entries
// and, for each tile, where its values and positions begin; writing reads only those and the changed values.

#include "delta_tiles.cuh"

using namespace slipstream;

namespace {

// A block's values in two versions: 8 of each half, as four words of two values.
struct Values {
    uint4 half[2];
};

__device__ __forceinline__ uint32_t word_of(const uint4& four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Values past the end are zero.
__device__ __forceinline__ Values load_values(const uint16_t* from, const Place& place) {
    Values values;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = place.first + 256 * half + 8 * place.lane;
        if (place.whole) {
            values.half[half] = *reinterpret_cast<const uint4*>(from + first);
            continue;
        }
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (first + i < place.count) words[i / 2] |= static_cast<uint32_t>(from[first + i]) << (16 * (i % 2));
        }
        values.half[half] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return values;
}

__device__ __forceinline__ uint32_t to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

__device__ __forceinline__ Values load_rounded(const float* from, const Place& place) {
    Values values;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = place.first + 256 * half + 8 * place.lane;
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
            if (place.whole) {
                four = *reinterpret_cast<const float4*>(from + first + i);
            } else {
                if (first + i < place.count) four.x = from[first + i];
                if (first + i + 1 < place.count) four.y = from[first + i + 1];
                if (first + i + 2 < place.count) four.z = from[first + i + 2];
                if (first + i + 3 < place.count) four.w = from[first + i + 3];
            }
            words[i / 2] = to_bfloat16(four.x) | to_bfloat16(four.y) << 16;
            words[i / 2 + 1] = to_bfloat16(four.z) | to_bfloat16(four.w) << 16;
        }
        values.half[half] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return values;
}

__device__ __forceinline__ void store_values(const Values& values, const Place& place, uint16_t* to) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = place.first + 256 * half + 8 * place.lane;
        if (place.whole) {
            *reinterpret_cast<uint4*>(to + first) = values.half[half];
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = word_of(values.half[half], i / 2);
            if (first + i < place.count) to[first + i] = static_cast<uint16_t>(word >> (16 * (i % 2)));
        }
    }
}

// This lane's bytes of the bitmap, half 0 in the low byte and half 1 in the next.
__device__ __forceinline__ uint32_t changed_bits(const Values& before, const Values& after) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t differs = word_of(before.half[i / 4], i % 4) ^ word_of(after.half[i / 4], i % 4);
        bits |= ((differs & 0xffffu) != 0 ? 1u : 0u) << (2 * i) | (differs >> 16 != 0 ? 2u : 0u) << (2 * i);
    }
    return bits;
}

// What this lane's values add to the sum of checksum64.
__device__ __forceinline__ uint64_t checksum_part(const Values& values, const Place& place) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Words of 8 bytes hold 4 values.
        const int64_t first = place.first + 256 * (i / 2) + 8 * place.lane + 4 * (i % 2);
        const uint4& four = values.half[i / 2];
        const uint64_t low = i % 2 == 0 ? four.x : four.z, high = i % 2 == 0 ? four.y : four.w;
        if (first < place.count) sum += mixed_word(high << 32 | low, first / 4);
    }
    return sum;
}

// Fills bitmaps, entries and sums of tiles. kCast: `source` is float32 and its rounding replaces `weights`.
template <bool kCast>
__global__ void __launch_bounds__(kTileThreads)
    plan_tile(const void* source, uint16_t* weights, const uint16_t* old, int64_t count, Workspace workspace) {
    uint64_t base_sum = 0, result_sum = 0;
    uint32_t tile_changed = 0, tile_bytes = 0;
    for (int i = 0; i < kBlocksOfWarp; ++i) {
        const Place place(count, i);
        if (!place.exists) break;
        const Values before = load_values(kCast ? weights : old, place);
        const Values after = kCast ? load_rounded(static_cast<const float*>(source), place)
                                   : load_values(static_cast<const uint16_t*>(source), place);
        const uint32_t bits = changed_bits(before, after);
        if (kCast) store_values(after, place, weights);
        base_sum += checksum_part(before, place);
        result_sum += checksum_part(after, place);
        uint8_t* bitmap = workspace.bitmaps + place.block * kBitmapBytes;
        bitmap[place.lane] = static_cast<uint8_t>(bits);
        bitmap[kWarp + place.lane] = static_cast<uint8_t>(bits >> 8);
        const Gaps gaps(bits, place.lane);
        const int changed = __reduce_add_sync(kAllLanes, __popc(bits));
        const int escapes = __reduce_add_sync(kAllLanes, gaps.escapes[0] + gaps.escapes[1]);
        const uint32_t entry = make_entry(changed, escapes);
        if (place.lane == 0) workspace.entries[place.block] = static_cast<uint16_t>(entry);
        tile_changed += entry_changed(entry);
        tile_bytes += entry_bytes(entry);
    }
    base_sum = warp_sum(base_sum);
    result_sum = warp_sum(result_sum);
    __shared__ uint32_t sums[2];
    if (threadIdx.x < 2) sums[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
        add_to(&workspace.sums[0], base_sum);
        add_to(&workspace.sums[1], result_sum);
        atomicAdd(&sums[0], tile_changed);
        atomicAdd(&sums[1], tile_bytes);
    }
    __syncthreads();
    if (threadIdx.x == 0) workspace.tiles[blockIdx.x] = make_ulonglong2(sums[0], sums[1]);
}

__global__ void finish_plan(int64_t count, uint64_t base_version, uint64_t new_version, Workspace workspace,
                            int64_t* delta_bytes) {
    const ulonglong2 total = workspace.tiles[tiles_of(count)];
    DeltaHeader header = {};
    header.magic = kDeltaMagic;
    header.format = kDeltaFormat;
    header.block_values = kBlockValues;
    header.count = count;
    header.base_version = base_version;
    header.new_version = new_version;
    header.base_checksum = mix64(2 * static_cast<uint64_t>(count) + workspace.sums[0]);
    header.result_checksum = mix64(2 * static_cast<uint64_t>(count) + workspace.sums[1]);
    header.changed = total.x;
    header.position_bytes = total.y;
    *workspace.header = header;
    *delta_bytes = DeltaLayout(count, static_cast<int64_t>(total.x), static_cast<int64_t>(total.y)).size;
}

// Writes header, entries and the zeros that pad each part.
__global__ void __launch_bounds__(kTileThreads)
    write_frame(int64_t count, Workspace workspace, uint8_t* delta, int64_t delta_bytes) {
    const DeltaHeader header = *workspace.header;
    if (!header_is_sound(header, count, delta_bytes)) return;
    const DeltaLayout layout(count, static_cast<int64_t>(header.changed), static_cast<int64_t>(header.position_bytes));
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
    const int64_t blocks = blocks_of(count);
    auto* entries = reinterpret_cast<uint16_t*>(delta + layout.entries);
    for (int64_t b = thread; b < blocks; b += static_cast<int64_t>(gridDim.x) * kTileThreads) {
        entries[b] = workspace.entries[b];
    }
    if (thread != 0) return;
    *reinterpret_cast<DeltaHeader*>(delta) = header;
    for (int64_t i = layout.entries + 2 * blocks; i < layout.positions; ++i) delta[i] = 0;
    for (int64_t i = layout.positions + static_cast<int64_t>(header.position_bytes); i < layout.values; ++i)
        delta[i] = 0;
    for (int64_t i = layout.values + 2 * static_cast<int64_t>(header.changed); i < layout.trailer; ++i) delta[i] = 0;
}

// Writes the positions and changed values of a tile's blocks.
__global__ void __launch_bounds__(kTileThreads)
    write_tile(const uint16_t* after, int64_t count, Workspace workspace, uint8_t* delta, int64_t delta_bytes) {
    const DeltaHeader header = *workspace.header;
    if (!header_is_sound(header, count, delta_bytes)) return;
    const DeltaLayout layout(count, static_cast<int64_t>(header.changed), static_cast<int64_t>(header.position_bytes));
    Offsets at(workspace.tiles[blockIdx.x], workspace.entries, count);
    for (int i = 0; i < kBlocksOfWarp; ++i) {
        const Place place(count, i);
        if (!place.exists) break;
        const uint32_t entry = workspace.entries[place.block];
        const uint8_t* bitmap = workspace.bitmaps + place.block * kBitmapBytes;
        const uint32_t bits = bitmap[place.lane] | static_cast<uint32_t>(bitmap[kWarp + place.lane]) << 8;
        const Gaps gaps(bits, place.lane);
        // Both halves in one scan: their counts stay below 2^16.
        const uint32_t counts = __popc(bits & 0xffu) | __popc(bits >> 8) << 16;
        const Halves values(counts), lengths(counts + (gaps.escapes[0] | gaps.escapes[1] << 16));
        uint8_t* positions = delta + layout.positions + at.bytes;
        auto* changed = reinterpret_cast<uint16_t*>(delta + layout.values) + at.changed;
        const bool as_bitmap = (entry & kBitmapFlag) != 0;
        if (as_bitmap) {
            positions[place.lane] = static_cast<uint8_t>(bits);
            positions[kWarp + place.lane] = static_cast<uint8_t>(bits >> 8);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int value = values.before[half], byte = lengths.before[half], next = gaps.next[half];
            for (uint32_t rest = bits >> (8 * half) & 0xffu; rest != 0; rest &= rest - 1) {
                const int position = 256 * half + 8 * place.lane + __ffs(rest) - 1;
                changed[value++] = after[place.first + position];
                if (!as_bitmap) {
                    int gap = position - next;
                    for (; gap >= kEscape; gap -= kEscape) positions[byte++] = kEscape;
                    positions[byte++] = static_cast<uint8_t>(gap);
                }
                next = position + 1;
            }
        }
        at.advance(entry);
    }
}

int32_t check_plan(const void* before, const void* after, int64_t count, const void* workspace, int64_t workspace_bytes,
                   const int64_t* delta_bytes) {
    if (count < 0 || count > kMostValues) return SLIPSTREAM_NEGATIVE_SIZE;
    if (workspace == nullptr || delta_bytes == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (count > 0 && (before == nullptr || after == nullptr)) return SLIPSTREAM_NULL_POINTER;
    if (!aligned(before, 16) || !aligned(after, 16) || !aligned(workspace, 8)) return SLIPSTREAM_MISALIGNED;
    return workspace_bytes < workspace_of(count) ? SLIPSTREAM_TOO_SMALL : SLIPSTREAM_OK;
}

template <bool kCast>
int32_t plan(const void* source, uint16_t* weights, const uint16_t* old, int64_t count, uint64_t base_version,
             uint64_t new_version, void* memory, int64_t* delta_bytes, void* stream) {
    const Workspace workspace(memory, count);
    const cudaStream_t queue = stream_of(stream);
    const cudaError_t error = cudaMemsetAsync(workspace.sums, 0, kSumBytes, queue);
    if (error != cudaSuccess) return status_of(error);
    const int64_t tiles = tiles_of(count);
    if (tiles > 0) {
        plan_tile<kCast>
            <<<static_cast<unsigned>(tiles), kTileThreads, 0, queue>>>(source, weights, old, count, workspace);
    }
    scan_tiles<<<1, kScanThreads, 0, queue>>>(workspace.tiles, tiles);
    finish_plan<<<1, 1, 0, queue>>>(count, base_version, new_version, workspace, delta_bytes);
    return queued();
}

}  // namespace

extern "C" int32_t slipstream_cuda_delta_plan(const uint16_t* before, const uint16_t* after, int64_t count,
                                              uint64_t base_version, uint64_t new_version, void* workspace,
                                              int64_t workspace_bytes, int64_t* delta_bytes, void* stream) {
    const int32_t status = check_plan(before, after, count, workspace, workspace_bytes, delta_bytes);
    if (status != SLIPSTREAM_OK) return status;
    return plan<false>(after, nullptr, before, count, base_version, new_version, workspace, delta_bytes, stream);
}

extern "C" int32_t slipstream_cuda_delta_plan_cast(const float* master, uint16_t* weights, int64_t count,
                                                   uint64_t base_version, uint64_t new_version, void* workspace,
                                                   int64_t workspace_bytes, int64_t* delta_bytes, void* stream) {
    const int32_t status = check_plan(master, weights, count, workspace, workspace_bytes, delta_bytes);
    if (status != SLIPSTREAM_OK) return status;
    return plan<true>(master, weights, nullptr, count, base_version, new_version, workspace, delta_bytes, stream);
}

extern "C" int32_t slipstream_cuda_delta_write(const uint16_t* after, int64_t count, const void* memory, uint8_t* delta,
                                               int64_t delta_bytes, void* stream) {
    if (count < 0 || count > kMostValues || delta_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (memory == nullptr || delta == nullptr || (after == nullptr && count > 0)) return SLIPSTREAM_NULL_POINTER;
    if (!aligned(memory, 8) || !aligned(delta, 8)) return SLIPSTREAM_MISALIGNED;
    const Workspace workspace(const_cast<void*>(memory), count);
    if (delta_bytes < DeltaLayout(count, 0, 0).size) return SLIPSTREAM_TOO_SMALL;
    const cudaStream_t queue = stream_of(stream);
    write_frame<<<grid_of(blocks_of(count), kTileThreads), kTileThreads, 0, queue>>>(count, workspace, delta,
                                                                                     delta_bytes);
    const int64_t tiles = tiles_of(count);
    if (tiles > 0) {
        write_tile<<<static_cast<unsigned>(tiles), kTileThreads, 0, queue>>>(after, count, workspace, delta,
                                                                             delta_bytes);
    }
    const int32_t status = queued();
    if (status != SLIPSTREAM_OK) return status;
    auto* trailer = reinterpret_cast<uint64_t*>(delta + delta_bytes - 8);
    return slipstream_cuda_checksum64(delta, delta_bytes - 8, trailer, stream);
}
