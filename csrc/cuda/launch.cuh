// What every kernel's host side needs.

#ifndef SLIPSTREAM_LAUNCH_CUH
#define SLIPSTREAM_LAUNCH_CUH

#include <cuda_runtime.h>

#include <algorithm>

#include "slipstream.h"

namespace slipstream {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Enough thread blocks to fill any device several times, where a kernel strides over its work.
constexpr int64_t kMostBlocks = 4096;

inline int32_t status_of(cudaError_t error) {
    return error == cudaSuccess ? static_cast<int32_t>(SLIPSTREAM_OK) : -static_cast<int32_t>(error);
}

// The status of the launches before it.
inline int32_t queued() { return status_of(cudaGetLastError()); }

inline unsigned grid_of(int64_t work, int64_t of_each_block) {
    return static_cast<unsigned>(
        std::max<int64_t>(1, std::min(kMostBlocks, (work + of_each_block - 1) / of_each_block)));
}

inline bool aligned(const void* address, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace slipstream

#endif
