// The mixing of checksum64, as stated in slipstream.h.

#ifndef SLIPSTREAM_MIX64_CUH
#define SLIPSTREAM_MIX64_CUH

#include <stdint.h>

namespace slipstream {

__device__ __forceinline__ uint64_t mix64(uint64_t x) {
    constexpr uint64_t kMultiplier = 0xd6e8feb86659fd93ULL;
    x ^= x >> 32;
    x *= kMultiplier;
    x ^= x >> 32;
    x *= kMultiplier;
    x ^= x >> 32;
    return x;
}

// What word `index` adds to the sum.
__device__ __forceinline__ uint64_t mixed_word(uint64_t word, int64_t index) {
    return mix64(word + static_cast<uint64_t>(index + 1) * 0x9e3779b97f4a7c15ULL);
}

// Sums over the lanes of a warp; sums of integers do not depend on their order.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ void add_to(uint64_t* sum, uint64_t x) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
}

}  // namespace slipstream

#endif
