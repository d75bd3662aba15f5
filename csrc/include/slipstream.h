// The plain C ABI of Slipstream's native library: every exported function with its contract.
//
// Conventions. Arrays are contiguous, little-endian and owned by the caller; nothing is kept after a call returns.
// Sizes are counts of elements unless the name says bytes. No function throws, allocates for the caller or prints.
// Functions may be called from several threads at once as long as their outputs do not overlap. `threads` is the most
// OpenMP threads a call may use; a value below 1 means 1. Results never depend on `threads`.
// Each function returns a slipstream_status; on anything but SLIPSTREAM_OK the outputs are untouched.

#ifndef SLIPSTREAM_H
#define SLIPSTREAM_H

#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define SLIPSTREAM_EXPORT __attribute__((visibility("default")))
#else
#define SLIPSTREAM_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Grows by one whenever a function below changes its arguments or its meaning.
enum { SLIPSTREAM_ABI_VERSION = 4 };

enum slipstream_status {
    SLIPSTREAM_OK = 0,
    SLIPSTREAM_NULL_POINTER = 1,
    SLIPSTREAM_NEGATIVE_SIZE = 2,
    SLIPSTREAM_BAD_SEGMENTS = 3,
    SLIPSTREAM_BAD_MSGPACK = 4,
    SLIPSTREAM_BAD_RECORD = 5,
    SLIPSTREAM_BAD_LABEL = 6,
};

// Returns SLIPSTREAM_ABI_VERSION of the library, so that a loader can refuse another one.
SLIPSTREAM_EXPORT int32_t slipstream_abi_version(void);

// Affine reverse scan within each segment of a packed axis:
//
//     output[t] = input[t] + decay[t] * output[t + 1],   output[t + 1] = 0 at the end of a segment.
//
// decay, input, output: [tokens]; output may be the same array as input, and no other two may overlap.
// cu_seqlens: [segments + 1], begins with 0, never falls, ends with `tokens`; otherwise SLIPSTREAM_BAD_SEGMENTS.
// Arithmetic is in double without fused multiply-add, rounded once per output, so that the bits equal the reference's.
// Null arrays are allowed where they hold no element.
SLIPSTREAM_EXPORT int32_t slipstream_segment_scan_f32(const float* decay, const float* input, const int64_t* cu_seqlens,
                                                      int64_t segments, int64_t tokens, int32_t threads, float* output);

// Rows of logits [rows, columns], row-major float32, in three steps: the caller multiplies hidden states and weight,
// _statistics reads the logits, and _gradient, once the loss is known, writes their gradient over them. Sums run in a
// fixed order of 8 lanes and parts of 1,024 columns. labels: [rows], any value; one outside [0, columns) is in another
// part of the vocabulary. inverse_temperature: [rows] where per_row is not 0, else [1]; positive. softcap: 0 for none.

// Replaces the logits x by z = inverse_temperature * cap(x + bias), cap(x) = softcap * tanh(x / softcap), and writes
// statistics [4, rows], in units of ln 2 (z2 = z * log2 e): peak = max z2, total = sum 2^(z2 - peak),
// weighted = sum 2^(z2 - peak) (z2 - peak), and z2 at the label (0 where it is elsewhere).
// bias: [columns] or null. Without columns: -1e30, 0, 0, 0. Where whole_vocabulary is not 0, [3, rows] instead, in
// nats: log-probability of the label, entropy, log-sum-exp; a label outside [0, columns) is then SLIPSTREAM_BAD_LABEL,
// and the logits are left without their bias, cap and temperature.
SLIPSTREAM_EXPORT int32_t slipstream_logit_statistics_f32(float* logits, const int64_t* labels, const float* bias,
                                                          const float* inverse_temperature, int32_t per_row,
                                                          float softcap, int64_t rows, int64_t columns,
                                                          int32_t whole_vocabulary, int32_t threads, float* statistics);

// Writes the gradient of `count` chosen rows over the first `count` rows of z, and leaves the others undefined. With
// p = exp(z - logsumexp):
//
//     dz = grad_logprob (1_label - p) - grad_entropy p (ln p + entropy) + grad_logsumexp p
//     dx = dz inverse_temperature (1 - (z / (inverse_temperature softcap))^2)
//
// chosen: [count] rows, ascending. The other arrays are [rows]; a null gradient is 0.
SLIPSTREAM_EXPORT int32_t slipstream_logit_gradient_f32(float* logits, const int64_t* labels, const float* logsumexp,
                                                        const float* entropy, const float* grad_logprob,
                                                        const float* grad_entropy, const float* grad_logsumexp,
                                                        const float* inverse_temperature, int32_t per_row,
                                                        float softcap, const int64_t* chosen, int64_t count,
                                                        int64_t columns, int32_t threads);

// 64-bit checksum of `size_bytes` bytes at `data` (any alignment; null allowed when size_bytes is 0).
//
// The bytes are read as little-endian 64-bit words w_0 .. w_{n-1}, the last one padded with zero bytes. All arithmetic
// is modulo 2^64:
//
//     mix(x):  x ^= x >> 32;  x *= 0xd6e8feb86659fd93;  x ^= x >> 32;  x *= 0xd6e8feb86659fd93;  x ^= x >> 32
//     checksum = mix(size_bytes + sum over i of mix(w_i + (i + 1) * 0x9e3779b97f4a7c15))
//
// The sum makes the result independent of the order of work; the index inside the mix makes it depend on the order of
// words. It detects corruption and mistaken identity; it does not resist a forger.
SLIPSTREAM_EXPORT int32_t slipstream_checksum64(const void* data, int64_t size_bytes, int32_t threads,
                                                uint64_t* checksum);

// CRC-32C (Castagnoli) of `size_bytes` bytes at `data` (any alignment), continuing from `start`, the CRC-32C of what
// came before (0 for nothing). Returns the value itself; without data, `start`. Uses the processor's instruction where
// there is one, unless `portable` is not 0: both ways give the same value.
SLIPSTREAM_EXPORT uint32_t slipstream_crc32c(const void* data, int64_t size_bytes, uint32_t start, int32_t portable);

// CRC-32C of two blocks in a row, from that of each and the size of the second. Returns the value itself.
SLIPSTREAM_EXPORT uint32_t slipstream_crc32c_combine(uint32_t first, uint32_t second, int64_t second_bytes);

// A trajectory's record is, with T tokens and U turns,
//
//     u32[8]   bytes of each part
//     parts    token_ids i32[T], behavior_logprobs f32[T], versions i32[T], turn_rewards f32[U], turns i16[T],
//              loss_mask u8[T], header (MessagePack), tool calls (MessagePack)
//     u32      CRC-32C of everything before
//
// Its arrays are sound when the mask is 0 or 1; log-probabilities and rewards are finite; tokens are >= 0; versions and
// turns are >= 0 exactly where the mask is not 0; turns < max(U, 1). A summary begins with: 0 when they are sound;
// tokens with a mask that is not 0; smallest and largest version that is not negative, or -1.

// Writes the CRC-32C of a record that is whole but for it, and checks the arrays: the caller looks into `summary`, [4],
// before it trusts the record. `record`: `size_bytes` bytes of any alignment. SLIPSTREAM_BAD_RECORD, and nothing written,
// when its lengths do not add up.
SLIPSTREAM_EXPORT int32_t slipstream_seal_trajectory(void* record, int64_t size_bytes, int64_t* summary);

// Checks a record, of any alignment: SLIPSTREAM_BAD_RECORD when its lengths do not add up or its CRC-32C is wrong.
//
// summary: [8]: the four numbers above, then T, U, and the bytes of header and tool calls, which are not looked into.
SLIPSTREAM_EXPORT int32_t slipstream_check_trajectory(const void* record, int64_t size_bytes, int64_t* summary);

// Returns SLIPSTREAM_OK when the bytes are exactly one MessagePack value that holds at most `most_items` items, itself
// included, nests at most `most_depth` levels (a plain value is one; at most 64) and has no extension types;
// SLIPSTREAM_BAD_MSGPACK otherwise. Strings are not decoded.
SLIPSTREAM_EXPORT int32_t slipstream_check_msgpack(const void* data, int64_t size_bytes, int32_t most_depth,
                                                   int64_t most_items);

#ifdef __cplusplus
}
#endif

#endif
