// Encoding deltas between two versions of 16-bit weights; the byte format is stated in slipstream.h.

#include "delta_parts.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SLIPSTREAM_X86_MASK 1
#include <immintrin.h>
#endif

namespace {

using namespace slipstream;

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

// Fills bitmaps and entries by `block(first value, values, mask)`, and header and size from them. `result` is the
// array that holds the new values afterwards.
template <typename Block>
int32_t plan(const void* before, const uint16_t* result, int64_t count, uint64_t base_version, uint64_t new_version,
             int32_t threads, void* memory, int64_t* delta_bytes, Block block) {
    const Parts parts(blocks_of(count));
    const Workspace workspace(memory, parts.blocks);
    const int workers = threads < 1 ? 1 : threads;
    DeltaHeader header{kDeltaMagic,
                       kDeltaFormat,
                       kBlockValues,
                       static_cast<uint64_t>(count),
                       base_version,
                       new_version,
                       checksum(before, 2 * count, threads),
                       0,
                       0,
                       0};
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

}  // namespace

extern "C" int32_t slipstream_delta_plan(const uint16_t* before, const uint16_t* after, int64_t count,
                                         uint64_t base_version, uint64_t new_version, int32_t threads, void* workspace,
                                         int64_t workspace_bytes, int64_t* delta_bytes) {
    const int32_t status = check_plan(before, after, count, workspace, workspace_bytes, delta_bytes);
    if (status != SLIPSTREAM_OK) return status;
    return plan(
        before, after, count, base_version, new_version, threads, workspace, delta_bytes,
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
    DeltaView view(delta, header);
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
