#include <cuda_runtime.h>

#include <limits>

#include "kernels.cuh"

namespace sld_edge {
namespace {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, std::size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(BLOCK);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Prediction>
cudaError_t launch_step(const sld_edge_step &step, float *partial, cudaStream_t stream) {
    const std::int64_t blocks = step.images * parts(step, BLOCK);
    const std::size_t shared = sizeof(float) * BLOCK * sums(step);
    const auto kernel = step.combine == SLD_EDGE_SUM
                            ? step_kernel<Prediction, SLD_EDGE_SUM>
                            : step_kernel<Prediction, SLD_EDGE_STRONGEST>;
    return launch(kernel, blocks, shared, stream, step, partial);
}

bool fits_a_grid(const sld_edge_step &step) {
    return step.images * parts(step, BLOCK) <= std::numeric_limits<std::int32_t>::max();
}

}  // namespace
}  // namespace sld_edge

extern "C" size_t sld_edge_cuda_workspace_bytes(const sld_edge_step *step) {
    using namespace sld_edge;
    if (step == nullptr || !sizes_are_usable(*step) || !fits_a_grid(*step)) return 0;
    const std::int64_t numbers = step->images * parts(*step, BLOCK) * sums(*step);
    return static_cast<std::size_t>(numbers) * sizeof(float);
}

extern "C" int sld_edge_safe_step_cuda(const sld_edge_step *step, void *workspace,
                                       size_t workspace_bytes, void *stream) {
    using namespace sld_edge;
    const int status = check(step);
    if (status != SLD_EDGE_OK) return status;
    const std::size_t needed = sld_edge_cuda_workspace_bytes(step);
    if (needed == 0) return SLD_EDGE_WRONG_SIZE;
    if (workspace == nullptr || workspace_bytes < needed) return SLD_EDGE_WRONG_WORKSPACE;
    auto *partial = static_cast<float *>(workspace);
    const auto on = static_cast<cudaStream_t>(stream);
    cudaError_t error = step->prediction_type == SLD_EDGE_FP16
                            ? launch_step<Half>(*step, partial, on)
                            : launch_step<float>(*step, partial, on);
    if (error == cudaSuccess) {
        const std::size_t shared = sizeof(double) * sums(*step);
        error = launch(report_kernel, step->images, shared, on, *step,
                       static_cast<const float *>(partial));
    }
    return error == cudaSuccess ? SLD_EDGE_OK : SLD_EDGE_CUDA_FAILED;
}
