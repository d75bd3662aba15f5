// 64-bit checksum of raw bytes; the algorithm is stated in slipstream.h.

#include "launch.cuh"
#include "mix64.cuh"

using namespace slipstream;

namespace {

constexpr int kThreads = 256;
constexpr int kWordBytes = 8;
constexpr int64_t kWordsOfThread = 16;

// The word at any alignment; bytes past the end are zero.
__device__ uint64_t gather_word(const uint8_t* bytes, int64_t index, int64_t size_bytes) {
    uint64_t word = 0;
    const int64_t first = index * kWordBytes;
    for (int i = 0; i < kWordBytes && first + i < size_bytes; ++i) {
        word |= static_cast<uint64_t>(bytes[first + i]) << (8 * i);
    }
    return word;
}

// Adds all words to *sum, which is zero before. Aligned data is read 16 bytes at a time.
__global__ void __launch_bounds__(kThreads)
    sum_words(const uint8_t* bytes, int64_t size_bytes, bool vectors, uint64_t* sum) {
    const int64_t words = (size_bytes + kWordBytes - 1) / kWordBytes;
    const int64_t pairs = vectors ? size_bytes / 16 : 0;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    uint64_t mine = 0;
    for (int64_t i = thread; i < pairs; i += threads) {
        const ulonglong2 two = reinterpret_cast<const ulonglong2*>(bytes)[i];
        mine += mixed_word(two.x, 2 * i) + mixed_word(two.y, 2 * i + 1);
    }
    for (int64_t i = 2 * pairs + thread; i < words; i += threads) {
        mine += mixed_word(gather_word(bytes, i, size_bytes), i);
    }
    mine = warp_sum(mine);
    if (threadIdx.x % kWarp == 0) add_to(sum, mine);
}

__global__ void finish(int64_t size_bytes, uint64_t* checksum) {
    *checksum = mix64(static_cast<uint64_t>(size_bytes) + *checksum);
}

}  // namespace

extern "C" int32_t slipstream_cuda_checksum64(const void* data, int64_t size_bytes, uint64_t* checksum, void* stream) {
    if (size_bytes < 0) return SLIPSTREAM_NEGATIVE_SIZE;
    if (checksum == nullptr || (data == nullptr && size_bytes > 0)) return SLIPSTREAM_NULL_POINTER;
    const cudaStream_t queue = stream_of(stream);
    const cudaError_t error = cudaMemsetAsync(checksum, 0, sizeof *checksum, queue);
    if (error != cudaSuccess) return status_of(error);
    const unsigned blocks = grid_of(size_bytes, kThreads * kWordsOfThread * kWordBytes);
    const auto* bytes = static_cast<const uint8_t*>(data);
    sum_words<<<blocks, kThreads, 0, queue>>>(bytes, size_bytes, aligned(data, 16), checksum);
    finish<<<1, 1, 0, queue>>>(size_bytes, checksum);
    return queued();
}
