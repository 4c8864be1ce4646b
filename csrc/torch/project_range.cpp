// randomized_range: leading singular vectors from dense products, Cholesky factors and one small eigenproblem.
//
// X [a, b] is G or its transpose, such that its left vectors are asked for. With l = rank + oversample test vectors:
//     Y = X Omega;   iters times: Y = X orth(X^T orth(Y));   Q R = Y;   U = the first columns of Q eigenvectors(R R^T)
//
// All bases come from Cholesky-QR, Y L^-T with L L^T = Y^T Y + shift. Between products the shift is above fp32's
// rounding: no factorization fails, large directions become orthonormal, small ones keep a part of their length, which
// is all that a power iteration needs. The last basis takes two passes (CholeskyQR2: Yamamoto, Nakatsukasa, Yanagisawa,
// Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 2015), the first with an fp64 Gram matrix, after
// noise of relative size kNoise has given Y full rank: then cond(Y) <= 1 / kNoise, the smallest eigenvalue kNoise^2 is
// far above fp64's rounding, and the result is orthonormal whatever the rank of G.
#include <algorithm>
#include <cmath>

#include "torch/project.h"

namespace slk {
namespace {

constexpr const char* kOp = "randomized_range";
constexpr double kNoise = 1e-6;
constexpr double kShift32 = 4e-6, kShift64 = 1e-14;  // of the Gram matrix's trace
// Beyond this part of all directions test vectors save nothing, and noise no longer has full rank to spare.
constexpr double kNearlyAll = 0.75;

Tensor converted(const Tensor& t, ScalarType type) {
  Tensor out = empty_like_shape(t, shape_of(t), type);
  return torch::stable::copy_(out, t);
}

// t / size, where size > 0.
Tensor divided(const Tensor& t, const Tensor& size) {
  const Tensor tiny = torch::stable::fill_(empty_like_shape(size, shape_of(size)), 1e-30);
  return aten("aten::div", "Tensor", t, aten("aten::maximum", "", size, tiny));
}

// An aten op of one matrix that returns two; the second one or the first.
template <class... Args>
Tensor one_of_two(int which, const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  const Tensor both[2] = {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  return both[which];
}

// Eigenvectors of the symmetric c, as columns, by falling eigenvalue. The eigensolver gets zeros in place of NaN, which
// some of LAPACK's answer with an error and some with numbers.
Tensor eigenvectors(const Tensor& c) {
  const std::vector<int64_t> columns = {1};
  const std::optional<double> zero = 0;
  const Tensor finite = aten("aten::nan_to_num", "", c, zero, zero, zero);
  const Tensor ascending = one_of_two(1, "aten::linalg_eigh", finite, std::string("L"));
  return aten("aten::flip", "", ascending, torch::headeronly::IntHeaderOnlyArrayRef(columns.data(), 1));
}

// R upper triangular with y R^-1 orthonormal, from a Gram matrix of some precision; shift is a part of its trace.
Tensor triangle(const Tensor& y, ScalarType precision, double shift) {
  const Tensor wide = precision == y.scalar_type() ? y : converted(y, precision);
  Tensor gram = dense(t2(wide), wide);
  if (shift > 0) {
    const Tensor trace = aten("aten::trace", "", gram);
    const Tensor floor = torch::stable::fill_(empty_like_shape(trace, {y.size(1)}), 1e-30);
    const Tensor size = aten("aten::maximum", "", floor, trace);
    gram =
        torch::stable::subtract(gram, aten("aten::diag_embed", "", size, int64_t(0), int64_t(0), int64_t(1)), -shift);
  }
  const Tensor lower = one_of_two(0, "aten::linalg_cholesky_ex", gram, false, false);
  return t2(lower.scalar_type() == y.scalar_type() ? lower : converted(lower, y.scalar_type()));
}

// a^-1 b or b a^-1 of an upper triangular a.
Tensor solved(const Tensor& a, const Tensor& b, bool from_left) {
  return aten("aten::linalg_solve_triangular", "", a, b, true, from_left, false);
}

Tensor orth(const Tensor& y) {
  return as_contiguous(solved(triangle(y, ScalarType::Float, kShift32), y, false));
}

Tensor with_unit_norm(const Tensor& y) {
  const std::vector<int64_t> dims = {0, 1};
  const Tensor squares = torch::stable::sum(
      aten("aten::mul", "Tensor", y, y), std::optional(torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), 2)), true);
  return divided(y, aten("aten::sqrt", "", squares));
}

// Whether bfloat16 products are several times as fast as fp32 ones here.
bool has_fast_bf16(const Tensor& t) {
#if defined(__x86_64__)
  return is_cuda(t) || __builtin_cpu_supports("avx512bf16");
#else
  return is_cuda(t);
#endif
}

// An orthonormal basis [b, l] near the leading right singular vectors of X: random vectors after `iters` rounds of
// X^T orth(X .), whose products need not be exact: a relative error of 2^-9 moves directions that hold 1e-6 of |X|^2.
Tensor right_basis(const Tensor& X, int64_t l, int64_t iters, const Tensor& seed) {
  const ScalarType type = has_fast_bf16(X) ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor rough = type == ScalarType::Float ? X : converted(X, type);
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor c = dense(a, b.scalar_type() == type ? b : converted(b, type));
    return type == ScalarType::Float ? c : converted(c, ScalarType::Float);
  };
  Tensor basis = t2(normals(kOp, seed, 1, {0, l}, {0, X.size(1)}, type));
  for (int64_t i = 0; i < iters; ++i) basis = orth(product(t2(rough), orth(product(rough, basis))));
  return basis.scalar_type() == ScalarType::Float ? basis : converted(basis, ScalarType::Float);
}

// The leading left singular vectors of X, [a, rank].
Tensor left_vectors(const Tensor& X, int64_t rank, int64_t oversample, int64_t iters, const Tensor& seed) {
  const int64_t a = X.size(0), b = X.size(1), shorter = std::min(a, b);
  int64_t l = std::min(rank + oversample, shorter);
  if (double(l) >= kNearlyAll * double(shorter)) l = shorter;
  if (double(l) >= kNearlyAll * double(a)) {
    const Tensor U = eigenvectors(dense(X, t2(X)));
    return torch::stable::narrow(const_cast<Tensor&>(U), 1, 0, rank);
  }
  const Tensor Y = l < shorter ? dense(X, right_basis(X, l, iters, seed)) : X;
  const Tensor noise = as_contiguous(t2(normals(kOp, seed, 1, {l, 2 * l}, {0, a}, ScalarType::Float)));
  const double smallest = std::sqrt(double(a)) - std::sqrt(double(l));  // singular value of the noise
  const Tensor full = torch::stable::subtract(with_unit_norm(Y), noise, -kNoise / smallest);
  const Tensor R1 = triangle(full, ScalarType::Double, kShift64), Q = as_contiguous(solved(R1, full, false));
  const Tensor R2 = triangle(Q, ScalarType::Float, 0), R = dense(R2, R1);
  Tensor V = eigenvectors(dense(R, t2(R)));
  return dense(Q, solved(R2, torch::stable::narrow(V, 1, 0, rank), true));
}

Tensor randomized_range(const Tensor& G, int64_t rank, const Tensor& seed, int64_t oversample, int64_t iters,
                        Text side_name) {
  check_matrix(kOp, "G", G);
  float_type(kOp, "G", G);
  check_seed(kOp, seed, &G);
  const int64_t n = G.size(0), m = G.size(1);
  const Side side = side_of(kOp, side_name, n, m);
  check(rank >= 1 && rank <= std::min(n, m), kOp, "rank must be from 1 to min(n, m) = ", std::min(n, m), ", got ",
        rank);
  check(oversample >= 0 && iters >= 0, kOp, "oversample and iters must not be negative, got ", oversample, " and ",
        iters);
  const DeviceScope scope(G);
  const Tensor detached = aten("aten::detach", "", G);
  const Tensor wide = G.scalar_type() == ScalarType::Float ? detached : converted(detached, ScalarType::Float);
  const std::vector<int64_t> both = {0, 1};
  const torch::headeronly::IntHeaderOnlyArrayRef dims(both.data(), 2);
  const Tensor lowest = aten("aten::neg", "", aten("aten::amin", "", wide, dims, true));
  const Tensor largest = aten("aten::maximum", "", torch::stable::amax(wide, dims, true), lowest);
  const Tensor X = divided(wide, largest);  // no square of it over- or underflows
  const Tensor U = left_vectors(side == Side::left ? X : t2(X), rank, oversample, iters, seed);
  const Tensor poison = torch::stable::subtract(largest, largest);  // 0, or NaN where G is not finite
  return as_contiguous(torch::stable::subtract(side == Side::left ? U : t2(U), poison));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("randomized_range", TORCH_BOX(&randomized_range));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("randomized_range", TORCH_BOX(&randomized_range));
}
#endif

}  // namespace slk
