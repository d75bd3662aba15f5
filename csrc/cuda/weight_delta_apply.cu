// Applying deltas; the byte format is stated in slipstream.h.
//
// Work is divided as in encoding. Each kernel does nothing once a check before it has failed.

#include "delta_tiles.cuh"

using namespace slipstream;

namespace {

// One word on the device stands for all that follows: SLIPSTREAM_OK, or the first failure.
__device__ __forceinline__ bool fails(const int32_t* status) {
    return *reinterpret_cast<const volatile int32_t*>(status) != 0;
}

// The same answer for all lanes of a warp, which go on together.
__device__ __forceinline__ bool warp_fails(const int32_t* status) { return __any_sync(kAllLanes, fails(status)); }

__device__ __forceinline__ DeltaLayout layout_of(const uint8_t* delta, int64_t count) {
    const auto* header = reinterpret_cast<const DeltaHeader*>(delta);
    return DeltaLayout(count, static_cast<int64_t>(header->changed), static_cast<int64_t>(header->position_bytes));
}

__device__ __forceinline__ const uint16_t* entries_of(const uint8_t* delta) {
    return reinterpret_cast<const uint16_t*>(delta + sizeof(DeltaHeader));
}

__global__ void check_header(const uint8_t* delta, int64_t count, int64_t delta_bytes, const uint64_t* checksum,
                             int32_t* status) {
    const bool sound = header_is_sound(*reinterpret_cast<const DeltaHeader*>(delta), count, delta_bytes) &&
                       *reinterpret_cast<const uint64_t*>(delta + delta_bytes - 8) == *checksum;
    *status = sound ? SLIPSTREAM_OK : SLIPSTREAM_BAD_DELTA;
}

// Sums the entries of each tile, once they are sound; one warp a tile.
__global__ void __launch_bounds__(kTileThreads)
    sum_entries(const uint8_t* delta, int64_t count, ulonglong2* tiles, int32_t* status) {
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTileWarps + threadIdx.x / kWarp;
    if (tile >= tiles_of(count) || warp_fails(status)) return;
    const uint16_t* entries = entries_of(delta);
    int changed = 0, bytes = 0;
    for (int i = threadIdx.x % kWarp; i < kTileBlocks; i += kWarp) {
        const int64_t block = tile * kTileBlocks + i, left = count - block * kBlockValues;
        if (left <= 0) break;
        if (!entry_is_sound(entries[block], min(kBlockValues, left))) *status = SLIPSTREAM_BAD_DELTA;
        changed += entry_changed(entries[block]);
        bytes += entry_bytes(entries[block]);
    }
    changed = __reduce_add_sync(kAllLanes, changed);
    bytes = __reduce_add_sync(kAllLanes, bytes);
    if (threadIdx.x % kWarp == 0) tiles[tile] = make_ulonglong2(changed, bytes);
}

__global__ void check_totals(const uint8_t* delta, int64_t count, const ulonglong2* tiles, int32_t* status) {
    if (fails(status)) return;
    const auto* header = reinterpret_cast<const DeltaHeader*>(delta);
    const ulonglong2 total = tiles[tiles_of(count)];
    if (total.x != header->changed || total.y != header->position_bytes) *status = SLIPSTREAM_BAD_DELTA;
}

// The changed values of a block as this lane has them, two at most from gaps, sixteen from a bitmap.
struct Changes {
    bool sound;
    uint32_t bits;
    int position[2];
    int rank[2];

    // From this lane's bytes of a bitmap.
    __device__ void read_bitmap(const uint8_t* bytes, uint32_t entry, const Place& place) {
        bits = bytes[place.lane] | static_cast<uint32_t>(bytes[kWarp + place.lane]) << 8;
        const Halves ranks(__popc(bits & 0xffu) | __popc(bits >> 8) << 16);
        rank[0] = ranks.before[0], rank[1] = ranks.before[1];
        bool inside = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t byte = bits >> (8 * half) & 0xffu;
            inside &= byte == 0 || 256 * half + 8 * place.lane + 31 - __clz(byte) < place.values();
        }
        sound = __all_sync(kAllLanes, inside && ranks.total == entry_changed(entry));
    }

    // From gaps: a byte is a step from one changed value to the next, or an escape.
    __device__ void read_gaps(const uint8_t* bytes, uint32_t entry, const Place& place) {
        const int size = entry_bytes(entry);
        uint32_t steps = 0, ends = 0;
        bool escape_last = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = kWarp * half + place.lane;
            if (at >= size) continue;
            const uint32_t byte = bytes[at];
            ends |= (byte != kEscape ? 1u : 0u) << (16 * half);
            steps |= (byte + (byte != kEscape ? 1u : 0u)) << (16 * half);
            escape_last |= at == size - 1 && byte == kEscape;
        }
        const Halves before(steps), ranks(ends);
        bool inside = true;
        bits = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool is_end = (ends >> (16 * half) & 1u) != 0;
            position[half] = before.before[half] + static_cast<int>(steps >> (16 * half) & 0xffffu) - 1;
            rank[half] = ranks.before[half];
            inside &= !is_end || position[half] < place.values();
            bits |= (is_end ? 1u : 0u) << half;
        }
        sound = __all_sync(kAllLanes, inside && !escape_last && ranks.total == entry_changed(entry));
    }
};

__device__ __forceinline__ void copy_block(const uint16_t* base, const Place& place, uint16_t* output) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = place.first + 256 * half + 8 * place.lane;
        if (place.whole) {
            *reinterpret_cast<uint4*>(output + first) = *reinterpret_cast<const uint4*>(base + first);
            continue;
        }
        for (int i = 0; i < 8; ++i) {
            if (first + i < place.count) output[first + i] = base[first + i];
        }
    }
}

// kWrite false: checks the positions of a tile's blocks. kWrite true: copies the base, and puts the changed values in.
template <bool kWrite>
__global__ void __launch_bounds__(kTileThreads) apply_tile(const uint16_t* base, int64_t count, const uint8_t* delta,
                                                           const ulonglong2* tiles, uint16_t* output, int32_t* status) {
    if (warp_fails(status)) return;
    const DeltaLayout layout = layout_of(delta, count);
    const uint16_t* entries = entries_of(delta);
    Offsets at(tiles[blockIdx.x], entries, count);
    for (int i = 0; i < kBlocksOfWarp; ++i) {
        const Place place(count, i);
        if (!place.exists) break;
        const uint32_t entry = entries[place.block];
        const uint8_t* bytes = delta + layout.positions + at.bytes;
        const auto* values = reinterpret_cast<const uint16_t*>(delta + layout.values) + at.changed;
        at.advance(entry);
        const bool bitmap = (entry & kBitmapFlag) != 0;
        Changes changes;
        if (bitmap) {
            changes.read_bitmap(bytes, entry, place);
        } else {
            changes.read_gaps(bytes, entry, place);
        }
        if (!kWrite) {
            if (!changes.sound && place.lane == 0) *status = SLIPSTREAM_BAD_DELTA;
            continue;
        }
        if (output != base) copy_block(base, place, output);
        // Another lane may have copied the value that this one replaces.
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!bitmap) {
                if (changes.bits >> half & 1u)
                    output[place.first + changes.position[half]] = values[changes.rank[half]];
                continue;
            }
            int rank = changes.rank[half];
            for (uint32_t rest = changes.bits >> (8 * half) & 0xffu; rest != 0; rest &= rest - 1) {
                output[place.first + 256 * half + 8 * place.lane + __ffs(rest) - 1] = values[rank++];
            }
        }
    }
}

// Compares a checksum with the header's, of the base or of the result.
__global__ void check_checksum(const uint64_t* checksum, const uint64_t* expected, int32_t failure, int32_t* status) {
    if (!fails(status) && *checksum != *expected) *status = failure;
}

}  // namespace

extern "C" int32_t slipstream_cuda_delta_apply(const uint16_t* base, int64_t count, const uint8_t* delta,
                                               int64_t delta_bytes, void* memory, int64_t workspace_bytes,
                                               uint16_t* output, int32_t* status, void* stream) {
    if (count < 0 || count > kMostValues || delta_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (delta == nullptr || memory == nullptr || status == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (count > 0 && (base == nullptr || output == nullptr)) return SLIPSTREAM_NULL_POINTER;
    if (workspace_bytes < workspace_of(count)) return SLIPSTREAM_TOO_SMALL;
    if (!aligned(base, 16) || !aligned(output, 16) || !aligned(delta, 8) || !aligned(memory, 8))
        return SLIPSTREAM_MISALIGNED;
    // Also keeps the sizes that are checked on the device a multiple of 8.
    if (delta_bytes % 8 != 0 || delta_bytes < DeltaLayout(count, 0, 0).size) return SLIPSTREAM_BAD_DELTA;
    const Workspace workspace(memory, count);
    const cudaStream_t queue = stream_of(stream);
    const auto tiles = static_cast<unsigned>(tiles_of(count));
    const auto* header = reinterpret_cast<const DeltaHeader*>(delta);
    uint64_t* checksum = workspace.sums;

    int32_t failure = slipstream_cuda_checksum64(delta, delta_bytes - 8, checksum, stream);
    if (failure != SLIPSTREAM_OK) return failure;
    check_header<<<1, 1, 0, queue>>>(delta, count, delta_bytes, checksum, status);
    if (tiles > 0) {
        const unsigned grid = (tiles + kTileWarps - 1) / kTileWarps;
        sum_entries<<<grid, kTileThreads, 0, queue>>>(delta, count, workspace.tiles, status);
    }
    scan_tiles<<<1, kScanThreads, 0, queue>>>(workspace.tiles, tiles);
    check_totals<<<1, 1, 0, queue>>>(delta, count, workspace.tiles, status);
    if (tiles > 0) {
        apply_tile<false><<<tiles, kTileThreads, 0, queue>>>(base, count, delta, workspace.tiles, output, status);
    }
    failure = slipstream_cuda_checksum64(base, 2 * count, checksum, stream);
    if (failure != SLIPSTREAM_OK) return failure;
    check_checksum<<<1, 1, 0, queue>>>(checksum, &header->base_checksum, SLIPSTREAM_WRONG_BASE, status);
    if (tiles > 0) {
        apply_tile<true><<<tiles, kTileThreads, 0, queue>>>(base, count, delta, workspace.tiles, output, status);
    }
    failure = slipstream_cuda_checksum64(output, 2 * count, checksum, stream);
    if (failure != SLIPSTREAM_OK) return failure;
    check_checksum<<<1, 1, 0, queue>>>(checksum, &header->result_checksum, SLIPSTREAM_WRONG_RESULT, status);
    return queued();
}
