// Deltas between two versions of 16-bit weights; the byte format is stated in slipstream.h.

#include <algorithm>
#include <cstring>

#include "delta_format.h"
#include "slipstream.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SLIPSTREAM_X86_MASK 1
#include <immintrin.h>
#endif

namespace {

using namespace slipstream;

// A call is cut into at most this many parts, so that where each begins fits on the stack.
constexpr int kMostParts = 64;
// Fewer blocks than this are no work for a thread.
constexpr int64_t kLeastBlocksOfPart = 64;

struct Parts {
    int64_t blocks;
    int count;

    explicit Parts(int64_t all_blocks)
        : blocks(all_blocks),
          count(static_cast<int>(std::min<int64_t>(kMostParts, (all_blocks + kLeastBlocksOfPart - 1) / kLeastBlocksOfPart))) {}
    int64_t begin(int part) const { return blocks / count * part + std::min<int64_t>(part, blocks % count); }
};

// Where the parts of a workspace lie: header, bitmaps, entries.
struct Workspace {
    unsigned char* header;
    unsigned char* bitmaps;
    unsigned char* entries;

    Workspace(const void* memory, int64_t blocks)
        : header(static_cast<unsigned char*>(const_cast<void*>(memory))),
          bitmaps(header + sizeof(DeltaHeader)),
          entries(bitmaps + blocks * kBitmapBytes) {}
};

inline uint16_t load16(const unsigned char* at) {
    uint16_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline int popcount(uint64_t x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }

// Sets bit i of the mask where value i differs. `values` may be fewer than a block.
void mask_portable(const uint16_t* before, const uint16_t* after, int values, uint64_t* mask) {
    std::memset(mask, 0, kBitmapBytes);
    for (int i = 0; i < values; ++i) mask[i / 64] |= static_cast<uint64_t>(before[i] != after[i]) << (i % 64);
}

#ifdef SLIPSTREAM_X86_MASK
__attribute__((target("avx2"))) void mask_avx2(const uint16_t* before, const uint16_t* after, uint64_t* mask) {
    for (int word = 0; word < kBlockWords; ++word) {
        uint64_t equal = 0;
        for (int half = 0; half < 2; ++half) {
            const int at = word * 64 + half * 32;
            const auto* a = reinterpret_cast<const __m256i*>(before + at);
            const auto* b = reinterpret_cast<const __m256i*>(after + at);
            const __m256i low = _mm256_cmpeq_epi16(_mm256_loadu_si256(a), _mm256_loadu_si256(b));
            const __m256i high = _mm256_cmpeq_epi16(_mm256_loadu_si256(a + 1), _mm256_loadu_si256(b + 1));
            // Packing works within 128-bit lanes; the permutation puts them in order.
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
            equal |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << (32 * half);
        }
        mask[word] = ~equal;
    }
}
#endif

void block_mask(const uint16_t* before, const uint16_t* after, int values, uint64_t* mask) {
#ifdef SLIPSTREAM_X86_MASK
    if (values == kBlockValues && __builtin_cpu_supports("avx2")) {
        mask_avx2(before, after, mask);
        return;
    }
#endif
    mask_portable(before, after, values, mask);
}

// Calls visit(position) for each bit that is set, in order.
template <typename Visit>
inline void each_bit(const uint64_t* mask, Visit visit) {
    for (int word = 0; word < kBlockWords; ++word) {
        for (uint64_t rest = mask[word]; rest != 0; rest &= rest - 1) visit(word * 64 + lowest_bit(rest));
    }
}

uint32_t entry_of(const uint64_t* mask) {
    int changed = 0, escapes = 0, next = 0;
    for (int word = 0; word < kBlockWords; ++word) changed += popcount(mask[word]);
    if (changed <= kBitmapBytes) {
        each_bit(mask, [&](int position) {
            escapes += (position - next) / kEscape;
            next = position + 1;
        });
    }
    return make_entry(changed, escapes);
}

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint64_t checksum(const void* data, int64_t size, int32_t threads) {
    uint64_t result = 0;
    slipstream_checksum64(data, size, threads, &result);
    return result;
}

// Fills bitmaps and entries by `block(first value, values, mask)`, and header and size from them. `result` is the
// array that holds the new values afterwards.
template <typename Block>
int32_t plan(const void* before, const uint16_t* result, int64_t count, uint64_t base_version, uint64_t new_version,
             int32_t threads, void* memory, int64_t* delta_bytes, Block block) {
    const Parts parts(blocks_of(count));
    const Workspace workspace(memory, parts.blocks);
    const int workers = threads < 1 ? 1 : threads;
    DeltaHeader header{kDeltaMagic, kDeltaFormat, kBlockValues, static_cast<uint64_t>(count), base_version, new_version,
                       checksum(before, 2 * count, threads), 0, 0, 0};
    uint64_t changed = 0, position_bytes = 0;
    (void)workers;
#pragma omp parallel for reduction(+ : changed, position_bytes) schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < parts.count; ++part) {
        for (int64_t b = parts.begin(part); b < parts.begin(part + 1); ++b) {
            uint64_t mask[kBlockWords];
            const int64_t first = b * kBlockValues;
            block(first, static_cast<int>(std::min(kBlockValues, count - first)), mask);
            const auto entry = static_cast<uint16_t>(entry_of(mask));
            std::memcpy(workspace.bitmaps + b * kBitmapBytes, mask, kBitmapBytes);
            std::memcpy(workspace.entries + 2 * b, &entry, sizeof entry);
            changed += static_cast<uint64_t>(entry_changed(entry));
            position_bytes += static_cast<uint64_t>(entry_bytes(entry));
        }
    }
    header.changed = changed;
    header.position_bytes = position_bytes;
    header.result_checksum = checksum(result, 2 * count, threads);
    std::memcpy(workspace.header, &header, sizeof header);
    *delta_bytes = DeltaLayout(count, static_cast<int64_t>(changed), static_cast<int64_t>(position_bytes)).size;
    return SLIPSTREAM_OK;
}

int32_t check_plan(const void* before, const void* after, int64_t count, const void* workspace, int64_t workspace_bytes,
                   const int64_t* delta_bytes) {
    if (count < 0 || count > kMostValues) return SLIPSTREAM_NEGATIVE_SIZE;
    if (workspace == nullptr || delta_bytes == nullptr) return SLIPSTREAM_NULL_POINTER;
    if (count > 0 && (before == nullptr || after == nullptr)) return SLIPSTREAM_NULL_POINTER;
    return workspace_bytes < workspace_of(count) ? SLIPSTREAM_TOO_SMALL : SLIPSTREAM_OK;
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

// Calls visit(position) for each change of a block, in order, and returns whether the bytes are its positions: as many
// as its entry says, inside its `values`, without a byte left over.
template <typename Visit>
bool each_position(uint32_t entry, const unsigned char* bytes, int values, Visit visit) {
    const int changed = entry_changed(entry), size = entry_bytes(entry);
    if (entry & kBitmapFlag) {
        uint64_t mask[kBlockWords];
        std::memcpy(mask, bytes, kBitmapBytes);
        int bits = 0, last = -1;
        for (int word = 0; word < kBlockWords; ++word) {
            bits += popcount(mask[word]);
            if (mask[word] != 0) last = word * 64 + 63 - __builtin_clzll(mask[word]);
        }
        if (bits != changed || last >= values) return false;
        each_bit(mask, visit);
        return true;
    }
    int position = 0, found = 0;
    for (int i = 0; i < size; ++i) {
        position += bytes[i];
        if (bytes[i] == kEscape) continue;
        if (position >= values) return false;
        visit(position++);
        ++found;
    }
    return found == changed && (size == 0 || bytes[size - 1] != kEscape);
}

// The bytes of a delta whose header has been checked.
struct View {
    const unsigned char* data;
    DeltaHeader header;
    DeltaLayout layout;
    Parts parts;
    Offsets offsets;

    View(const unsigned char* bytes, const DeltaHeader& checked)
        : data(bytes),
          header(checked),
          layout(static_cast<int64_t>(checked.count), static_cast<int64_t>(checked.changed),
                 static_cast<int64_t>(checked.position_bytes)),
          parts(blocks_of(static_cast<int64_t>(checked.count))) {}

    // Calls visit(index of the value in the array, place among the changed values); false when positions are unsound.
    template <typename Visit>
    bool each_change(int part, Visit visit) const {
        const unsigned char* positions = data + layout.positions + offsets.bytes[part];
        int64_t place = offsets.changed[part];
        for (int64_t b = parts.begin(part); b < parts.begin(part + 1); ++b) {
            const uint32_t entry = load16(data + layout.entries + 2 * b);
            const int64_t first = b * kBlockValues;
            const int values = static_cast<int>(std::min(kBlockValues, static_cast<int64_t>(header.count) - first));
            if (!each_position(entry, positions, values, [&](int position) { visit(first + position, place++); })) {
                return false;
            }
            positions += entry_bytes(entry);
        }
        return true;
    }
};

bool positions_are_sound(const View& view, int workers) {
    int bad = 0;
    (void)workers;
#pragma omp parallel for reduction(+ : bad) schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < view.parts.count; ++part) bad += !view.each_change(part, [](int64_t, int64_t) {});
    return bad == 0;
}

void patch(const View& view, const uint16_t* base, uint16_t* output, int workers) {
    const int64_t count = static_cast<int64_t>(view.header.count);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < view.parts.count; ++part) {
        const int64_t first = view.parts.begin(part) * kBlockValues;
        const int64_t last = std::min(count, view.parts.begin(part + 1) * kBlockValues);
        if (output != base) std::memcpy(output + first, base + first, static_cast<size_t>(2 * (last - first)));
        const unsigned char* values = view.data + view.layout.values;
        view.each_change(part, [&](int64_t index, int64_t place) { output[index] = load16(values + 2 * place); });
    }
}

}  // namespace

extern "C" int32_t slipstream_delta_plan(const uint16_t* before, const uint16_t* after, int64_t count,
                                         uint64_t base_version, uint64_t new_version, int32_t threads, void* workspace,
                                         int64_t workspace_bytes, int64_t* delta_bytes) {
    const int32_t status = check_plan(before, after, count, workspace, workspace_bytes, delta_bytes);
    if (status != SLIPSTREAM_OK) return status;
    return plan(before, after, count, base_version, new_version, threads, workspace, delta_bytes,
                [=](int64_t first, int values, uint64_t* mask) { block_mask(before + first, after + first, values, mask); });
}

extern "C" int32_t slipstream_delta_plan_cast(const float* master, uint16_t* weights, int64_t count,
                                              uint64_t base_version, uint64_t new_version, int32_t threads,
                                              void* workspace, int64_t workspace_bytes, int64_t* delta_bytes) {
    const int32_t status = check_plan(master, weights, count, workspace, workspace_bytes, delta_bytes);
    if (status != SLIPSTREAM_OK) return status;
    return plan(weights, weights, count, base_version, new_version, threads, workspace, delta_bytes,
                [=](int64_t first, int values, uint64_t* mask) {
                    uint16_t rounded[kBlockValues];
                    for (int i = 0; i < values; ++i) rounded[i] = to_bfloat16(master[first + i]);
                    block_mask(weights + first, rounded, values, mask);
                    std::memcpy(weights + first, rounded, static_cast<size_t>(2 * values));
                });
}

extern "C" int32_t slipstream_delta_write(const uint16_t* after, int64_t count, int32_t threads, const void* memory,
                                          uint8_t* delta, int64_t delta_bytes) {
    if (count < 0 || count > kMostValues || delta_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (memory == nullptr || delta == nullptr || (after == nullptr && count > 0)) return SLIPSTREAM_NULL_POINTER;
    const Workspace workspace(memory, blocks_of(count));
    DeltaHeader header;
    std::memcpy(&header, workspace.header, sizeof header);
    if (!header_is_sound(header, count, delta_bytes)) return SLIPSTREAM_TOO_SMALL;
    View view(delta, header);
    if (!view.offsets.fill(workspace.entries, view.parts, header)) return SLIPSTREAM_TOO_SMALL;

    std::memset(delta, 0, static_cast<size_t>(view.layout.positions));
    std::memset(delta + view.layout.values - 8, 0, 8);
    std::memset(delta + view.layout.trailer - 8, 0, 8);
    std::memcpy(delta, &header, sizeof header);
    std::memcpy(delta + view.layout.entries, workspace.entries, static_cast<size_t>(2 * view.parts.blocks));
    const int workers = threads < 1 ? 1 : threads;
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < view.parts.count; ++part) {
        unsigned char* positions = delta + view.layout.positions + view.offsets.bytes[part];
        unsigned char* values = delta + view.layout.values + 2 * view.offsets.changed[part];
        for (int64_t b = view.parts.begin(part); b < view.parts.begin(part + 1); ++b) {
            uint64_t mask[kBlockWords];
            std::memcpy(mask, workspace.bitmaps + b * kBitmapBytes, kBitmapBytes);
            const bool bitmap = load16(workspace.entries + 2 * b) & kBitmapFlag;
            if (bitmap) {
                std::memcpy(positions, mask, kBitmapBytes);
                positions += kBitmapBytes;
            }
            int next = 0;
            each_bit(mask, [&](int position) {
                int gap = position - next;
                next = position + 1;
                for (; !bitmap && gap >= kEscape; gap -= kEscape) *positions++ = kEscape;
                if (!bitmap) *positions++ = static_cast<unsigned char>(gap);
                std::memcpy(values, after + b * kBlockValues + position, 2);
                values += 2;
            });
        }
    }
    const uint64_t trailer = checksum(delta, view.layout.trailer, threads);
    std::memcpy(delta + view.layout.trailer, &trailer, sizeof trailer);
    return SLIPSTREAM_OK;
}

extern "C" int32_t slipstream_delta_apply(const uint16_t* base, int64_t count, const uint8_t* delta,
                                          int64_t delta_bytes, int32_t threads, uint16_t* output) {
    if (count < 0 || count > kMostValues || delta_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (delta == nullptr || (count > 0 && (base == nullptr || output == nullptr))) return SLIPSTREAM_NULL_POINTER;
    DeltaHeader header;
    if (delta_bytes < static_cast<int64_t>(sizeof header)) return SLIPSTREAM_BAD_DELTA;
    std::memcpy(&header, delta, sizeof header);
    if (!header_is_sound(header, count, delta_bytes)) return SLIPSTREAM_BAD_DELTA;
    View view(delta, header);
    uint64_t trailer;
    std::memcpy(&trailer, delta + view.layout.trailer, sizeof trailer);
    if (checksum(delta, view.layout.trailer, threads) != trailer) return SLIPSTREAM_BAD_DELTA;
    const int workers = threads < 1 ? 1 : threads;
    if (!view.offsets.fill(delta + view.layout.entries, view.parts, header)) return SLIPSTREAM_BAD_DELTA;
    if (!positions_are_sound(view, workers)) return SLIPSTREAM_BAD_DELTA;
    if (checksum(base, 2 * count, threads) != header.base_checksum) return SLIPSTREAM_WRONG_BASE;
    patch(view, base, output, workers);
    return checksum(output, 2 * count, threads) == header.result_checksum ? SLIPSTREAM_OK : SLIPSTREAM_WRONG_RESULT;
}
