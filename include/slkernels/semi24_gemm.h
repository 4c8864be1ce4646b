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

// Whether a GPU's sparse tensor cores are expected to be faster than the dense product of the same sizes: by what is
// published of cuSPARSELt on an H100 (bf16: 0.75 of cuBLAS at 1024^3, 0.97 at 2048^3, 1.5 and more from 4096^3 on). Few
// tokens leave most of a tile empty. Ours are not measured yet (docs/semi24_cuda.md).
constexpr int64_t kSparsePaysTokens24 = 512;
constexpr double kSparsePaysWork24 = 2048.0 * 2048.0 * 2048.0;
constexpr bool sparse_pays24(int64_t tokens, int64_t n, int64_t m) {
  return tokens >= kSparsePaysTokens24 && double(tokens) * double(n) * double(m) > kSparsePaysWork24;
}

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

// dvalues = dy [tokens, n]^T x [tokens, m] at the slots of a pack, bf16 or fp16, sums in fp32, one rounding; the dense
// product is not stored. `meta` in any layout, values as there (packed layouts: their padding is written, as zeros).
// Rows of dy and x start at multiples of 16 bytes, nothing is read beyond columns n and m. Asynchronous on `stream`;
// deterministic: an element is summed in one block, over tokens ascending.
struct DwCompress24Args {
  const void *dy, *x, *meta;
  void* values;
  int64_t n, m, tokens, ld_dy, ld_x;
  Layout24 layout;
};
cudaError_t launch_dw_compress24_sm80(DType, const DwCompress24Args&, cudaStream_t stream);  // sm_80 and newer

}  // namespace cuda
#endif

}  // namespace slk
