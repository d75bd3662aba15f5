// Stands in for CUDA where there is no GPU: one thread block after another, a host thread for each of its threads.
//
// Only what csrc/cuda uses. Barriers and exchanges within a warp are real, so that a lane which misses one hangs, and
// a race is one here too; memory is the host's, and every call is done when it returns.

#ifndef SLIPSTREAM_CUDA_ON_CPU_H
#define SLIPSTREAM_CUDA_ON_CPU_H

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
// Blocks run one after another, so that their shared memory may be the same.
#define __shared__ static

struct Index {
    unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return std::memset(to, value, bytes), cudaSuccess;
}

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

struct Warp {
    std::unique_ptr<std::barrier<>> barrier;
    uint64_t slots[kWarp] = {};
};
inline std::vector<Warp> warps;
inline std::unique_ptr<std::barrier<>> block;

inline Warp& warp() { return warps[threadIdx.x / kWarp]; }
inline unsigned lane() { return threadIdx.x % kWarp; }

template <typename T>
T unpacked(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
}

// Puts this lane's value where the others see it, and returns what `read` makes of all 32.
template <typename T, typename Read>
auto exchange(T value, Read read) {
    Warp& mine = warp();
    std::memcpy(&mine.slots[lane()], &value, sizeof value);
    mine.barrier->arrive_and_wait();
    const auto result = read(mine.slots);
    mine.barrier->arrive_and_wait();
    return result;
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
    gridDim.x = blocks;
    for (unsigned b = 0; b < blocks; ++b) {
        warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
        for (unsigned w = 0; w < warps.size(); ++w) {
            warps[w].barrier = std::make_unique<std::barrier<>>(std::min(kWarp, threads - kWarp * w));
        }
        block = std::make_unique<std::barrier<>>(threads);
        std::vector<std::thread> running;
        for (unsigned t = 0; t < threads; ++t) {
            running.emplace_back([=] {
                threadIdx.x = t;
                blockIdx.x = b;
                kernel();
                // Threads that are done hold up nobody.
                block->arrive_and_drop();
                warp().barrier->arrive_and_drop();
            });
        }
        for (std::thread& thread : running) thread.join();
    }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->arrive_and_wait(); }
inline void __syncwarp() { cuda_on_cpu::warp().barrier->arrive_and_wait(); }

inline int __syncthreads_count(bool counted) {
    static std::atomic<int> count;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    count += counted;
    __syncthreads();
    const int result = count;
    __syncthreads();
    return result;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return cuda_on_cpu::exchange(value,
                                 [=](const uint64_t* slots) { return cuda_on_cpu::unpacked<T>(slots[from % 32]); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, static_cast<int>(cuda_on_cpu::lane()) ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const int lane = static_cast<int>(cuda_on_cpu::lane());
    return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    return cuda_on_cpu::exchange(static_cast<int>(vote), [](const uint64_t* slots) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane) votes |= (slots[lane] != 0 ? 1u : 0u) << lane;
        return votes;
    });
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
template <typename T>
T __reduce_add_sync(unsigned, T value) {
    return cuda_on_cpu::exchange(value, [](const uint64_t* slots) {
        T sum = 0;
        for (unsigned lane = 0; lane < 32; ++lane) sum += cuda_on_cpu::unpacked<T>(slots[lane]);
        return sum;
    });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
    return cuda_on_cpu::exchange(value, [](const uint64_t* slots) {
        T most = 0;
        for (unsigned lane = 0; lane < 32; ++lane) most = std::max(most, cuda_on_cpu::unpacked<T>(slots[lane]));
        return most;
    });
}

template <typename T>
T atomicAdd(T* to, T value) {
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicOr(T* to, T value) {
    return __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(unsigned bits) { return bits != 0 ? __builtin_clz(bits) : 32; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    return a < b ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    return a > b ? a : b;
}

#endif
