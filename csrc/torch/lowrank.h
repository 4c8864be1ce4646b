// Low-rank products at the torch boundary, shared by `lowrank` and `sl`.
#pragma once

#include "torch/tensor.h"

namespace slk {

// out = alpha x w^T (+ bias) with x [T, k], w [n, k]: one pass over w for few tokens, else the dense library.
// out is a new tensor of x's dtype.
Tensor linear(const Tensor& x, const Tensor& w, double alpha, const Tensor* bias);

}  // namespace slk
