// Family `project` at the torch boundary: projection, the way back, and updates through it, on a CPU.
#include "torch/project.h"

#include <algorithm>

namespace slk {

// ---- checks ---------------------------------------------------------------------------------------------------------

Side side_of(const char* op, const std::string& side, int64_t n, int64_t m) {
  if (side == "left") return Side::left;
  if (side == "right") return Side::right;
  check(side == "auto", op, "side must be auto, left or right, got ", side);
  return n >= m ? Side::right : Side::left;
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, name, " must be [n, m], got ", show(t));
}

void check_shape(const char* op, const char* name, const Tensor& t, const Shape& shape) {
  if (shape_of(t) == shape) return;
  std::ostringstream want;
  for (size_t d = 0; d < shape.size(); ++d) want << (d ? ", " : "") << shape[d];
  check(false, op, name, " must be [", want.str(), "], got ", show(t));
}

DType float_type(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, name,
        " must be float32, bfloat16 or float16, got ", show(type));
  return dtype_of(op, name, t);
}

void check_seed(const char* op, const Tensor& seed, const Tensor* like) {
  check(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op,
        "seed must be an int64 tensor with one element, got ", show(seed.scalar_type()), " ", show(seed));
  if (like) check_same_device(op, "seed", seed, "G", *like);
}

void check_rounding(const char* op, const Tensor& like, int64_t round_mode, const MaybeTensor& rng) {
  check(round_mode == 0 || round_mode == 1, op, "round_mode must be 0 (nearest even) or 1 (stochastic), got ",
        round_mode);
  if (round_mode == 0) return;
  check(rng.has_value(), op, "round_mode 1 needs rng, int64 [2] = (seed, step)");
  check(rng->scalar_type() == ScalarType::Long && rng->dim() == 1 && rng->size(0) == 2 && rng->is_contiguous(), op,
        "rng must be int64 [2], got ", show(rng->scalar_type()), " ", show(*rng));
  check_same_device(op, "rng", *rng, "the weight", like);
}

namespace {

void check_one_float(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, name,
        " must be a float32 tensor with one element, got ", show(t.scalar_type()), " ", show(t));
  check_same_device(op, name, t, "the weight", like);
}

void check_factors(const char* op, const char* name, const Tensor& t, const MaybeTensor& left,
                   const MaybeTensor& right) {
  check(left || right, op, "left or right must be given");
  for (const auto& [what, factor] : {std::pair("left", &left), std::pair("right", &right)}) {
    if (!*factor) continue;
    check(factor->value().dim() == 2, op, what, " must be a matrix, got ", show(**factor));
    check_same_dtype(op, what, **factor, name, t);
    check_same_device(op, what, **factor, name, t);
  }
}

}  // namespace

void check_update(const char* op, const Tensor& like, const UpdateOptions& options) {
  check_one_float(op, "lr", options.lr, like);
  if (options.found_inf) check_one_float(op, "found_inf", *options.found_inf, like);
  check_rounding(op, like, options.round_mode, options.rng);
}

// ---- dense products -------------------------------------------------------------------------------------------------

void dense_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(out)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
    return;
  }
#endif
  addmm_out(out, self, a, b, beta, alpha);
}

Tensor dense(const Tensor& a, const Tensor& b) {
  const Tensor out = empty_like_shape(a, {a.size(0), b.size(1)});
  dense_out(out, out, a, b, 0, 1);
  return out;
}

Tensor with_unit_columns(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

namespace {

// A slice of the product is written by the dense library and read by the update right after: small enough for a shared
// L3 (of a GPU: its L2), large enough that the library's packing of the other factor does not show.
constexpr int64_t kSliceElements = int64_t(1) << 21;

}  // namespace

BackProjection::BackProjection(const char* op, const Tensor& N, const MaybeTensor& left, const MaybeTensor& right,
                               int64_t n, int64_t m) {
  check_matrix(op, "N", N);
  check_factors(op, "N", N, left, right);
  if (left) check_shape(op, "left", *left, {n, N.size(0)});
  if (right) check_shape(op, "right", *right, {N.size(1), m});
  check((left ? left->size(0) : N.size(0)) == n && (right ? right->size(1) : N.size(1)) == m, op, "N must be ",
        left ? "[rank, " : "[", left ? m : n, left ? "]" : ", rank]", ", got ", show(N));
  rows_ = left ? *left : N;
  columns_ = right ? *right : N;
  if (left && right) columns_ = dense(N, *right);  // [rank, m]: as small as the gradient's projection
  slice_rows_ = std::max<int64_t>(1, std::min(n, kSliceElements / std::max<int64_t>(m, 1)));
  buffer_ = Tensor();
}

Tensor BackProjection::slice(int64_t first, int64_t rows) {
  if (!buffer_.defined()) buffer_ = empty_like_shape(rows_, {slice_rows_, columns_.size(1)});
  const Tensor out = torch::stable::narrow(buffer_, 0, 0, rows);
  const Tensor part = torch::stable::narrow(rows_, 0, first, rows);
  dense_out(out, out, part, columns_, 0, 1);
  return out;
}

// ---- updates --------------------------------------------------------------------------------------------------------

StochasticRounding host_rounding(int64_t round_mode, const MaybeTensor& rng) {
  if (round_mode == 0) return {};
  const int64_t* words = rng->const_data_ptr<int64_t>();
  return {true, uint64_t(words[0]), uint32_t(words[1])};
}

UpdateScalars host_scalars(const UpdateOptions& o) {
  return UpdateScalars::of(*o.lr.const_data_ptr<float>(), float(o.alpha), float(o.weight_decay));
}

bool is_skipped(const UpdateOptions& o) {
  return o.found_inf && *o.found_inf->const_data_ptr<float>() != 0;
}

#ifdef SLKERNELS_WITH_CUDA
cuda::DeviceRounding device_rounding(int64_t round_mode, const MaybeTensor& rng) {
  return {round_mode == 0 ? nullptr : rng->const_data_ptr<int64_t>()};
}

cuda::DeviceUpdate device_update(const UpdateOptions& o) {
  return {o.lr.const_data_ptr<float>(), o.found_inf ? o.found_inf->const_data_ptr<float>() : nullptr, float(o.alpha),
          float(o.weight_decay), device_rounding(o.round_mode, o.rng)};
}
#endif

int64_t grain_rows(int64_t m) {
  constexpr int64_t kGrainElements = 16384;
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(m, 1));
}

UpdateOperands no_operands() {
  return {nullptr, DType::f32, 0, 0, nullptr, DType::f32, 0, nullptr, FactorOf::all};
}

namespace {

// ---- project, project_back ------------------------------------------------------------------------------------------

Tensor project(const Tensor& G, MaybeTensor left, MaybeTensor right) {
  constexpr const char* op = "project";
  check_matrix(op, "G", G);
  dtype_of(op, "G", G);
  check_factors(op, "G", G, left, right);
  const int64_t n = G.size(0), m = G.size(1);
  if (left) check_shape(op, "left", *left, {n, left->size(1)});
  if (right) check_shape(op, "right", *right, {right->size(0), m});
  const DeviceScope scope(G);
  if (!left) return dense(G, t2(*right));
  if (!right) return dense(t2(*left), G);
  // The second product is [rank, .] by [., rank]: the one with the shorter side in between.
  return n < m ? dense(t2(*left), dense(G, t2(*right))) : dense(dense(t2(*left), G), t2(*right));
}

Tensor project_back(const Tensor& N, MaybeTensor left, MaybeTensor right) {
  constexpr const char* op = "project_back";
  check_matrix(op, "N", N);
  dtype_of(op, "N", N);
  check_factors(op, "N", N, left, right);
  if (left) check_shape(op, "left", *left, {left->size(0), N.size(0)});
  if (right) check_shape(op, "right", *right, {N.size(1), right->size(1)});
  const DeviceScope scope(N);
  if (!left) return dense(N, *right);
  return dense(*left, right ? dense(N, *right) : N);
}

// ---- project_back_add_ ----------------------------------------------------------------------------------------------

constexpr const char* kBackAdd = "project_back_add_";

// Checks the call, and gives the product that it adds.
BackProjection back_add_product(const Tensor& W, const Tensor& N, const MaybeTensor& left, const MaybeTensor& right,
                                const UpdateOptions& options) {
  check_matrix(kBackAdd, "W", W);
  float_type(kBackAdd, "W", W);
  check(W.is_contiguous(), kBackAdd, "W must be contiguous");
  check(N.scalar_type() == W.scalar_type() || N.scalar_type() == ScalarType::Float, kBackAdd, "N must have W's dtype ",
        show(W.scalar_type()), " or be float32, got ", show(N.scalar_type()));
  check_same_device(kBackAdd, "N", N, "W", W);
  check_update(kBackAdd, W, options);
  return BackProjection(kBackAdd, N, left, right, W.size(0), W.size(1));
}

void project_back_add_(const Tensor& W, const Tensor& N, const Tensor& lr, MaybeTensor left, MaybeTensor right,
                       double alpha, double weight_decay, MaybeTensor found_inf, int64_t round_mode, MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  BackProjection product = back_add_product(W, N, left, right, options);
  if (W.numel() == 0 || is_skipped(options)) return;
  const UpdateScalars scalars = host_scalars(options);
  const DType type = float_type(kBackAdd, "W", W);
  if (type == DType::f32) {  // the dense library's own epilogue rounds once
    product.add_to(W, scalars.decay, scalars.step);
    return;
  }
  const StochasticRounding rounding = host_rounding(round_mode, rng);
  void* w = W.mutable_data_ptr();
  const int64_t m = W.size(1);
  for_slices(product, W.size(0), [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    parallel_for(rows, grain_rows(m), [&](int64_t begin, int64_t end) {
      cpu::project_kernels().update(type, w, m, operands, scalars, rounding, {first + begin, first + end});
    });
  });
}

#ifdef SLKERNELS_WITH_CUDA

// Without decay, rounding to nearest: W + left (-lr alpha N) right in the dense library's epilogue, 4 bytes an element
// of a bf16 W. lr stays on the device, so it is folded into N; a float16 N would underflow. All else goes by slices:
// the product is written to L2 and read back by the update.
void project_back_add_cuda(const Tensor& W, const Tensor& N, const Tensor& lr, MaybeTensor left, MaybeTensor right,
                           double alpha, double weight_decay, MaybeTensor found_inf, int64_t round_mode,
                           MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  BackProjection product = back_add_product(W, N, left, right, options);
  if (W.numel() == 0) return;
  const DeviceScope scope(W);
  const cudaStream_t stream = current_stream(kBackAdd, W.get_device_index());
  const cuda::DeviceUpdate update = device_update(options);
  const DType type = float_type(kBackAdd, "W", W);
  if (weight_decay == 0 && round_mode == 0 && !found_inf && N.scalar_type() == W.scalar_type() && type != DType::f16) {
    const Tensor from = as_contiguous(N), folded = empty_like_shape(N, shape_of(N));
    check_cuda(kBackAdd,
               cuda::launch_fold(type, from.const_data_ptr(), from.numel(), update, folded.mutable_data_ptr(), stream));
    BackProjection(kBackAdd, folded, left, right, W.size(0), W.size(1)).add_to(W, 1, 1);
    return;
  }
  void* w = W.mutable_data_ptr();
  for_slices(product, W.size(0), [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    check_cuda(kBackAdd, cuda::launch_update(type, w, W.size(1), {first, first + rows}, operands, update, stream));
  });
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_back", TORCH_BOX(&project_back));
  m.impl("project_back_add_", TORCH_BOX(&project_back_add_));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_back", TORCH_BOX(&project_back));
  m.impl("project_back_add_", TORCH_BOX(&project_back_add_cuda));
}
#endif

}  // namespace slk
