// A small part of CUDA's interface, to run this project's kernels as loops on the CPU.
//
// A kernel calls each_thread with its code between two waits, so a loop over the threads gives the
// results of a device. A launch runs at once, block after block.
#pragma once

#include <cstddef>

#define SLD_EDGE_CUDA_ON_CPU
#define __global__
#define __device__
#define __shared__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned size) : x(size) {}
};

using cudaStream_t = struct CUstream_st *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace sld_edge {

inline dim3 blockIdx;
inline unsigned block_threads;
inline constexpr std::size_t SHARED_BYTES = 48 << 10;
double memory[SHARED_BYTES / sizeof(double)];  // `extern __shared__` declares it

template <typename Body>
void each_thread(const Body &body) {
    for (unsigned thread = 0; thread < block_threads; ++thread) body(static_cast<int>(thread));
}

}  // namespace sld_edge

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    if (config->gridDim.x == 0 || config->dynamicSmemBytes > sld_edge::SHARED_BYTES) {
        return cudaErrorInvalidConfiguration;
    }
    sld_edge::block_threads = config->blockDim.x;
    for (unsigned block = 0; block < config->gridDim.x; ++block) {
        sld_edge::blockIdx.x = block;
        for (double &number : sld_edge::memory) number = -12345.0;  // shared memory starts with any numbers
        kernel(arguments...);
    }
    return cudaSuccess;
}
