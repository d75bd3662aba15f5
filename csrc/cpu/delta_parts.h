// How a delta is cut into parts for threads, for encoding and applying on the CPU.

#ifndef SLIPSTREAM_DELTA_PARTS_H
#define SLIPSTREAM_DELTA_PARTS_H

#include <algorithm>
#include <cstring>

#include "delta_format.h"
#include "slipstream.h"

namespace slipstream {

// A call is cut into at most this many parts, so that where each begins fits on the stack.
constexpr int kMostParts = 64;
// Fewer blocks than this are no work for a thread.
constexpr int64_t kLeastBlocksOfPart = 64;

struct Parts {
    int64_t blocks;
    int count;

    explicit Parts(int64_t all_blocks) : blocks(all_blocks) {
        const int64_t worthwhile = (blocks + kLeastBlocksOfPart - 1) / kLeastBlocksOfPart;
        count = static_cast<int>(std::min<int64_t>(kMostParts, worthwhile));
    }
    int64_t begin(int part) const { return blocks / count * part + std::min<int64_t>(part, blocks % count); }
};

inline uint16_t load16(const unsigned char* at) {
    uint16_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline int popcount(uint64_t x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }

// Calls visit(position) for each bit that is set, in order.
template <typename Visit>
inline void each_bit(const uint64_t* mask, Visit visit) {
    for (int word = 0; word < kBlockWords; ++word) {
        for (uint64_t rest = mask[word]; rest != 0; rest &= rest - 1) visit(word * 64 + lowest_bit(rest));
    }
}

inline uint64_t checksum(const void* data, int64_t size, int32_t threads) {
    uint64_t result = 0;
    slipstream_checksum64(data, size, threads, &result);
    return result;
}

// The offsets at which each part's values and position bytes begin, from the entries of all blocks.
struct Offsets {
    int64_t changed[kMostParts + 1];
    int64_t bytes[kMostParts + 1];

    // Returns whether the entries are sound and add up to what the header says.
    bool fill(const unsigned char* entries, const Parts& parts, const DeltaHeader& header) {
        int64_t total_changed = 0, total_bytes = 0;
        bool sound = true;
        for (int part = 0; part < parts.count; ++part) {
            changed[part] = total_changed;
            bytes[part] = total_bytes;
            for (int64_t b = parts.begin(part); b < parts.begin(part + 1); ++b) {
                const uint32_t entry = load16(entries + 2 * b);
                const int64_t left = static_cast<int64_t>(header.count) - b * kBlockValues;
                sound &= entry_is_sound(entry, std::min(kBlockValues, left));
                total_changed += entry_changed(entry);
                total_bytes += entry_bytes(entry);
            }
        }
        return sound && static_cast<uint64_t>(total_changed) == header.changed &&
               static_cast<uint64_t>(total_bytes) == header.position_bytes;
    }
};

// The bytes of a delta whose header has been checked.
struct DeltaView {
    const unsigned char* data;
    DeltaHeader header;
    DeltaLayout layout;
    Parts parts;
    Offsets offsets;

    DeltaView(const unsigned char* bytes, const DeltaHeader& checked)
        : data(bytes),
          header(checked),
          layout(static_cast<int64_t>(checked.count), static_cast<int64_t>(checked.changed),
                 static_cast<int64_t>(checked.position_bytes)),
          parts(blocks_of(static_cast<int64_t>(checked.count))) {}
};

}  // namespace slipstream

#endif
