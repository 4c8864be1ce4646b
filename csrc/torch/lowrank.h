// Low-rank products at the torch boundary, shared by `lowrank` and `sl`.
#pragma once

#include "torch/tensor.h"

namespace slk {

// One product alpha x w^T with x [T, k], w [n, k].
struct Product {
  Tensor x, w;
  double alpha;
};

// out = the sum of the products (+ bias), a new tensor of the first x's dtype: one pass over each w for few tokens,
// rounded once; else the dense library, each product added to the one before it as part of the product (beta = 1).
Tensor sum_of_products(const std::vector<Product>& products, const Tensor* bias);

// The same of one product.
Tensor linear(const Tensor& x, const Tensor& w, double alpha, const Tensor* bias);

void check_bias(const char* op, const Tensor& bias, int64_t n, const Tensor& x);
void check_base(const char* op, const Tensor& base, int64_t n, int64_t m, const Tensor& x);

// Products that share x: z = x A^T with the factors A_i stacked in A, y_i = alpha_i z_i B_i^T (+ x base_i^T) (+ bias_i)
// with z_i the columns of z that belong to A_i. bias and base are empty or as long as B; alpha empty means ones.
struct SharedInput {
  Tensor A;
  Tensors B, bias, base;
  std::vector<double> alpha;
  int64_t rank(size_t i) const { return B[i].size(1); }
  double scale(size_t i) const { return alpha.empty() ? 1 : alpha[i]; }
};
void check_shared_input(const char* op, const Tensor& x, const SharedInput& layer);

// The columns of z [T, sum of ranks] that belong to each B_i: views.
Tensors parts(const SharedInput& layer, const Tensor& z);

Tensors shared_forward(const SharedInput& layer, const Tensor& x, const Tensor& z);

struct SharedNeeds {
  bool x, A, B, base;
};
struct SharedGradients {
  Tensor x, A;      // empty where not asked for
  Tensors B, base;  // of no tensors where not asked for
};
// dx and dA come from one product each with the stacked A.
SharedGradients shared_backward(const SharedInput& layer, const Tensors& dy, const Tensor& x, const Tensor& z,
                                SharedNeeds need);

}  // namespace slk
