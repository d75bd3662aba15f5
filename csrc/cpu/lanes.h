// Eight float32 lanes, for sweeps whose bits are the same for every instruction set.

#ifndef SLIPSTREAM_LANES_H
#define SLIPSTREAM_LANES_H

#include <cstdint>
#include <cstring>

// Chosen by the loader; compilers without this attribute build the portable version alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FOR_EACH_INSTRUCTION_SET __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_INSTRUCTION_SET
#endif
// What a sweep calls must be compiled into it, for its instruction set.
#define INLINE static inline __attribute__((always_inline))

// The warning is about vectors that pass between instruction sets; these never leave the sweep that they are in.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace slipstream {

constexpr int kLanes = 8;
constexpr float kLog2E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof(Floats)); }
INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof(Floats)); }

INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x}; }

// Loads the last `count` < kLanes values; `filler` stands in the other lanes.
INLINE void load_some(Floats& to, const float* from, int64_t count, float filler) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = lane < count ? from[lane] : filler;
}

INLINE void store_some(float* to, const Floats& from, int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = from[lane];
}

// The float that rounds to an integer when it is added, which then stands in the low bits.
constexpr float kRounder = 12582912.0f;

// Returns 2^(fraction + the integer in `shifted`, within [-126, 127]) for a fraction in [-0.5, 0.5].
INLINE Floats power_lanes(const Floats& fraction, const Floats& shifted) {
    // Least relative error of degree 6.
    Floats power = Floats{} + 1.53375775e-4f;
    power = power * fraction + 1.33998599e-3f;
    power = power * fraction + 9.61851981e-3f;
    power = power * fraction + 5.55032901e-2f;
    power = power * fraction + 2.40226462e-1f;
    power = power * fraction + 6.93147182e-1f;
    power = power * fraction + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4B400000 + 127) << 23;
    return power * (Floats)exponent;
}

// x = 2^x with a relative error below 2e-7; exactly 0 below -126.
INLINE void exp2_lanes(Floats& x) {
    const Floats kept = x < -126.0f ? Floats{} - 126.0f : x;
    const Floats shifted = kept + kRounder;
    const Floats power = power_lanes(kept - (shifted - kRounder), shifted);
    x = x < -126.0f ? Floats{} : power;
}

// Returns e^x within [-87, 87], with a relative error below 2e-7.
INLINE Floats exp_lanes(const Floats& x) {
    const Floats shifted = x * kLog2E + kRounder;
    const Floats whole = shifted - kRounder;
    // ln 2 in two parts, the first so short that its products are exact: x * kLog2E alone would lose digits.
    const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    return power_lanes(rest * kLog2E, shifted);
}

}  // namespace slipstream

#endif  // SLIPSTREAM_LANES_H
