// Family `project` at the torch boundary: what its files share.
#pragma once

#include <algorithm>

#include "slkernels/project.h"
#include "torch/device.h"
#ifdef SLKERNELS_WITH_CUDA
#include "slkernels/project_cuda.h"
#endif

namespace slk {

using MaybeTensor = std::optional<Tensor>;

enum class Side { left, right };

// Which side of G [n, m] the projection stands on; "auto" as GaLore: on the right of a tall G.
Side side_of(const char* op, const std::string& side, int64_t n, int64_t m);

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_matrix(const char* op, const char* name, const Tensor& t);
void check_shape(const char* op, const char* name, const Tensor& t, const Shape& shape);
// float32, bfloat16 or float16.
DType float_type(const char* op, const char* name, const Tensor& t);
void check_seed(const char* op, const Tensor& seed, const Tensor* like);
void check_rounding(const char* op, const Tensor& like, int64_t round_mode, const MaybeTensor& rng);

// ---- dense products, on either device -------------------------------------------------------------------------------

// out = beta self + alpha a b by the dense library, below autograd.
void dense_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha);
// a b, a new tensor of a's dtype.
Tensor dense(const Tensor& a, const Tensor& b);
// t with columns of unit stride: itself, or a copy.
Tensor with_unit_columns(const Tensor& t);

// left N right, an absent factor being the identity, by slices of rows: an update never holds all of it.
class BackProjection {
 public:
  BackProjection(const char* op, const Tensor& N, const MaybeTensor& left, const MaybeTensor& right, int64_t n,
                 int64_t m);
  int64_t slice_rows() const { return slice_rows_; }
  // Rows [first, first + rows) of it, at most slice_rows(), contiguous; valid until the next call.
  Tensor slice(int64_t first, int64_t rows);
  // out = beta out + alpha (left N right), one dense product.
  void add_to(const Tensor& out, double beta, double alpha) const { dense_out(out, out, rows_, columns_, beta, alpha); }

 private:
  Tensor rows_, columns_, buffer_;  // the product is rows_ columns_; rows_ has W's rows
  int64_t slice_rows_;
};

// ---- updates --------------------------------------------------------------------------------------------------------

// What an update is told besides its operands. Tensors are on W's device and are read there.
struct UpdateOptions {
  Tensor lr;
  double alpha, weight_decay;
  MaybeTensor found_inf;
  int64_t round_mode;
  MaybeTensor rng;
};
void check_update(const char* op, const Tensor& like, const UpdateOptions& options);

// The same, read on the host: for CPU tensors.
StochasticRounding host_rounding(int64_t round_mode, const MaybeTensor& rng);
UpdateScalars host_scalars(const UpdateOptions& options);
bool is_skipped(const UpdateOptions& options);

#ifdef SLKERNELS_WITH_CUDA
cuda::DeviceRounding device_rounding(int64_t round_mode, const MaybeTensor& rng);
cuda::DeviceUpdate device_update(const UpdateOptions& options);
#endif

// Rows of m elements that are worth another thread.
int64_t grain_rows(int64_t m);

// Operands without T and G.
UpdateOperands no_operands();

// f(operands, first row, rows) for slices of n rows: operands are `given` with the product's slice as T.
template <class F>
void for_slices(BackProjection& product, int64_t n, const F& f, UpdateOperands given = no_operands()) {
  for (int64_t first = 0; first < n; first += product.slice_rows()) {
    const int64_t rows = std::min(product.slice_rows(), n - first);
    const Tensor slice = product.slice(first, rows);
    given.t = slice.const_data_ptr();
    given.t_type = dtype_of("project", "N", slice);
    given.ldt = slice.size(1);
    given.t_row = first;
    f(given, first, rows);
  }
}

// ---- random matrices ------------------------------------------------------------------------------------------------

// Some rows and columns of Z / sqrt(rank), in `type`, on seed's device; columns.begin is a multiple of 64.
Tensor normals(const char* op, const Tensor& seed, int64_t rank, Range rows, Range columns, ScalarType type);

}  // namespace slk
