// The decode kernels of family sl, thread by thread, against fp64: ragged sizes and ranks, rows at odd addresses, empty
// and full rows of S, with and without bias.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/sl.h"

using namespace slk;

namespace {

template <class T>
double wide(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return double(float(x));
}

struct Size {
  int64_t tokens, n, m, rank;
  int pad;  // elements between rows of A, B, x and y
  bool bias;
};

template <class T>
constexpr DType kType = std::is_same_v<T, float>    ? DType::f32
                        : std::is_same_v<T, double> ? DType::f64
                        : std::is_same_v<T, __half> ? DType::f16
                                                    : DType::bf16;

template <class T, class Col>
bool check(const Size& z) {
  std::mt19937 random(unsigned(z.n * 131 + z.m * 7 + z.rank));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<int32_t> crow{0};
  std::vector<Col> col;
  for (int64_t i = 0; i < z.n; ++i) {  // row 0 is empty, row 1 full
    for (int64_t j = 0; j < z.m; ++j)
      if (i == 1 || (i > 1 && uniform(random) < 0.1)) col.push_back(Col(j));
    crow.push_back(int32_t(col.size()));
  }
  const auto draw = [&](int64_t count) {
    std::vector<T> x(count);
    for (T& v : x) v = T(normal(random));
    return x;
  };
  const int64_t ldx = z.m + z.pad, lda = z.m + z.pad, ldb = z.rank + z.pad, ldy = z.n + z.pad;
  const std::vector<T> x = draw(z.tokens * ldx), A = draw(z.rank * lda), B = draw(z.n * ldb), bias = draw(z.n),
                       values = draw(int64_t(col.size()));
  simt::Buffer<T> d_x(x), d_a(A), d_b(B), d_bias(bias), d_values(values), d_y(z.tokens * ldy);
  simt::Buffer<std::conditional_t<std::is_same_v<T, double>, double, float>> scratch(z.tokens * z.rank);
  simt::Buffer<int32_t> d_crow(crow);
  simt::Buffer<Col> d_col(col);
  const Csr s = {d_crow.get(), d_col.get(), sizeof(Col) == 2, z.n, z.m, int64_t(col.size())};
  const cuda::SlDecodeArgs args = {{d_x.get(), z.tokens, z.m, ldx},
                                   {d_y.get(), z.tokens, z.n, ldy},
                                   d_a.get(),
                                   d_b.get(),
                                   d_values.get(),
                                   z.bias ? d_bias.get() : nullptr,
                                   z.rank,
                                   lda,
                                   ldb,
                                   0.5,
                                   scratch.get()};
  bool ok = cuda::launch_sl_decode(kType<T>, args, s, nullptr) == cudaSuccess;
  const double rounding = std::is_same_v<T, double>   ? 0x1p-53
                          : std::is_same_v<T, float>  ? 0x1p-24
                          : std::is_same_v<T, __half> ? 0x1p-11
                                                      : 0x1p-8;
  const double sums = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  for (int64_t t = 0; t < z.tokens; ++t)
    for (int64_t i = 0; i < z.n; ++i) {
      double exact = z.bias ? wide(bias[i]) : 0, size = std::fabs(exact);
      for (int64_t q = 0; q < z.rank; ++q) {
        double projected = 0, projected_size = 0;
        for (int64_t j = 0; j < z.m; ++j) {
          const double term = wide(A[q * lda + j]) * wide(x[t * ldx + j]);
          projected += term;
          projected_size += std::fabs(term);
        }
        exact += 0.5 * wide(B[i * ldb + q]) * projected;
        size += 0.5 * std::fabs(wide(B[i * ldb + q])) * projected_size;
      }
      for (int k = crow[i]; k < crow[i + 1]; ++k) {
        exact += wide(values[k]) * wide(x[t * ldx + col[k]]);
        size += std::fabs(wide(values[k]) * wide(x[t * ldx + col[k]]));
      }
      const double bound = 1.01 * rounding * std::fabs(exact) + size * double(z.m + z.rank + 4) * sums;
      ok = ok && std::fabs(wide(d_y[t * ldy + i]) - exact) <= bound;
    }
  if (!ok)
    std::printf("FAIL sl_decode T=%ld n=%ld m=%ld r=%ld type %d\n", long(z.tokens), long(z.n), long(z.m), long(z.rank),
                int(kType<T>));
  return ok;
}

}  // namespace

int main() {
  bool ok = check<__nv_bfloat16, int16_t>({1, 37, 264, 40, 0, true});
  ok &= check<__nv_bfloat16, int16_t>({3, 9, 2100, 5, 8, false});  // more columns than a block reads at once
  ok &= check<__nv_bfloat16, int16_t>({8, 17, 61, 1, 3, true});
  ok &= check<__half, int16_t>({5, 20, 72, 100, 0, true});
  ok &= check<float, int32_t>({2, 33, 45, 8, 1, false});
  ok &= check<double, int16_t>({4, 12, 30, 7, 0, true});
  std::printf(ok ? "sl_decode: ok\n" : "sl_decode: failed\n");
  return ok ? 0 : 1;
}
