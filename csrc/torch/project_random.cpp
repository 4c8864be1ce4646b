// rand_matrix, rand_project, rand_project_back at the torch boundary.
#include <algorithm>
#include <cmath>

#include "slkernels/lowrank.h"
#include "slkernels/random_normal.cuh"
#include "torch/project.h"

namespace slk {
namespace {

// Numbers of P that exist at a time, in whole rows or whole columns: few enough to stay in cache, and a dense product
// of that width is bound by its arithmetic.
constexpr int64_t kPanelElements = int64_t(1) << 20;
constexpr int64_t kPanelWidth = 64;  // at least, and in multiples of it

int64_t panel_width(int64_t length) {
  return std::max(kPanelWidth, kPanelElements / std::max<int64_t>(length, 1) / kPanelWidth * kPanelWidth);
}

}  // namespace

Tensor normals(const char* op, const Tensor& seed, int64_t rank, Range rows, Range columns, ScalarType type) {
  check(rank < (int64_t(1) << 32), op, "rank must be below 2^32, got ", rank);
  check(columns.end <= kNormalColumns, op, "at most 2^34 columns, got ", columns.end);
  const bool wide = type == ScalarType::Double;
  Tensor out = empty_like_shape(seed, {rows.size(), columns.size()}, wide ? ScalarType::Float : type);
  const DType dtype = float_type(op, "dtype", out);
  const float scale = float(1 / std::sqrt(double(rank)));
  void* data = out.mutable_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(seed)) {
    check_cuda(op, cuda::launch_normals(dtype, seed.const_data_ptr<int64_t>(), scale, rows, columns, data,
                                        current_stream(op, seed.get_device_index())));
  } else
#endif
  {
    const int64_t row_bytes = columns.size() * (dtype == DType::f32 ? 4 : 2);
    const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
    parallel_for(rows.size(), grain_rows(columns.size()), [&](int64_t begin, int64_t end) {
      cpu::project_kernels().normals(dtype, key, scale, {rows.begin + begin, rows.begin + end}, columns,
                                     static_cast<char*>(data) + begin * row_bytes);
    });
  }
  if (!wide) return out;
  Tensor doubles = empty_like_shape(seed, shape_of(out), type);
  return torch::stable::copy_(doubles, out);
}

namespace {

Tensor rand_matrix(const Tensor& seed, int64_t rank, int64_t size, ScalarType type) {
  check_seed("rand_matrix", seed, nullptr);
  check(rank >= 0 && size >= 0, "rand_matrix", "rank and size must not be negative, got ", rank, " and ", size);
  const DeviceScope scope(seed);
  return normals("rand_matrix", seed, rank, {0, rank}, {0, size}, type);
}

// ---- rand_project ---------------------------------------------------------------------------------------------------

Tensor as_f32(const Tensor& t) {
  Tensor out = empty_like_shape(t, shape_of(t), ScalarType::Float);
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::copy_(out, t);
}

// One pass over G for at most kFewRows rows of P, in fp32; R is written as the transpose of `few`, [rank, columns].
void few_rows_cpu(const Tensor& P, const Tensor& G, Side side, const Tensor& R) {
  const int64_t rank = P.size(0), n = G.size(0), m = G.size(1);
  const Tensor p32 = as_f32(P);
  const DType type = dtype_of("rand_project", "G", G);
  const float* z = p32.const_data_ptr<float>();
  const void* g = G.const_data_ptr();
  const int64_t count = side == Side::left ? m : n;
  const Tensor sums = empty_like_shape(G, {rank, count}, ScalarType::Float);
  float* out = sums.mutable_data_ptr<float>();
  if (side == Side::left) {
    parallel_for(m, 512, [&](int64_t begin, int64_t end) {
      cpu::project_kernels().few_rows(type, z, rank, g, G.stride(0), n, {begin, end}, out, m);
    });
  } else {
    parallel_for(n, grain_rows(m), [&](int64_t begin, int64_t end) {
      cpu::lowrank_kernels().skinny(type, z, rank, g, G.stride(0), m, n, {begin, end}, 1.0f, nullptr, false, out);
    });
  }
  Tensor to = R;
  torch::stable::copy_(to, side == Side::left ? sums : t2(sums));
}

Tensor rand_project(const Tensor& G, const Tensor& seed, int64_t rank, Text side_name) {
  constexpr const char* op = "rand_project";
  check_matrix(op, "G", G);
  dtype_of(op, "G", G);
  check_seed(op, seed, &G);
  check(rank >= 1, op, "rank must be at least 1, got ", rank);
  const int64_t n = G.size(0), m = G.size(1);
  const Side side = side_of(op, side_name, n, m);
  const int64_t size = side == Side::left ? n : m;
  const DeviceScope scope(G);
  const Tensor R = empty_like_shape(G, side == Side::left ? Shape{rank, m} : Shape{n, rank});
  if (R.numel() == 0) return R;
  if (rank <= cpu::kFewRows && G.scalar_type() != ScalarType::Double && size > 0 && !is_cuda(G)) {
    few_rows_cpu(normals(op, seed, rank, {0, rank}, {0, size}, G.scalar_type()), with_unit_columns(G), side, R);
    return R;
  }
  const int64_t panel = panel_width(size);
  for (int64_t first = 0; first < rank; first += panel) {
    const int64_t rows = std::min(panel, rank - first);
    const Tensor P = normals(op, seed, rank, {first, first + rows}, {0, size}, G.scalar_type());
    Tensor whole = R;
    const Tensor part = torch::stable::narrow(whole, side == Side::left ? 0 : 1, first, rows);
    if (side == Side::left)
      dense_out(part, part, P, G, 0, 1);
    else
      dense_out(part, part, G, t2(P), 0, 1);
  }
  return R;
}

// ---- rand_project_back ----------------------------------------------------------------------------------------------

// By columns of P: each result is one sum, rounded once.
Tensor rand_project_back(const Tensor& R, const Tensor& seed, int64_t size, Text side_name) {
  constexpr const char* op = "rand_project_back";
  check_matrix(op, "R", R);
  dtype_of(op, "R", R);
  check_seed(op, seed, nullptr);
  check_same_device(op, "seed", seed, "R", R);
  check(size >= 0, op, "size must not be negative, got ", size);
  check(side_name == "left" || side_name == "right", op, "side must be left or right, got ", side_name);
  const Side side = side_of(op, side_name, 0, 0);
  const int64_t rank = R.size(side == Side::left ? 0 : 1);
  const DeviceScope scope(R);
  Tensor U = empty_like_shape(R, side == Side::left ? Shape{size, R.size(1)} : Shape{R.size(0), size});
  const int64_t panel = panel_width(rank);
  for (int64_t first = 0; first < size; first += panel) {
    const int64_t columns = std::min(panel, size - first);
    const Tensor P = normals(op, seed, rank, {0, rank}, {first, first + columns}, R.scalar_type());
    const Tensor part = torch::stable::narrow(U, side == Side::left ? 0 : 1, first, columns);
    if (side == Side::left)
      dense_out(part, part, t2(P), R, 0, 1);
    else
      dense_out(part, part, R, P, 0, 1);
  }
  return U;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("rand_matrix", TORCH_BOX(&rand_matrix));
  m.impl("rand_project", TORCH_BOX(&rand_project));
  m.impl("rand_project_back", TORCH_BOX(&rand_project_back));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("rand_matrix", TORCH_BOX(&rand_matrix));
  m.impl("rand_project", TORCH_BOX(&rand_project));
  m.impl("rand_project_back", TORCH_BOX(&rand_project_back));
}
#endif

}  // namespace slk
