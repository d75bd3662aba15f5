// The plain C ABI of Slipstream's native library: every exported function with its contract.
//
// Conventions. Arrays are contiguous, little-endian and owned by the caller; nothing is kept after a call returns.
// Sizes are counts of elements unless the name says bytes. No function throws, allocates for the caller or prints.
// Functions may be called from several threads at once as long as their outputs do not overlap. `threads` is the most
// OpenMP threads a call may use; a value below 1 means 1. Results never depend on `threads`.
// Each function returns a slipstream_status; on anything but SLIPSTREAM_OK the outputs are untouched, unless its
// comment says otherwise.

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
enum { SLIPSTREAM_ABI_VERSION = 5 };

enum slipstream_status {
    SLIPSTREAM_OK = 0,
    SLIPSTREAM_NULL_POINTER = 1,
    SLIPSTREAM_NEGATIVE_SIZE = 2,
    SLIPSTREAM_BAD_SEGMENTS = 3,
    SLIPSTREAM_BAD_MSGPACK = 4,
    SLIPSTREAM_BAD_RECORD = 5,
    SLIPSTREAM_BAD_DELTA = 6,
    SLIPSTREAM_WRONG_BASE = 7,
    SLIPSTREAM_WRONG_RESULT = 8,
    SLIPSTREAM_TOO_SMALL = 9,
    SLIPSTREAM_NOT_FINITE = 10,
    SLIPSTREAM_MISALIGNED = 11,
    SLIPSTREAM_BAD_LABEL = 12,
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

// Advantages and returns of packed segments, one pass. Formulas: advantage.py.
enum slipstream_estimator_kind {
    SLIPSTREAM_GAE = 0,
    SLIPSTREAM_TD_LAMBDA = 1,
    SLIPSTREAM_VTRACE = 2,
    SLIPSTREAM_RETURN = 3,
};

// [tokens] each: value (not for RETURN), reward, ratio = current / behavior (for VTRACE alone), sampled: 0 for tokens
// that are skipped, whatever their other values. bootstrap: [segments] value after the last sampled token, or null for
// 0. cu_seqlens: as in the scan.
typedef struct {
    const float *value, *reward, *ratio, *bootstrap;
    const uint8_t* sampled;
    const int64_t* cu_seqlens;
    int64_t segments, tokens;
} slipstream_steps;

// decay: discount times lambda, which is 1 for RETURN. trace, rest: lambda and 1 - lambda.
typedef struct {
    int32_t kind;
    float discount, decay, trace, rest, rho_cap, trace_cap;
} slipstream_estimator;

// advantage (for GAE and VTRACE, else null), target: [tokens], 0 where not sampled. Steps are in float32 and the scan in
// double without fused multiply-add, so that the bits equal the reference's.
SLIPSTREAM_EXPORT int32_t slipstream_estimate_f32(const slipstream_steps* steps, const slipstream_estimator* estimator,
                                                  int32_t threads, float* advantage, float* target);

// Rows of logits [rows, columns], row-major float32, in three steps: the caller multiplies hidden states and weight,
// _scores or _parts reads the logits, and _gradient, once the loss is known, writes their gradient over them. Sums run
// in a fixed order of 8 lanes and parts of 1,024 columns. labels: [rows], any value; one outside [0, columns) is in
// another shard of the vocabulary. inverse_temperature: [rows] where per_row is not 0, else [1]; positive. softcap: 0
// for none. bias: [columns] or null.

// Replaces the logits x by z = inverse_temperature * cap(x + bias), cap(x) = softcap * tanh(x / softcap), and writes
// log-probability of the label, entropy and log-sum-exp, [rows] each, in nats. A label outside [0, columns) is
// SLIPSTREAM_BAD_LABEL, and the logits are then left as they were.
SLIPSTREAM_EXPORT int32_t slipstream_logit_scores_f32(float* logits, const int64_t* labels, const float* bias,
                                                      const float* inverse_temperature, int32_t per_row, float softcap,
                                                      int64_t rows, int64_t columns, int32_t threads, float* logprob,
                                                      float* entropy, float* logsumexp);

// The same in steps, for a vocabulary in shards. Replaces x by z and writes for each part of 1,024 columns
// [ceil(columns / 1024), 4, rows]: peak = max z, total = sum exp(z - peak), weighted = sum exp(z - peak) (z - peak) log2
// e, and z at the label (0 where it is elsewhere).
SLIPSTREAM_EXPORT int32_t slipstream_logit_parts_f32(float* logits, const int64_t* labels, const float* bias,
                                                     const float* inverse_temperature, int32_t per_row, float softcap,
                                                     int64_t rows, int64_t columns, int32_t threads, float* parts);

// Merges parts [count, 4, rows] in order into one [4, rows], and turns one of a whole vocabulary into what _scores
// returns, with the same bits. The first part may stand for all columns before.
SLIPSTREAM_EXPORT int32_t slipstream_merge_parts_f32(const float* parts, int64_t count, int64_t rows, float* whole);
SLIPSTREAM_EXPORT int32_t slipstream_finish_parts_f32(const float* whole, int64_t rows, float* logprob, float* entropy,
                                                      float* logsumexp);

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

// One pass of the policy loss over tokens (formulas: objective.py). Choices, as their members of Surrogate, Correction
// and Penalty; a log-ratio is held to +-20 before exp, and has no slope outside.
enum slipstream_surrogate {
    SLIPSTREAM_SURROGATE_CLIP = 0,
    SLIPSTREAM_SURROGATE_CISPO = 1,
    SLIPSTREAM_SURROGATE_TOPR = 2,
    SLIPSTREAM_SURROGATE_SAPO = 3,
};
enum slipstream_correction {
    SLIPSTREAM_CORRECTION_NONE = 0,
    SLIPSTREAM_CORRECTION_TRUNCATE = 1,
    SLIPSTREAM_CORRECTION_MASK = 2,
};
enum slipstream_penalty {
    SLIPSTREAM_PENALTY_K1_IN_REWARD = 0,
    SLIPSTREAM_PENALTY_K2 = 1,
    SLIPSTREAM_PENALTY_K3 = 2,
    SLIPSTREAM_PENALTY_K3_WITH_K2_GRADIENT = 3,
};
typedef struct {
    int32_t surrogate, correction, penalty;
    float ratio_low, ratio_high, dual_clip, gate_positive, gate_negative, importance_cap, importance_floor, trust_low,
        trust_high, kl_coefficient, entropy_coefficient;
} slipstream_objective;

// [tokens] each. proximal, reference and entropy may be null. share: weight over the loss's denominator. moved and
// mismatch: current / proximal and proximal / behavior log-ratios where a whole segment has one, else null.
typedef struct {
    const float *logprob, *behavior, *proximal, *reference, *entropy, *advantage, *weight, *share, *moved, *mismatch;
} slipstream_policy_inputs;

// grad_logprob, grad_entropy: [tokens], the latter null where entropy is. active: [tokens], of which the first
// active_count are set to the tokens whose gradient is not 0, ascending, and the others undefined. loss: [1]. metrics:
// [32] in the order of policy_result.py. A token whose weight is not positive adds nothing, whatever its other values.
// Sums are in double, but for a few tokens at a time, and in a fixed order of 8 lanes and blocks of 1,024 tokens.
SLIPSTREAM_EXPORT int32_t slipstream_policy_terms_f32(const slipstream_policy_inputs* inputs,
                                                      const slipstream_objective* objective, int64_t tokens,
                                                      int32_t threads, float* grad_logprob, float* grad_entropy,
                                                      int64_t* active, int64_t* active_count, float* loss,
                                                      float* metrics);

// How token losses become one, as the members of Aggregation.
enum slipstream_aggregation {
    SLIPSTREAM_TOKEN_MEAN = 0,
    SLIPSTREAM_SEQUENCE_MEAN_TOKEN_MEAN = 1,
    SLIPSTREAM_SEQUENCE_MEAN_TOKEN_SUM = 2,
    SLIPSTREAM_FIXED = 3,
};

// Shares s of tokens such that the loss is the sum of s times a token's loss, and the tokens of positive weight.
//
// weight, share: [tokens]. cu_seqlens: [segments + 1], begins with 0, never falls, ends with `tokens`; otherwise
// SLIPSTREAM_BAD_SEGMENTS. normalizer: [1] the denominator, or null for that of these tokens. trained: [tokens], of
// which the first trained_count are set, ascending, and the others undefined. trained_bounds: [segments + 1] bounds of
// the segments over the trained tokens.
SLIPSTREAM_EXPORT int32_t slipstream_token_shares_f32(const float* weight, const int64_t* cu_seqlens, int64_t segments,
                                                      int64_t tokens, int32_t aggregation, float fixed_length,
                                                      const float* normalizer, float* share, int64_t* trained,
                                                      int64_t* trained_bounds, int64_t* trained_count);

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

// ---- Weight codecs -------------------------------------------------------------------------------------------------

// The delta between two arrays of 16-bit values is, with n values, blocks = ceil(n / 512) and everything little-endian,
//
//     u32  magic 0x31444c53 ("SLD1"); u16 format version 1; u16 values of a block, 512
//     u64  n; version of the base; version of the result; checksum64 of the base; checksum64 of the result;
//          changed values; bytes of positions
//     u16  an entry a block:  bits 0-9 changed values, bits 10-11 escapes, bit 15 bitmap
//     u8   positions, block after block: a bitmap of 64 bytes (bit i of byte i / 8 is value i), or gaps
//     u16  the changed values, in order
//     u64  checksum64 of everything before
//
// where entries, positions and values are each padded with zeros to a multiple of 8 bytes. A gap is the number of equal
// values since the last changed one, or since the block's begin; the byte 255, an escape, adds 255 to the gap that
// follows. A block has gaps unless they would take more than 64 bytes.

// First half of encoding: fills `workspace` (8-byte aligned, at least 128 + 72 * blocks bytes) and states the bytes of
// the delta. SLIPSTREAM_TOO_SMALL for a smaller workspace. before, after: [count].
SLIPSTREAM_EXPORT int32_t slipstream_delta_plan(const uint16_t* before, const uint16_t* after, int64_t count,
                                                uint64_t base_version, uint64_t new_version, int32_t threads,
                                                void* workspace, int64_t workspace_bytes, int64_t* delta_bytes);

// The same, between bfloat16 `weights` and `master` rounded to bfloat16 (nearest even; NaN becomes 0x7fc0), which
// replaces `weights` in the same sweep. master, weights: [count].
SLIPSTREAM_EXPORT int32_t slipstream_delta_plan_cast(const float* master, uint16_t* weights, int64_t count,
                                                     uint64_t base_version, uint64_t new_version, int32_t threads,
                                                     void* workspace, int64_t workspace_bytes, int64_t* delta_bytes);

// Second half: writes the delta that `workspace` plans. after: the new values, [count]; delta: 8-byte aligned,
// `delta_bytes` as planned, otherwise SLIPSTREAM_TOO_SMALL.
SLIPSTREAM_EXPORT int32_t slipstream_delta_write(const uint16_t* after, int64_t count, int32_t threads,
                                                 const void* workspace, uint8_t* delta, int64_t delta_bytes);

// Writes base with the delta's changes to `output`, [count], which may be `base` itself; `delta` has any alignment.
// SLIPSTREAM_BAD_DELTA when its bytes are not a whole delta of `count` values, SLIPSTREAM_WRONG_BASE when the checksum
// of the base is another; SLIPSTREAM_WRONG_RESULT when that of the output is, which takes a forger: then `output` holds
// values of no version.
SLIPSTREAM_EXPORT int32_t slipstream_delta_apply(const uint16_t* base, int64_t count, const uint8_t* delta,
                                                 int64_t delta_bytes, int32_t threads, uint16_t* output);

// Quantizes a matrix to e4m3 (fn: no infinities, largest 448), with a scale for each tile of tile_rows x tile_columns:
//
//     scale = max(amax / 448, 2^-126), or 1 where amax is 0;    value = e4m3(weight / scale)
//
// by float32 division, rounded to nearest even, saturating. weight: [rows, columns], float32, or bfloat16 where
// `is_bfloat16` is not 0; values: [rows, columns]; scales: [ceil(rows / tile_rows), ceil(columns / tile_columns)].
// SLIPSTREAM_NOT_FINITE when a weight is not; values and scales then hold nothing of use.
SLIPSTREAM_EXPORT int32_t slipstream_fp8_quantize(const void* weight, int32_t is_bfloat16, int64_t rows,
                                                  int64_t columns, int64_t tile_rows, int64_t tile_columns,
                                                  int32_t threads, uint8_t* values, float* scales);

// ---- CUDA library --------------------------------------------------------------------------------------------------

// The functions below are in libslipstream_cuda, which also has slipstream_abi_version. Arrays lie in the memory of the
// current device; each function queues work on `stream` (a cudaStream_t; null is the default stream) and returns at
// once, so that arrays and workspaces must live, and outputs count, only after the stream has come there. They allocate
// nothing and may be captured into a graph. A negative status is a cudaError_t with its sign changed. Contents are not
// checked on the device unless a function says so. Results are the same in every run.

// Number of usable devices; a machine without one gives -cudaErrorNoDevice or -cudaErrorInsufficientDriver.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_device_count(int32_t* count);

// What CUDA says about a negative status; static memory, never null.
SLIPSTREAM_EXPORT const char* slipstream_cuda_error(int32_t status);

// slipstream_segment_scan_f32 in two launches, in float32, as a scan over tiles of 4,096 tokens; decay in [0, 1]. Its
// error is that of a balanced sum. workspace: 8-byte aligned, at least 8 * ceil(tokens / 4096) bytes, else
// SLIPSTREAM_TOO_SMALL. output may be the same array as input.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_segment_scan_f32(const float* decay, const float* input,
                                                           const int64_t* cu_seqlens, int64_t segments, int64_t tokens,
                                                           void* workspace, int64_t workspace_bytes, float* output,
                                                           void* stream);

// slipstream_estimate_f32 in two launches (one up to 2,048 tokens), in float32, with errors as in the scan; bounds that
// are none give values of no use. steps->ratio holds log-ratios here: ratio = exp(min(log_ratio, 20)). `steps` and
// `estimator` lie in the host's memory and are read before it returns. workspace: 4-byte aligned, at least
// 20 * ceil(tokens / 2048) bytes, else SLIPSTREAM_TOO_SMALL; null will do up to 2,048 tokens.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_estimate_f32(const slipstream_steps* steps,
                                                       const slipstream_estimator* estimator, void* workspace,
                                                       int64_t workspace_bytes, float* advantage, float* target,
                                                       void* stream);

// slipstream_checksum64; checksum: one number on the device.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_checksum64(const void* data, int64_t size_bytes, uint64_t* checksum,
                                                     void* stream);

// The three steps of the CPU's functions of the same name; delta_bytes of the plans is one number on the device.
// Weights are 16-byte aligned, workspaces and deltas 8-byte aligned, otherwise SLIPSTREAM_MISALIGNED.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_delta_plan(const uint16_t* before, const uint16_t* after, int64_t count,
                                                     uint64_t base_version, uint64_t new_version, void* workspace,
                                                     int64_t workspace_bytes, int64_t* delta_bytes, void* stream);
SLIPSTREAM_EXPORT int32_t slipstream_cuda_delta_plan_cast(const float* master, uint16_t* weights, int64_t count,
                                                          uint64_t base_version, uint64_t new_version, void* workspace,
                                                          int64_t workspace_bytes, int64_t* delta_bytes, void* stream);
SLIPSTREAM_EXPORT int32_t slipstream_cuda_delta_write(const uint16_t* after, int64_t count, const void* workspace,
                                                      uint8_t* delta, int64_t delta_bytes, void* stream);

// slipstream_delta_apply. workspace and alignment: as for the plans; status: one slipstream_status on the
// device, SLIPSTREAM_OK when output holds the result. All is checked before the first write to `output`, and nothing is
// written after a failed check.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_delta_apply(const uint16_t* base, int64_t count, const uint8_t* delta,
                                                      int64_t delta_bytes, void* workspace, int64_t workspace_bytes,
                                                      uint16_t* output, int32_t* status, void* stream);

// slipstream_fp8_quantize with tiles of 128 x 128. status: one slipstream_status on the device, SLIPSTREAM_OK or
// SLIPSTREAM_NOT_FINITE.
SLIPSTREAM_EXPORT int32_t slipstream_cuda_fp8_quantize(const void* weight, int32_t is_bfloat16, int64_t rows,
                                                       int64_t columns, uint8_t* values, float* scales,
                                                       int32_t* status, void* stream);

#ifdef __cplusplus
}
#endif

#endif
