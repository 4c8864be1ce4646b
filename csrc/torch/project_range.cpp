// randomized_range: leading singular vectors from dense products, Cholesky factors and one small eigenproblem.
//
// X [a, b] is G or its transpose, such that its left vectors are asked for. With l = rank + oversample test vectors:
//     Y = X Omega;   iters times: Y = X orth(X^T orth(Y));   Q R = Y;   U = the first columns of Q eigenvectors(R R^T)
//
// orth is Cholesky-QR with a Gram matrix in fp64: L L^T = Y^T Y, Y L^-T, orthonormal to eps32 cond(Y), which is enough
// between products. The last basis takes two passes (CholeskyQR2: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, "Roundoff
// error analysis of the CholeskyQR2 algorithm", ETNA 2015), after noise of relative size kNoise has given Y full rank:
// then cond(Y) <= 1 / kNoise, the smallest eigenvalue kNoise^2 of the Gram matrix is far above fp64's rounding, and the
// result is orthonormal whatever the rank of G.
#include <algorithm>
#include <cmath>

#include "torch/device.h"
#include "torch/project.h"

namespace slk {
namespace {

constexpr const char* kOp = "randomized_range";
constexpr double kNoise = 1e-6;
constexpr double kShift = 1e-14;  // added to a Gram matrix of trace 1
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

struct Factors {
  Tensor Q, R;  // Q R = y, R upper triangular
};

Factors cholesky_qr(const Tensor& y, ScalarType precision) {
  const Tensor wide = precision == y.scalar_type() ? y : converted(y, precision);
  const Tensor ones = torch::stable::fill_(empty_like_shape(wide, {y.size(1)}), 1);
  const Tensor gram = aten("aten::diag_embed", "", ones, int64_t(0), int64_t(0), int64_t(1));
  dense_out(gram, gram, t2(wide), wide, precision == ScalarType::Double ? kShift : 0, 1);
  const Tensor lower = one_of_two(0, "aten::linalg_cholesky_ex", gram, false, false);
  const Tensor upper = t2(converted(lower, y.scalar_type()));
  return {aten("aten::linalg_solve_triangular", "", upper, y, true, false, false), upper};
}

Tensor with_unit_norm(const Tensor& y) {
  const std::vector<int64_t> dims = {0, 1};
  const Tensor squares = torch::stable::sum(
      aten("aten::mul", "Tensor", y, y), std::optional(torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), 2)), true);
  return divided(y, aten("aten::sqrt", "", squares));
}

Tensor orth(const Tensor& y) {
  return cholesky_qr(with_unit_norm(y), ScalarType::Double).Q;
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
  Tensor Y = X;
  if (l < shorter) {
    Y = dense(X, t2(normals(kOp, seed, 1, {0, l}, {0, b}, ScalarType::Float)));
    for (int64_t i = 0; i < iters; ++i) Y = dense(X, orth(dense(t2(X), orth(Y))));
  }
  const Tensor noise = t2(normals(kOp, seed, 1, {l, 2 * l}, {0, a}, ScalarType::Float));
  const double smallest = std::sqrt(double(a)) - std::sqrt(double(l));  // singular value of the noise
  const Factors first =
      cholesky_qr(torch::stable::subtract(with_unit_norm(Y), noise, -kNoise / smallest), ScalarType::Double);
  const Factors second = cholesky_qr(first.Q, ScalarType::Float);
  const Tensor R = dense(second.R, first.R);
  Tensor V = eigenvectors(dense(R, t2(R)));
  return dense(second.Q, torch::stable::narrow(V, 1, 0, rank));
}

Tensor randomized_range(const Tensor& G, int64_t rank, const Tensor& seed, int64_t oversample, int64_t iters,
                        std::string side_name) {
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
  const std::vector<int64_t> dims = {0, 1};
  const Tensor wide = converted(aten("aten::detach", "", G), ScalarType::Float);
  const Tensor largest =
      torch::stable::amax(aten("aten::abs", "", wide), torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), 2), true);
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
