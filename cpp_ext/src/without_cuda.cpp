// The CUDA functions of a library that was built without CUDA.
#include "sld_edge.h"

extern "C" size_t sld_edge_cuda_workspace_bytes(const sld_edge_step *) { return 0; }

extern "C" int sld_edge_safe_step_cuda(const sld_edge_step *, void *, size_t, void *) {
    return SLD_EDGE_NO_CUDA;
}
