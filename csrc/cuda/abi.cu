// Identity of the library, and what it finds on this machine.

#include "launch.cuh"

using namespace slipstream;

extern "C" int32_t slipstream_abi_version(void) { return SLIPSTREAM_ABI_VERSION; }

extern "C" int32_t slipstream_cuda_device_count(int32_t* count) {
    if (count == nullptr) return SLIPSTREAM_NULL_POINTER;
    int found = 0;
    const cudaError_t error = cudaGetDeviceCount(&found);
    if (error == cudaSuccess) *count = found;
    return status_of(error);
}

extern "C" const char* slipstream_cuda_error(int32_t status) {
    return cudaGetErrorString(static_cast<cudaError_t>(-status));
}
