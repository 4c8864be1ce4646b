// Family `lowrank`: y[T, n] = act(x A^T) * gate * alpha B^T + bias with A [r, m], B [n, r], gate [r], bias [n].
//
// For many tokens the products are the dense library's. For few (decode) they are bound by reading A and B once, which
// the dense library does not reach; `skinny` below does.
#pragma once

#include "slkernels/types.h"

namespace slk::cpu {

// Most tokens that `skinny` takes: beyond, the dense library's blocking wins over reading the weights once.
constexpr int64_t kSkinnyTokens = 16;

struct LowRankKernels {
  // y[t, i] = alpha sum_k w[i, k] x[t, k] + bias[i] for the rows i of w [n, k] in `rows`.
  // x is fp32 [tokens, k], contiguous; w and bias (may be null) of type `dtype`, w with leading dimension ldw;
  // y fp32 [tokens, n], contiguous. Sums in fp32, in an order that depends on k only.
  void (*skinny)(DType dtype, const float* x, int64_t tokens, const void* w, int64_t ldw, int64_t k, int64_t n,
                 Range rows, float alpha, const void* bias, float* y);
};
const LowRankKernels& lowrank_kernels();

}  // namespace slk::cpu
