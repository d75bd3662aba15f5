// Matrices as e4m3 with a scale for each tile of 128 x 128; the formula is stated in slipstream.h.
//
// One thread block holds one tile in registers, so that weights are read once.

#include <cuda_fp8.h>

#include "e4m3.h"
#include "launch.cuh"

using namespace slipstream;

namespace {

constexpr int kSide = 128;
constexpr int kThreads = 256;
// A thread has 8 neighbours in each of 8 rows: one vector of bfloat16, or two of float32.
constexpr int kRun = 8;
constexpr int kRows = 8;
constexpr int kThreadsOfRow = kSide / kRun;
constexpr int kRowStep = kThreads / kThreadsOfRow;

__device__ __forceinline__ float widen(float weight) { return weight; }
__device__ __forceinline__ float widen(uint16_t bfloat16) { return float_of(static_cast<uint32_t>(bfloat16) << 16); }

__device__ __forceinline__ void load_run(const float* from, float* run) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    run[0] = low.x, run[1] = low.y, run[2] = low.z, run[3] = low.w;
    run[4] = high.x, run[5] = high.y, run[6] = high.z, run[7] = high.w;
}

__device__ __forceinline__ void load_run(const uint16_t* from, float* run) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        run[2 * i] = float_of(words[i] << 16);
        run[2 * i + 1] = float_of(words[i] & 0xffff0000u);
    }
}

// Four values to four bytes.
__device__ __forceinline__ uint32_t quantize_four(const float* values, float scale) {
#if __CUDA_ARCH__ >= 890
    const float2 low = {values[0] / scale, values[1] / scale}, high = {values[2] / scale, values[3] / scale};
    const uint32_t first = __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3);
    return first | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
#else
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed |= static_cast<uint32_t>(to_e4m3(values[i] / scale)) << (8 * i);
    return packed;
#endif
}

// The largest over the thread block.
__device__ uint32_t block_max(uint32_t mine) {
    __shared__ uint32_t of_warp[kThreads / kWarp];
    mine = __reduce_max_sync(kAllLanes, mine);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
    __syncthreads();
    uint32_t largest = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) largest = max(largest, of_warp[warp]);
    return largest;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_tile(const T* weight, int64_t rows, int64_t columns, bool vectors,
                                                          uint8_t* values, float* scales, int32_t* status) {
    const int64_t across = (columns + kSide - 1) / kSide;
    const int64_t tile_row = blockIdx.x / across, tile_column = blockIdx.x % across;
    const int64_t column = tile_column * kSide + threadIdx.x % kThreadsOfRow * kRun;
    const int64_t first_row = tile_row * kSide + threadIdx.x / kThreadsOfRow;
    float run[kRows][kRun];
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const int64_t row = first_row + k * kRowStep;
        if (vectors && row < rows && column + kRun <= columns) {
            load_run(weight + row * columns + column, run[k]);
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                run[k][i] = row < rows && column + i < columns ? widen(weight[row * columns + column + i]) : 0.0f;
            }
        }
        // As bits, whose order is that of the numbers, with infinity and NaN on top.
#pragma unroll
        for (int i = 0; i < kRun; ++i) largest = max(largest, bits_of(run[k][i]) & 0x7fffffffu);
    }
    largest = block_max(largest);
    const float scale = e4m3_scale(largest);
    if (threadIdx.x == 0) {
        scales[blockIdx.x] = scale;
        if (largest >= kInfinityBits) *status = SLIPSTREAM_NOT_FINITE;
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const int64_t row = first_row + k * kRowStep;
        if (row >= rows) break;
        const uint32_t low = quantize_four(run[k], scale), high = quantize_four(run[k] + 4, scale);
        uint8_t* to = values + row * columns + column;
        if (vectors && column + kRun <= columns) {
            *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                if (column + i < columns) to[i] = static_cast<uint8_t>((i < 4 ? low : high) >> (8 * (i % 4)));
            }
        }
    }
}

}  // namespace

extern "C" int32_t slipstream_cuda_fp8_quantize(const void* weight, int32_t is_bfloat16, int64_t rows, int64_t columns,
                                                uint8_t* values, float* scales, int32_t* status, void* stream) {
    if (rows < 0 || columns < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (status == nullptr) return SLIPSTREAM_NULL_POINTER;
    const cudaStream_t queue = stream_of(stream);
    const cudaError_t error = cudaMemsetAsync(status, 0, sizeof *status, queue);
    if (error != cudaSuccess || rows == 0 || columns == 0) return status_of(error);
    if (weight == nullptr || values == nullptr || scales == nullptr) return SLIPSTREAM_NULL_POINTER;
    const int64_t tiles = ((rows + kSide - 1) / kSide) * ((columns + kSide - 1) / kSide);
    const bool vectors = columns % kRun == 0 && aligned(weight, 16) && aligned(values, 8);
    const auto grid = static_cast<unsigned>(tiles);
    if (is_bfloat16 != 0) {
        quantize_tile<<<grid, kThreads, 0, queue>>>(static_cast<const uint16_t*>(weight), rows, columns, vectors,
                                                    values, scales, status);
    } else {
        quantize_tile<<<grid, kThreads, 0, queue>>>(static_cast<const float*>(weight), rows, columns, vectors, values,
                                                    scales, status);
    }
    return queued();
}
