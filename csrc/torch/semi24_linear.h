// Products of family `semi24` at the torch boundary: the checks that both devices share.
#pragma once

#include "slkernels/semi24_gemm.h"
#include "torch/semi24.h"

namespace slk {

Activation24 activation24_of(const char* op, const std::string& name);

// W [n, m] in `layout`, of x's dtype, on its device; contiguous.
PackedTensors24 check_weight24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                               Layout24 layout, const Tensor& x);

// [n], x's dtype and device.
void check_bias24(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x);

}  // namespace slk
