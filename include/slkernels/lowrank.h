// Family `lowrank`: y[T, n] = act(x A^T) * gate * alpha B^T + x base^T + bias with A [r, m], B [n, r], gate [r], base
// [n, m], bias [n].
//
// For many tokens the products are the dense library's. For few (decode) they are bound by reading A and B once, which
// the dense library does not reach; `skinny` below does.
#pragma once

#include "slkernels/types.h"

namespace slk::cpu {

// Most tokens that `skinny` takes: beyond, the dense library's blocking wins over reading the weights once.
constexpr int64_t kSkinnyTokens = 16;

struct LowRankKernels {
  // y[t, i] = alpha sum_k w[i, k] x[t, k] + bias[i] for the rows i of w [n, k] in `rows`; with `accumulate` the sum is
  // added to y, without bias.
  // x is fp32 [tokens, k], contiguous; w and bias (may be null) of type `dtype`, w with leading dimension ldw;
  // y fp32 [tokens, n], contiguous. Sums in fp32, in an order that depends on k only.
  void (*skinny)(DType dtype, const float* x, int64_t tokens, const void* w, int64_t ldw, int64_t k, int64_t n,
                 Range rows, float alpha, const void* bias, bool accumulate, float* y);
};
const LowRankKernels& lowrank_kernels();

// h = silu(gate) up with silu(g) = g / (1 + e^-g), element by element: what joins the two products of SwiGLU. Reads
// gate and up once and writes h once, 6 bytes an element of a 16-bit type where silu and a product of their own
// take 10.
struct SwigluKernels {
  void (*forward)(DType, const void* gate, const void* up, void* h, Range);
  // gate and up are replaced by their gradients for the incoming dh: d gate = dh up s (1 + gate (1 - s)) with
  // s = 1 / (1 + e^-gate), d up = dh gate s.
  void (*backward)(DType, const void* dh, void* gate, void* up, Range);
};
const SwigluKernels& swiglu_kernels();

}  // namespace slk::cpu

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

// SwigluKernels on the device: `count` elements, contiguous; 16-byte accesses where the addresses allow them.
cudaError_t launch_swiglu(DType, const void* gate, const void* up, void* h, int64_t count, cudaStream_t);
cudaError_t launch_swiglu_backward(DType, const void* dh, void* gate, void* up, int64_t count, cudaStream_t);

}  // namespace slk::cuda
#endif
