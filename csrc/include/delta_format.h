// The byte format of a delta, for its CPU and CUDA code; it is stated in slipstream.h.

#ifndef SLIPSTREAM_DELTA_FORMAT_H
#define SLIPSTREAM_DELTA_FORMAT_H

#include <stdint.h>

#ifdef __CUDACC__
#define SLIPSTREAM_BOTH __host__ __device__
#else
#define SLIPSTREAM_BOTH
#endif

namespace slipstream {

constexpr uint32_t kDeltaMagic = 0x31444c53u;
constexpr uint16_t kDeltaFormat = 1;
constexpr int64_t kBlockValues = 512;
constexpr int kBlockWords = 8;
constexpr int kBitmapBytes = 64;
constexpr int kEscape = 255;
constexpr uint32_t kCountBits = 0x3ff;
constexpr uint32_t kEscapeShift = 10;
constexpr uint32_t kBitmapFlag = 0x8000;
constexpr uint32_t kUnusedBits = 0x7000;
// Keeps every size below far from overflow.
constexpr int64_t kMostValues = int64_t{1} << 56;

struct DeltaHeader {
    uint32_t magic;
    uint16_t format;
    uint16_t block_values;
    uint64_t count, base_version, new_version, base_checksum, result_checksum, changed, position_bytes;
};
static_assert(sizeof(DeltaHeader) == 64, "the header is part of the format");

SLIPSTREAM_BOTH constexpr int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }
SLIPSTREAM_BOTH constexpr int64_t blocks_of(int64_t count) { return (count + kBlockValues - 1) / kBlockValues; }
SLIPSTREAM_BOTH constexpr int64_t workspace_of(int64_t count) { return 128 + 72 * blocks_of(count); }

// Where the parts of a delta begin, in bytes.
struct DeltaLayout {
    int64_t entries, positions, values, trailer, size;

    SLIPSTREAM_BOTH DeltaLayout(int64_t count, int64_t changed, int64_t position_bytes)
        : entries(sizeof(DeltaHeader)),
          positions(entries + padded(2 * blocks_of(count))),
          values(positions + padded(position_bytes)),
          trailer(values + padded(2 * changed)),
          size(trailer + 8) {}
};

SLIPSTREAM_BOTH constexpr int entry_changed(uint32_t entry) { return static_cast<int>(entry & kCountBits); }

// Bytes of a block's positions.
SLIPSTREAM_BOTH constexpr int entry_bytes(uint32_t entry) {
    return entry & kBitmapFlag ? kBitmapBytes : entry_changed(entry) + static_cast<int>(entry >> kEscapeShift & 3);
}

// The entry of a block that has `changed` values, whose gaps take `escapes` bytes more than that.
SLIPSTREAM_BOTH constexpr uint32_t make_entry(int changed, int escapes) {
    return changed + escapes > kBitmapBytes ? changed | kBitmapFlag : changed | escapes << kEscapeShift;
}

// Whether a block of `values` values can have this entry.
SLIPSTREAM_BOTH constexpr bool entry_is_sound(uint32_t entry, int64_t values) {
    return (entry & kUnusedBits) == 0 && entry_changed(entry) <= values && entry_bytes(entry) <= kBitmapBytes &&
           !((entry & kBitmapFlag) != 0 && (entry >> kEscapeShift & 3) != 0);
}

// Whether the header is that of a delta of `count` values and `size` bytes.
SLIPSTREAM_BOTH inline bool header_is_sound(const DeltaHeader& header, int64_t count, int64_t size) {
    if (header.magic != kDeltaMagic || header.format != kDeltaFormat) return false;
    if (header.block_values != kBlockValues) return false;
    if (header.count != static_cast<uint64_t>(count) || header.changed > header.count) return false;
    if (header.position_bytes > static_cast<uint64_t>(blocks_of(count) * kBitmapBytes)) return false;
    const DeltaLayout layout(count, static_cast<int64_t>(header.changed), static_cast<int64_t>(header.position_bytes));
    return layout.size == size;
}

}  // namespace slipstream

#endif
