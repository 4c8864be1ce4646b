// Family `semi24`: a dense gradient at the slots of a pack.
#pragma once

#include "slkernels/semi24_pack.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

// Of the pack's rows `rows`: values <- W at the slots of meta, zeros at padding. W's row rows.begin is at w, rows m
// apart. bytes: of an element, 2 or 4. Asynchronous on `stream`.
cudaError_t launch_gather24(int bytes, const void* w, const Packed24& pack, Range rows, cudaStream_t stream);

}  // namespace slk::cuda
#endif
