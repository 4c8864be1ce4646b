// Family `semi24`, products: y [T, n] = act(x [T, m] W^T + bias), W compressed (semi24.h), on sparse tensor cores.
//
// The hardware's sparse operand is the left one: the kernels compute D [n, T] = W x^T and write it column-major, which
// is y row-major; the bias runs along D's rows. Sums in fp32, one rounding.
#pragma once

#include "slkernels/semi24.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace slk {

enum class Activation24 : int { none, relu, silu, gelu, relu2 };  // gelu with erf; relu2 = max(z, 0)^2

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// bf16 or fp16. values and meta in the layout of the kernel's architecture, padded as there; x's rows start at
// multiples of 16 bytes, nothing is read beyond its column m; ld_x, ld_y in elements. bias [n] or null, of x's type.
struct Linear24Args {
  const void *values, *meta, *x, *bias;
  void* y;
  int64_t n, m, tokens, ld_x, ld_y;
  Activation24 activation;
};

// Asynchronous on `stream`. Deterministic: an element of y is summed in one block, over k ascending.
cudaError_t launch_linear24_sm80(DType, const Linear24Args&, cudaStream_t stream);  // layout sm80; mma.sp.sync
cudaError_t launch_linear24_sm90(DType, const Linear24Args&, cudaStream_t stream);  // layout sm90; CUTLASS, wgmma.sp

}  // namespace cuda
#endif

}  // namespace slk
