// 64-bit checksum of raw bytes; the algorithm is stated in slipstream.h.

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

constexpr uint64_t kStride = 0x9e3779b97f4a7c15ULL;
constexpr uint64_t kMultiplier = 0xd6e8feb86659fd93ULL;
constexpr int64_t kWordBytes = 8;

inline uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= kMultiplier;
    x ^= x >> 32;
    x *= kMultiplier;
    x ^= x >> 32;
    return x;
}

// Reads up to eight bytes at any alignment; missing bytes are zero.
inline uint64_t load_word(const unsigned char* bytes, int64_t count) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, static_cast<size_t>(count));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

// Sums the mixed words first .. last - 1.
SLIPSTREAM_CLONES uint64_t sum_words(const unsigned char* bytes, int64_t first, int64_t last) {
    uint64_t sum = 0;
    for (int64_t i = first; i < last; ++i) {
        sum += mix(load_word(bytes + i * kWordBytes, kWordBytes) + static_cast<uint64_t>(i + 1) * kStride);
    }
    return sum;
}

}  // namespace

extern "C" int32_t slipstream_checksum64(const void* data, int64_t size_bytes, int32_t threads, uint64_t* checksum) {
    if (size_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (checksum == nullptr || (data == nullptr && size_bytes > 0)) return SLIPSTREAM_NULL_POINTER;

    const auto* bytes = static_cast<const unsigned char*>(data);
    const int64_t words = size_bytes / kWordBytes;
    const int64_t tail = size_bytes % kWordBytes;
    const int workers = threads < 1 ? 1 : threads;
    // Blocks of 512 KiB: enough work for a thread, and a block count that balances.
    constexpr int64_t kBlockWords = 1 << 16;
    const int64_t blocks = (words + kBlockWords - 1) / kBlockWords;
    (void)workers;

    uint64_t sum = static_cast<uint64_t>(size_bytes);
#pragma omp parallel for reduction(+ : sum) num_threads(workers) if (workers > 1 && blocks > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kBlockWords;
        sum += sum_words(bytes, first, first + kBlockWords < words ? first + kBlockWords : words);
    }
    if (tail > 0) {
        sum += mix(load_word(bytes + words * kWordBytes, tail) + static_cast<uint64_t>(words + 1) * kStride);
    }
    *checksum = mix(sum);
    return SLIPSTREAM_OK;
}
