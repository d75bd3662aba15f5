// Stands in for cub's scan over a thread block.

#ifndef SLIPSTREAM_CUDA_ON_CPU_BLOCK_SCAN_CUH
#define SLIPSTREAM_CUDA_ON_CPU_BLOCK_SCAN_CUH

#include "cuda_runtime.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <typename T, int kThreads, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
  public:
    struct TempStorage {
        T items[kThreads];
    };
    explicit BlockScan(TempStorage& storage) : items_(storage.items) {}

    // The aggregate leaves `initial` out, as cub's does.
    template <typename Combine>
    void ExclusiveScan(T input, T& output, T initial, Combine combine, T& aggregate) {
        items_[threadIdx.x] = input;
        __syncthreads();
        output = initial;
        for (unsigned i = 0; i < threadIdx.x; ++i) output = combine(output, items_[i]);
        aggregate = items_[0];
        for (unsigned i = 1; i < kThreads; ++i) aggregate = combine(aggregate, items_[i]);
        __syncthreads();
    }

  private:
    T* items_;
};

}  // namespace cub

#endif
