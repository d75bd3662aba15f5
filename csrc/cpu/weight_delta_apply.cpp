// Applying deltas between two versions of 16-bit weights; the byte format is stated in slipstream.h.

#include "delta_parts.h"

namespace {

using namespace slipstream;

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

// Calls visit(index of the value in the array, place among the changed values) for each change of a part; false when
// its positions are unsound.
template <typename Visit>
bool each_change(const DeltaView& view, int part, Visit visit) {
    const unsigned char* positions = view.data + view.layout.positions + view.offsets.bytes[part];
    const int64_t count = static_cast<int64_t>(view.header.count);
    int64_t place = view.offsets.changed[part];
    for (int64_t b = view.parts.begin(part); b < view.parts.begin(part + 1); ++b) {
        const uint32_t entry = load16(view.data + view.layout.entries + 2 * b);
        const int64_t first = b * kBlockValues;
        const int values = static_cast<int>(std::min(kBlockValues, count - first));
        if (!each_position(entry, positions, values, [&](int position) { visit(first + position, place++); })) {
            return false;
        }
        positions += entry_bytes(entry);
    }
    return true;
}

bool positions_are_sound(const DeltaView& view, int workers) {
    int bad = 0;
    (void)workers;
#pragma omp parallel for reduction(+ : bad) schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < view.parts.count; ++part) bad += !each_change(view, part, [](int64_t, int64_t) {});
    return bad == 0;
}

void patch(const DeltaView& view, const uint16_t* base, uint16_t* output, int workers) {
    const int64_t count = static_cast<int64_t>(view.header.count);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers) if (workers > 1)
    for (int part = 0; part < view.parts.count; ++part) {
        const int64_t first = view.parts.begin(part) * kBlockValues;
        const int64_t last = std::min(count, view.parts.begin(part + 1) * kBlockValues);
        if (output != base) std::memcpy(output + first, base + first, static_cast<size_t>(2 * (last - first)));
        const unsigned char* values = view.data + view.layout.values;
        each_change(view, part, [&](int64_t index, int64_t place) { output[index] = load16(values + 2 * place); });
    }
}

}  // namespace

extern "C" int32_t slipstream_delta_apply(const uint16_t* base, int64_t count, const uint8_t* delta,
                                          int64_t delta_bytes, int32_t threads, uint16_t* output) {
    if (count < 0 || count > kMostValues || delta_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (delta == nullptr || (count > 0 && (base == nullptr || output == nullptr))) return SLIPSTREAM_NULL_POINTER;
    DeltaHeader header;
    if (delta_bytes < static_cast<int64_t>(sizeof header)) return SLIPSTREAM_BAD_DELTA;
    std::memcpy(&header, delta, sizeof header);
    if (!header_is_sound(header, count, delta_bytes)) return SLIPSTREAM_BAD_DELTA;
    DeltaView view(delta, header);
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
