// The tensor-core kernels of family block8, thread by thread, against fp64: both types and index types, edges that cut
// blocks, empty and full block rows, S and S^T, slices of features, parts of block rows, rows at odd addresses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/block8.h"

using namespace slk;

namespace {

constexpr int64_t kSide = 8, kBlock = 64;

struct Size {
  int64_t tokens, n, m;
  double density;
  int64_t shared_bytes;  // that the plan may use
  int multiprocessors;
  int pad;  // elements between rows of x and y
};

template <class T>
struct Problem {
  Size z;
  int64_t rows, columns;
  std::vector<int32_t> crow{0}, order;
  std::vector<int32_t> col;
  std::vector<T> values;

  Problem(const Size& size, std::mt19937& random)
      : z(size), rows(ceil_div(size.n, kSide)), columns(ceil_div(size.m, kSide)) {
    std::uniform_real_distribution<double> uniform;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {  // row 0 is empty, row 1 full
      for (int64_t j = 0; j < columns; ++j)
        if (i == 1 || (i > 1 && uniform(random) < z.density)) col.push_back(int32_t(j));
      crow.push_back(int32_t(col.size()));
    }
    for (size_t e = 0; e < col.size() * kBlock; ++e) values.push_back(T(normal(random)));
  }

  std::vector<double> dense() const {
    std::vector<double> s(z.n * z.m);
    for (int64_t row = 0; row < rows; ++row)
      for (int k = crow[row]; k < crow[row + 1]; ++k)
        for (int64_t e = 0; e < kBlock; ++e) {
          const int64_t i = row * kSide + e / kSide, j = col[k] * kSide + e % kSide;
          if (i < z.n && j < z.m) s[i * z.m + j] = double(float(values[k * kBlock + e]));
        }
    return s;
  }

  // The list of S^T.
  Problem transposed() const {
    Problem t = *this;
    std::swap(t.rows, t.columns);
    t.crow.assign(1, 0);
    t.col.clear();
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i)
        for (int k = crow[i]; k < crow[i + 1]; ++k)
          if (col[k] == j) {
            t.col.push_back(int32_t(i));
            t.order.push_back(k);
          }
      t.crow.push_back(int32_t(t.col.size()));
    }
    return t;
  }
};

template <class T>
constexpr DType kType = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
template <class T>
constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;

bool within(double got, double exact, double size, int64_t terms, double rounding, const char* what) {
  const double bound = 1.01 * rounding * std::fabs(exact) + size * double(terms + 2) * 0x1p-24 + 0x1p-24;
  if (std::fabs(got - exact) <= bound) return true;
  std::printf("%s: got %g, want %g, allowed %g\n", what, got, exact, bound);
  return false;
}

// y = x S^T by the list of `p`, whose blocks are transposed if it has an order; s: S, dense, [n, m].
template <class T, class Col>
bool check_spmm(const Problem<T>& p, const std::vector<double>& s, int64_t n, int64_t m, std::mt19937& random) {
  const Size& z = p.z;
  std::normal_distribution<float> normal;
  const int64_t ldx = m + z.pad, ldy = n + z.pad;
  std::vector<T> x(z.tokens * ldx);
  for (T& v : x) v = T(normal(random));
  simt::Buffer<T> d_x(x), d_values(p.values), d_y(std::vector<T>(z.tokens * ldy, T(99.f)));
  simt::Buffer<int32_t> d_crow(p.crow);
  simt::Buffer<Col> d_col(std::vector<Col>(p.col.begin(), p.col.end()));
  simt::Buffer<int32_t> d_order(p.order.empty() ? std::vector<int32_t>{0} : p.order);
  const bool transposed = !p.order.empty();
  const Blocks blocks = {{d_crow.get(), d_col.get(), sizeof(Col) == 2, p.rows, p.columns, int64_t(p.col.size())},
                         transposed ? d_order.get() : nullptr};
  const cuda::Block8Plan plan = cuda::plan_block8(z.tokens, blocks.grid, z.shared_bytes, z.multiprocessors);
  simt::Buffer<float> partial(plan.partial(z.tokens, p.rows) + 1);
  bool ok = cuda::launch_block8_spmm(kType<T>, plan, blocks, d_values.get(), {d_x.get(), z.tokens, m, ldx},
                                     {d_y.get(), z.tokens, n, ldy}, partial.get(), nullptr) == cudaSuccess;
  for (int64_t t = 0; t < z.tokens && ok; ++t)
    for (int64_t i = 0; i < ldy && ok; ++i) {
      const double got = double(float(d_y[t * ldy + i]));
      if (i >= n) {
        ok = got == double(float(T(99.f)));  // between the rows of y
        continue;
      }
      double exact = 0, size = 0;
      for (int64_t j = 0; j < m; ++j) {
        const double term = double(float(x[t * ldx + j])) * s[i * m + j];
        exact += term;
        size += std::fabs(term);
      }
      ok = within(got, exact, size, m, kRounding<T>, transposed ? "spmm_t" : "spmm");
    }
  return ok;
}

template <class T, class Col>
bool check_sddmm(const Problem<T>& p, std::mt19937& random) {
  const Size& z = p.z;
  std::normal_distribution<float> normal;
  const int64_t padded = cuda::padded_tokens(z.tokens);
  const auto features = [&](int64_t count) {  // zeros behind the last token
    std::vector<T> x(count * padded);
    for (int64_t e = 0; e < count * padded; ++e) x[e] = T(e % padded < z.tokens ? normal(random) : 0.f);
    return x;
  };
  const std::vector<T> dyt = features(z.n), xt = features(z.m);
  simt::Buffer<T> d_dyt(dyt), d_xt(xt), d_out(int64_t(p.values.size()));
  simt::Buffer<int32_t> d_crow(p.crow);
  simt::Buffer<Col> d_col(std::vector<Col>(p.col.begin(), p.col.end()));
  const Csr grid = {d_crow.get(), d_col.get(), sizeof(Col) == 2, p.rows, p.columns, int64_t(p.col.size())};
  bool ok = cuda::launch_block8_sddmm(kType<T>, grid, z.n, z.m, d_dyt.get(), d_xt.get(), z.tokens, d_out.get(),
                                      nullptr) == cudaSuccess;
  for (int64_t row = 0; row < p.rows && ok; ++row)
    for (int k = p.crow[row]; k < p.crow[row + 1] && ok; ++k)
      for (int64_t e = 0; e < kBlock && ok; ++e) {
        const int64_t i = row * kSide + e / kSide, j = p.col[k] * kSide + e % kSide;
        double exact = 0, size = 0;
        for (int64_t t = 0; t < z.tokens && i < z.n && j < z.m; ++t) {
          const double term = double(float(dyt[i * padded + t])) * double(float(xt[j * padded + t]));
          exact += term;
          size += std::fabs(term);
        }
        ok = within(double(float(d_out[k * kBlock + e])), exact, size, z.tokens, kRounding<T>, "sddmm");
      }
  return ok;
}

template <class T, class Col>
bool check(const Size& z) {
  std::mt19937 random(unsigned(z.n * 131 + z.m * 7 + z.tokens));
  const Problem<T> p(z, random);
  const std::vector<double> s = p.dense();
  std::vector<double> st(s.size());
  for (int64_t i = 0; i < z.n; ++i)
    for (int64_t j = 0; j < z.m; ++j) st[j * z.n + i] = s[i * z.m + j];
  const bool ok = check_spmm<T, Col>(p, s, z.n, z.m, random) &&
                  check_spmm<T, Col>(p.transposed(), st, z.m, z.n, random) && check_sddmm<T, Col>(p, random);
  if (!ok) std::printf("FAIL block8 T=%ld n=%ld m=%ld type %d\n", long(z.tokens), long(z.n), long(z.m), int(kType<T>));
  return ok;
}

// What the plan promises, whatever the sizes.
bool check_plan() {
  bool ok = true;
  for (const int64_t columns : {0, 1, 128, 512, 683, 1376, 5000})
    for (const int64_t tokens : {1, 16, 17, 64, 16384})
      for (const int64_t bytes : {99 << 10, 163 << 10, 227 << 10}) {
        const cuda::Block8Plan plan = cuda::plan_block8(tokens, {nullptr, nullptr, true, 100, columns, 0}, bytes, 132);
        ok &= plan.tokens * (plan.slice + 8) * 2 <= bytes && plan.slice % 64 == 0 && plan.slice > 0;
        ok &= plan.slice * plan.slices >= columns * kSide && plan.parts >= 1 && plan.parts <= 7;
        ok &= plan.tokens == 16 || plan.slices == 1;
      }
  if (!ok) std::printf("FAIL plan_block8\n");
  return ok;
}

}  // namespace

int main() {
  constexpr int64_t kH100 = 227 << 10, kOneSlice = 16 * (64 + 8) * 2;  // bytes
  bool ok = check_plan();
  ok &= check<__nv_bfloat16, int16_t>({5, 24, 40, 0.5, kH100, 1, 0});
  ok &= check<__half, int32_t>({20, 29, 43, 0.5, kH100, 1, 3});            // cut edges, rows at odd addresses
  ok &= check<__nv_bfloat16, int32_t>({70, 131, 72, 0.3, kH100, 132, 8});  // tiles of 64 tokens, parts of block rows
  ok &= check<__half, int16_t>({17, 61, 201, 0.4, kOneSlice, 1, 0});       // slices of 64 features
  ok &= check<__nv_bfloat16, int16_t>({1, 8, 600, 1, kH100, 1, 0});        // more than 32 blocks in a row
  ok &= check<__nv_bfloat16, int16_t>({300, 17, 16, 1, kH100, 1, 0});      // more tokens than a pass of sddmm
  std::printf(ok ? "block8: ok\n" : "block8: failed\n");
  return ok ? 0 : 1;
}
