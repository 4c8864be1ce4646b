// Family `project`'s CUDA kernels for updates, sums of squares, APOLLO's scalars and normals, thread by thread: the
// bits of the same arithmetic on the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <vector>

#include "project_check.h"
#include "simt/runtime.h"
#include "slkernels/random_normal.cuh"

using namespace slk;
using namespace project_check;

namespace {

struct UpdateCase {
  int64_t n, m;
  bool product, gradient, stochastic;
  FactorOf factor_of;
};

template <class T, class TT>
void check_update(const UpdateCase& c) {
  const int64_t ld = c.m + 3, first = c.n / 3;  // rows before `first` belong to another slice
  const std::vector<T> w = draw<T>(c.n * c.m, 1), g = draw<T>(c.n * ld, 2);
  const std::vector<TT> t = draw<TT>((c.n - first) * c.m, 3);
  const std::vector<float> factor = draw<float>(c.n + c.m, 4);
  const float lr = 0.37f, alpha = 0.25f, decay = 0.5f;
  const std::vector<int64_t> rng = {77, (int64_t(1) << 32) + 5};
  const simt::Buffer<T> device_g(g);
  const simt::Buffer<TT> device_t(t);
  const simt::Buffer<float> device_factor(factor), device_lr(std::vector<float>{lr}), no(std::vector<float>{0.0f}),
      yes(std::vector<float>{1.0f});
  const simt::Buffer<int64_t> device_rng(rng);
  simt::Buffer<T> device_w(w);
  const UpdateOperands operands = {c.product ? device_t.get() : nullptr,
                                   type_of(TT()),
                                   c.m,
                                   first,
                                   c.gradient ? device_g.get() : nullptr,
                                   type_of(T()),
                                   ld,
                                   device_factor.get(),
                                   c.factor_of};
  cuda::DeviceUpdate update = {device_lr.get(), yes.get(), alpha, decay, {c.stochastic ? device_rng.get() : nullptr}};
  expect(cuda::launch_update(type_of(T()), device_w.get(), c.m, {first, c.n}, operands, update, nullptr) == cudaSuccess,
         "launch");
  expect(same(device_w.host(), w), "found_inf leaves W");
  update.found_inf = no.get();
  cuda::launch_update(type_of(T()), device_w.get(), c.m, {first, c.n}, operands, update, nullptr);

  const UpdateScalars scalars = UpdateScalars::of(lr, alpha, decay);
  const RoundingBits bits = {uint64_t(rng[0]), uint32_t(rng[1])};
  std::vector<T> want = w;
  for (int64_t i = first; i < c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) {
      float x = number(w[i * c.m + j]) * scalars.decay;
      if (c.product) x = std::fma(scalars.step, number(t[(i - first) * c.m + j]), x);
      const float f = factor[c.factor_of == FactorOf::column ? j : c.factor_of == FactorOf::row ? i : 0];
      if (c.gradient) x = std::fma(scalars.step * f, number(g[i * ld + j]), x);
      want[i * c.m + j] = rounded(x, c.stochastic, bits(0, i * c.m + j), T());
    }
  expect(same(device_w.host(), want), "update");
}

template <class T>
void check_updates() {
  for (const bool stochastic : {false, true}) {
    check_update<T, T>({7, 40, true, false, stochastic, FactorOf::all});
    check_update<T, T>({5, 67, true, true, stochastic, FactorOf::row});
    check_update<T, float>({5, 67, true, true, stochastic, FactorOf::column});
    check_update<T, T>({9, 1, false, true, stochastic, FactorOf::all});
    check_update<T, float>({300, 9, true, false, stochastic, FactorOf::all});
  }
}

template <class T>
void check_squares(int64_t n, int64_t m) {
  const int64_t ld = m + 5;
  const std::vector<T> x = draw<T>(n * ld, 8);
  const simt::Buffer<T> device(x);
  simt::Buffer<float> rows(n), columns(m), partial(ceil_div(n, cuda::kSquareRows) * m), folded(n * ld);
  cuda::launch_row_squares(type_of(T()), device.get(), ld, n, m, rows.get(), nullptr);
  cuda::launch_column_squares(type_of(T()), device.get(), ld, n, m, partial.get(), columns.get(), nullptr);
  std::vector<double> want_rows(n), want_columns(m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const double v = number(x[i * ld + j]);
      want_rows[i] += v * v;
      want_columns[j] += v * v;
    }
  const std::vector<float> got_rows = rows.host(), got_columns = columns.host();
  for (int64_t i = 0; i < n; ++i) expect(std::fabs(got_rows[i] - want_rows[i]) <= 1e-5 * want_rows[i], "row squares");
  for (int64_t j = 0; j < m; ++j)
    expect(std::fabs(got_columns[j] - want_columns[j]) <= 1e-5 * want_columns[j], "column squares");

  const simt::Buffer<float> lr(std::vector<float>{0.1f});
  simt::Buffer<T> out(x.size());
  cuda::launch_fold(type_of(T()), device.get(), n * ld, {lr.get(), nullptr, 2.0f, 0.0f, {nullptr}}, out.get(), nullptr);
  std::vector<T> want = x;
  for (T& v : want) v = rounded(number(v) * UpdateScalars::of(0.1f, 2.0f, 0.0f).step, false, 0, T());
  expect(same(out.host(), want), "fold");
}

void check_factors(int64_t channels, bool per_tensor, bool residual, float limiter, float before) {
  std::vector<float> n2 = draw<float>(channels, 5), r2 = draw<float>(channels, 6), g2 = draw<float>(channels, 7);
  for (auto* v : {&n2, &r2, &g2})
    for (float& x : *v) x = x * x;
  const simt::Buffer<float> dn(n2), dr(r2), dg(g2), no(std::vector<float>{0.0f});
  simt::Buffer<float> norm(std::vector<float>{before}), factor(per_tensor ? 1 : channels);
  cuda::launch_apollo_factors({dn.get(), dr.get(), dg.get(), channels, per_tensor, residual, limiter}, no.get(),
                              norm.get(), factor.get(), nullptr);
  float want_norm = before;
  std::vector<float> want(per_tensor ? 1 : channels);
  apollo_factors({n2.data(), r2.data(), g2.data(), channels, per_tensor, residual, limiter}, &want_norm, want.data());
  const auto near = [](float a, float b) { return std::fabs(a - b) <= 1e-6f * std::fabs(b); };
  expect(near(norm.host()[0], want_norm), "norm");
  for (size_t i = 0; i < want.size(); ++i) expect(near(factor.host()[i], want[i]), "factor");
}

template <class T>
void check_normals(int64_t rows, int64_t columns, int64_t first_row, int64_t first_column) {
  const simt::Buffer<int64_t> seed(std::vector<int64_t>{-12345});
  simt::Buffer<T> out(rows * columns);
  cuda::launch_normals(type_of(T()), seed.get(), 0.3f, {first_row, first_row + rows},
                       {first_column, first_column + columns}, out.get(), nullptr);
  const std::vector<T> got = out.host();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float z[4];
      const int64_t column = first_column + j;
      normals_of<ScalarWords>(uint32_t(column / kNormalBlock * kNormalRun + column % kNormalRun),
                              uint32_t(first_row + i), uint64_t(-12345), 0.3f, z);
      expect(same_bits(got[i * columns + j], rounded(z[column / kNormalRun % 4], false, 0, T())), "normals");
    }
}

}  // namespace

int main() {
  check_updates<float>();
  check_updates<__nv_bfloat16>();
  check_updates<__half>();
  check_squares<float>(40, 19);
  check_squares<__nv_bfloat16>(300, 260);
  check_squares<__half>(3, 517);
  check_factors(5, false, false, 1.01f, 0.0f);
  check_factors(1000, false, true, 1.01f, 0.5f);
  check_factors(700, true, false, 1.01f, 0.5f);
  check_factors(700, true, true, 0.0f, 3.0f);
  check_normals<float>(3, 130, 0, 0);
  check_normals<__nv_bfloat16>(2, 64, 7, 128);
  check_normals<__half>(5, 17, 1, 64);
  return finish("project");
}
