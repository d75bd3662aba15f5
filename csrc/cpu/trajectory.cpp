// What the hub checks of every trajectory: its five arrays in one pass, and the shape of its free-form MessagePack.

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

struct Findings {
    uint32_t mask = 0, logprobs = 0, tokens = 0, versions = 0, turns = 0;
    int64_t sampled = 0;
    uint32_t least = UINT32_MAX;
    int32_t most = -1;
};

inline uint32_t is_infinite_or_nan(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

inline uint32_t bits_of(const float* values, int64_t i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    return bits;
}

// Tokens first .. last - 1. One loop per array, with accumulators as wide as its elements, becomes full vector code.
SLIPSTREAM_CLONES void look(const int32_t* tokens, const uint8_t* mask, const float* logprobs, const int32_t* versions,
                            const int16_t* turns, int64_t first, int64_t last, int16_t last_turn, Findings* found) {
    uint8_t largest = 0;
    for (int64_t t = first; t < last; ++t) largest = mask[t] > largest ? mask[t] : largest;
    found->mask |= largest > 1;
    uint32_t sampled = 0;
    for (int64_t t = first; t < last; ++t) sampled += mask[t];
    found->sampled += sampled;

    uint32_t bad = 0;
    for (int64_t t = first; t < last; ++t) bad |= is_infinite_or_nan(bits_of(logprobs, t));
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

}  // namespace

extern "C" int32_t slipstream_check_trajectory(const int32_t* tokens, const uint8_t* mask, const float* logprobs,
                                               const int32_t* versions, const int16_t* turns, int64_t length,
                                               const float* rewards, int64_t reward_count, int64_t* summary) {
    if (length < 0 || reward_count < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    const bool missing = tokens == nullptr || mask == nullptr || logprobs == nullptr || versions == nullptr ||
                         turns == nullptr;
    if (summary == nullptr || (length > 0 && missing) || (reward_count > 0 && rewards == nullptr)) {
        return SLIPSTREAM_NULL_POINTER;
    }
    Findings found;
    const int16_t last_turn = reward_count < 1           ? 0
                              : reward_count > INT16_MAX ? INT16_MAX
                                                         : static_cast<int16_t>(reward_count - 1);
    // The mask of a block stays in the first-level cache for all loops.
    constexpr int64_t kBlock = 4096;
    for (int64_t first = 0; first < length; first += kBlock) {
        const int64_t last = first + kBlock < length ? first + kBlock : length;
        look(tokens, mask, logprobs, versions, turns, first, last, last_turn, &found);
    }
    uint32_t bad_rewards = 0;
    for (int64_t u = 0; u < reward_count; ++u) bad_rewards |= is_infinite_or_nan(bits_of(rewards, u));
    summary[0] = found.mask          ? SLIPSTREAM_FIELD_MASK
                 : found.logprobs    ? SLIPSTREAM_FIELD_LOGPROBS
                 : bad_rewards       ? SLIPSTREAM_FIELD_REWARDS
                 : found.tokens      ? SLIPSTREAM_FIELD_TOKENS
                 : found.versions    ? SLIPSTREAM_FIELD_VERSIONS
                 : found.turns       ? SLIPSTREAM_FIELD_TURNS
                                     : SLIPSTREAM_FIELD_NONE;
    summary[1] = found.sampled;
    summary[2] = found.most < 0 ? -1 : static_cast<int64_t>(found.least);
    summary[3] = found.most;
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
