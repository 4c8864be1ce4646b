// Products of family `semi24` at the torch boundary: the checks that both devices share.
#pragma once

#include "slkernels/semi24_gemm.h"
#include "torch/semi24.h"

namespace slk {

Activation24 activation24_of(const char* op, const std::string& name);

// W [n, m] in `layout`, of x's dtype, on its device; contiguous.
PackedTensors24 check_weight24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                               Layout24 layout, const Tensor& x);

// What linear24_train takes for backward: W_t [m, n] in `layout`, and the dense W.
void check_train24(const char* op, const Tensor& x, const Tensor& values_t, const Tensor& meta_t, int64_t n,
                   Layout24 layout, const std::optional<Tensor>& weight);

// The last dimension; y [tokens, last] with like's other dimensions.
int64_t columns_of(const char* op, const char* name, const Tensor& x);
Tensor with_last(const Tensor& y, const Tensor& like, int64_t last);

// [n], x's dtype and device.
void check_bias24(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x);

}  // namespace slk
