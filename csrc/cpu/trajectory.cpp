// A trajectory's record: written and checked in one call each, and the shape of its free-form MessagePack.

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "slipstream.h"

// The compiler emits one copy per instruction set and the loader picks the best the processor has.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define SLIPSTREAM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SLIPSTREAM_CLONES
#endif

namespace {

// Arrays inside a record lie wherever its buffer begins.
typedef int32_t Int32 __attribute__((aligned(1)));
typedef int16_t Int16 __attribute__((aligned(1)));
typedef uint32_t UInt32 __attribute__((aligned(1)));

struct Findings {
    uint32_t mask = 0, logprobs = 0, tokens = 0, versions = 0, turns = 0;
    int64_t sampled = 0;
    uint32_t least = UINT32_MAX;
    int32_t most = -1;
};

inline uint32_t is_infinite_or_nan(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

// Tokens first .. last - 1. One loop per array, with accumulators as wide as its elements, becomes full vector code.
SLIPSTREAM_CLONES void look(const Int32* tokens, const uint8_t* mask, const UInt32* logprobs, const Int32* versions,
                            const Int16* turns, int64_t first, int64_t last, int16_t last_turn, Findings* found) {
    uint8_t largest = 0;
    for (int64_t t = first; t < last; ++t) largest = mask[t] > largest ? mask[t] : largest;
    found->mask |= largest > 1;
    uint32_t sampled = 0;
    for (int64_t t = first; t < last; ++t) sampled += mask[t];
    found->sampled += sampled;

    uint32_t bad = 0;
    for (int64_t t = first; t < last; ++t) bad |= is_infinite_or_nan(logprobs[t]);
    found->logprobs |= bad;

    int32_t signs = 0;
    for (int64_t t = first; t < last; ++t) signs |= tokens[t];
    found->tokens |= signs < 0;

    // A negative version is larger than any other when read as unsigned: it drops out of the minimum.
    int32_t most = -1, wrong = 0;
    uint32_t least = UINT32_MAX;
    for (int64_t t = first; t < last; ++t) {
        const int32_t version = versions[t];
        wrong |= (version >> 31) + 1 - (mask[t] != 0);
        most = version > most ? version : most;
        least = static_cast<uint32_t>(version) < least ? static_cast<uint32_t>(version) : least;
    }
    found->versions |= wrong != 0;
    found->least = least < found->least ? least : found->least;
    found->most = most > found->most ? most : found->most;

    int16_t latest = -1, unequal = 0;
    for (int64_t t = first; t < last; ++t) {
        unequal = static_cast<int16_t>(unequal | ((turns[t] >> 15) + 1 - (mask[t] != 0)));
        latest = turns[t] > latest ? turns[t] : latest;
    }
    found->turns |= unequal != 0 || latest > last_turn;
}

int64_t big_endian(const unsigned char* data, int width) {
    uint64_t value = 0;
    for (int i = 0; i < width; ++i) value = value << 8 | data[i];
    return static_cast<int64_t>(value);
}

// Bytes of an item without its children, and their number; false for an extension or reserved type.
bool item_at(const unsigned char* data, int64_t available, int64_t* bytes, int64_t* children) {
    const unsigned first = data[0];
    int length_width = 0, per_entry = 0;
    *bytes = 1;
    *children = 0;
    if (first < 0x80 || first >= 0xe0 || first == 0xc0 || first == 0xc2 || first == 0xc3) return true;
    if (first < 0x90) {
        *children = 2 * (first & 0x0f);
    } else if (first < 0xa0) {
        *children = first & 0x0f;
    } else if (first < 0xc0) {
        *bytes += first & 0x1f;
    } else if (first == 0xca || first == 0xcb) {
        *bytes += first == 0xca ? 4 : 8;
    } else if (first >= 0xcc && first <= 0xd3) {
        *bytes += int64_t{1} << ((first - 0xcc) & 3);
    } else if (first >= 0xc4 && first <= 0xc6) {
        length_width = 1 << (first - 0xc4);
    } else if (first >= 0xd9 && first <= 0xdb) {
        length_width = 1 << (first - 0xd9);
    } else if (first >= 0xdc) {
        length_width = (first & 1) ? 4 : 2;
        per_entry = first < 0xde ? 1 : 2;
    } else {
        return false;
    }
    if (length_width == 0) return true;
    *bytes += length_width;
    if (available < *bytes) return true;  // cut off: the caller sees that the item ends behind the data
    const int64_t length = big_endian(data + 1, length_width);
    if (per_entry == 0) *bytes += length;
    *children = per_entry * length;
    return true;
}

// The six arrays in the order of a record, largest items first, so that each lies at a multiple of its item size.
constexpr int kArrays = 6;
constexpr int kParts = 8;
constexpr int64_t kPrefixBytes = 4 * kParts;
constexpr int64_t kCheckBytes = 4;

struct Arrays {
    const Int32* tokens;
    const UInt32* logprobs;
    const Int32* versions;
    const UInt32* rewards;
    const Int16* turns;
    const uint8_t* mask;
    int64_t length, reward_count;
};

void examine(const Arrays& a, int64_t* summary) {
    Findings found;
    const int16_t last_turn = static_cast<int16_t>(std::clamp<int64_t>(a.reward_count - 1, 0, INT16_MAX));
    // The mask of a block stays in the first-level cache for all loops.
    constexpr int64_t kBlock = 4096;
    for (int64_t first = 0; first < a.length; first += kBlock) {
        const int64_t last = std::min(first + kBlock, a.length);
        look(a.tokens, a.mask, a.logprobs, a.versions, a.turns, first, last, last_turn, &found);
    }
    uint32_t bad_rewards = 0;
    for (int64_t u = 0; u < a.reward_count; ++u) bad_rewards |= is_infinite_or_nan(a.rewards[u]);
    summary[0] = found.mask || found.logprobs || bad_rewards || found.tokens || found.versions || found.turns;
    summary[1] = found.sampled;
    summary[2] = found.most < 0 ? -1 : static_cast<int64_t>(found.least);
    summary[3] = found.most;
}

// Finds the arrays of a record whose lengths add up; false otherwise.
bool open_record(const void* record, int64_t size_bytes, uint32_t* sizes, Arrays* arrays) {
    if (size_bytes < kPrefixBytes + kCheckBytes) return false;
    const auto* bytes = static_cast<const unsigned char*>(record);
    std::memcpy(sizes, bytes, kPrefixBytes);
    const int64_t length = sizes[5], reward_count = sizes[3] / 4;
    int64_t total = kPrefixBytes + kCheckBytes;
    for (int part = 0; part < kParts; ++part) total += sizes[part];
    const int64_t expected[kArrays] = {4 * length, 4 * length, 4 * length, 4 * reward_count, 2 * length, length};
    if (total != size_bytes || !std::equal(expected, expected + kArrays, sizes)) return false;
    const unsigned char* at[kArrays];
    at[0] = bytes + kPrefixBytes;
    for (int part = 1; part < kArrays; ++part) at[part] = at[part - 1] + sizes[part - 1];
    *arrays = {reinterpret_cast<const Int32*>(at[0]), reinterpret_cast<const UInt32*>(at[1]),
               reinterpret_cast<const Int32*>(at[2]), reinterpret_cast<const UInt32*>(at[3]),
               reinterpret_cast<const Int16*>(at[4]), at[5],
               length,                                reward_count};
    return true;
}

}  // namespace

extern "C" int32_t slipstream_seal_trajectory(void* record, int64_t size_bytes, int64_t* summary) {
    if (size_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (summary == nullptr || (record == nullptr && size_bytes > 0)) return SLIPSTREAM_NULL_POINTER;
    uint32_t sizes[kParts];
    Arrays arrays;
    if (!open_record(record, size_bytes, sizes, &arrays)) return SLIPSTREAM_BAD_RECORD;
    examine(arrays, summary);
    const int64_t body_bytes = size_bytes - kCheckBytes;
    const uint32_t check = slipstream_crc32c(record, body_bytes, 0, 0);
    std::memcpy(static_cast<unsigned char*>(record) + body_bytes, &check, kCheckBytes);
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_check_trajectory(const void* record, int64_t size_bytes, int64_t* summary) {
    if (size_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (summary == nullptr || (record == nullptr && size_bytes > 0)) return SLIPSTREAM_NULL_POINTER;
    uint32_t sizes[kParts], check;
    Arrays arrays;
    if (!open_record(record, size_bytes, sizes, &arrays)) return SLIPSTREAM_BAD_RECORD;
    const int64_t body_bytes = size_bytes - kCheckBytes;
    std::memcpy(&check, static_cast<const unsigned char*>(record) + body_bytes, kCheckBytes);
    if (slipstream_crc32c(record, body_bytes, 0, 0) != check) return SLIPSTREAM_BAD_RECORD;
    examine(arrays, summary);
    summary[4] = arrays.length;
    summary[5] = arrays.reward_count;
    summary[6] = sizes[6];
    summary[7] = sizes[7];
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_check_msgpack(const void* data, int64_t size_bytes, int32_t most_depth,
                                            int64_t most_items) {
    if (size_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (data == nullptr && size_bytes > 0) return SLIPSTREAM_NULL_POINTER;
    constexpr int32_t kDeepest = 64;
    if (most_depth < 1 || most_depth > kDeepest) return SLIPSTREAM_BAD_MSGPACK;
    const auto* bytes = static_cast<const unsigned char*>(data);
    // open[d]: items still to come at depth d.
    int64_t open[kDeepest + 1] = {1};
    int32_t depth = 1;
    int64_t position = 0, items = 0;
    while (depth > 0) {
        if (open[depth - 1] == 0) {
            --depth;
            continue;
        }
        --open[depth - 1];
        int64_t skip = 0, children = 0;
        if (++items > most_items || position >= size_bytes) return SLIPSTREAM_BAD_MSGPACK;
        if (!item_at(bytes + position, size_bytes - position, &skip, &children)) return SLIPSTREAM_BAD_MSGPACK;
        position += skip;
        if (children > size_bytes || position > size_bytes) return SLIPSTREAM_BAD_MSGPACK;
        if (children > 0) {
            if (depth == most_depth) return SLIPSTREAM_BAD_MSGPACK;
            open[depth++] = children;
        }
    }
    return position == size_bytes ? SLIPSTREAM_OK : SLIPSTREAM_BAD_MSGPACK;
}
