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
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x - lane;
        output = warp == 0 ? initial : combine(initial, over(0, warp, combine));
        if (lane > 0) output = combine(output, over(warp, lane, combine));
        aggregate = over(0, kThreads, combine);
        __syncthreads();
    }

  private:
    // In halves, since cub too combines what it has combined: `combine` must be associative.
    template <typename Combine>
    T over(unsigned first, unsigned count, Combine combine) {
        if (count == 1) return items_[first];
        return combine(over(first, count / 2, combine), over(first + count / 2, count - count / 2, combine));
    }

    T* items_;
};

}  // namespace cub

#endif
