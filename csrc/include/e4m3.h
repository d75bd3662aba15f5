// Rounding of float32 to e4m3 (fn), for CPU and CUDA code.

#ifndef SLIPSTREAM_E4M3_H
#define SLIPSTREAM_E4M3_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SLIPSTREAM_E4M3 __host__ __device__ __forceinline__
#else
#define SLIPSTREAM_E4M3 inline
#endif

namespace slipstream {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kLeastScale = 1.17549435e-38f;  // 2^-126
constexpr uint32_t kInfinityBits = 0x7f800000u;

SLIPSTREAM_E4M3 uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

SLIPSTREAM_E4M3 float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest even, saturating; selections are of bits, so that compilers vectorise them. NaN is not expected.
SLIPSTREAM_E4M3 uint8_t to_e4m3(float value) {
    constexpr uint32_t kLargestBits = 0x43e00000u;      // 448
    constexpr uint32_t kLeastNormalBits = 0x3c800000u;  // 2^-6
    constexpr uint32_t kShiftBits = 0x46800000u;        // 2^14
    const uint32_t sign = bits_of(value) >> 24 & 0x80u;
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    const uint32_t bits = size < kLargestBits ? size : kLargestBits;
    // 20 of 23 fraction bits go, and the bias falls from 127 to 7.
    const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    // Below 2^-6 the values are multiples of 2^-9, which is the last place of floats from 2^14.
    const uint32_t subnormal = bits_of(float_of(bits) + float_of(kShiftBits)) - kShiftBits;
    const uint32_t small = bits < kLeastNormalBits ? 0xffffffffu : 0u;
    return static_cast<uint8_t>(sign | (subnormal & small) | (normal & ~small));
}

// The scale of a tile, from the bits of its largest magnitude.
SLIPSTREAM_E4M3 float e4m3_scale(uint32_t largest) {
    if (largest == 0) return 1.0f;
    const float scale = float_of(largest) / kLargestE4m3;
    return scale > kLeastScale ? scale : kLeastScale;
}

}  // namespace slipstream

#endif
