// Products of family `semi24` at the torch boundary: the checks that both devices share.
#pragma once

#include "slkernels/semi24_gemm.h"
#include "torch/tensor.h"

namespace slk {

Activation24 activation24_of(const char* op, const std::string& name);
Layout24 layout24_of(const char* op, const std::string& name);

// meta must be layout plain's for [n, m]; values too, in x's dtype.
void check_meta24(const char* op, const Tensor& meta, int64_t n, int64_t m, const char* like_name, const Tensor& like);
void check_plain24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m, const Tensor& x);

// [n], x's dtype and device.
void check_bias24(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x);

}  // namespace slk
