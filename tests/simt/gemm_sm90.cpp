// gemm_sm90 thread by thread against fp64: ragged sizes, rings that wrap, persistent blocks with several tiles.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/gemm.h"

using namespace slk;

namespace {

int failures = 0;

// Leading dimensions are rounded up to TMA's 8 elements plus `pad`; what lies between is NaN and must not matter.
void check(int64_t m, int64_t n, int64_t k, int64_t pad) {
  const auto ld = [&](int64_t columns) { return (columns + 7) / 8 * 8 + pad; };
  const int64_t lda = ld(k), ldb = ld(k), ldc = ld(n);
  std::mt19937 random(unsigned(m * 7 + n * 3 + k));
  std::normal_distribution<float> normal;
  simt::Buffer<__nv_bfloat16> a(size_t(m * lda)), b(size_t(n * ldb)), c(size_t(m * ldc));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) a[i * lda + p] = __float2bfloat16(normal(random));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t p = 0; p < k; ++p) b[j * ldb + p] = __float2bfloat16(normal(random));

  const cudaError_t error = cuda::launch_gemm_sm90({a.get(), b.get(), c.get(), m, n, k, lda, ldb, ldc}, nullptr);
  int wrong = error != cudaSuccess, touched = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t p = 0; p < k; ++p) {
        const double product = double(__bfloat162float(a[i * lda + p])) * double(__bfloat162float(b[j * ldb + p]));
        sum += product;
        magnitude += std::abs(product);
      }
      // One rounding to bf16, and fp32 sums of k terms.
      const double bound = std::abs(sum) * std::ldexp(1, -8) + magnitude * double(k) * std::ldexp(1, -23);
      if (!(std::abs(double(__bfloat162float(c[i * ldc + j])) - sum) <= bound)) ++wrong;
    }
    for (int64_t j = n; j < ldc; ++j) touched += !std::isnan(__bfloat162float(c[i * ldc + j]));
  }
  if (!wrong && !touched) return;
  ++failures;
  std::printf("FAIL gemm_sm90 m=%ld n=%ld k=%ld: %d of %ld elements wrong, %d written outside\n", long(m), long(n),
              long(k), wrong, long(m * n), touched);
}

void refuses(const char* what, const cuda::GemmArgs& args) {
  if (cuda::launch_gemm_sm90(args, nullptr) != cudaSuccess) return;
  ++failures;
  std::printf("FAIL gemm_sm90 accepts %s\n", what);
}

}  // namespace

int main() {
  check(1, 1, 1, 0);
  check(200, 264, 392, 8);  // 4 tiles on 2 multiprocessors, 7 stages through a ring of 4, every edge ragged
  check(64, 520, 64, 0);    // a whole warpgroup of rows outside
  check(3, 5, 0, 0);
  simt::Buffer<__nv_bfloat16> x(4096);
  refuses("rows that are not multiples of 16 bytes", {x.get(), x.get(), x.get(), 8, 8, 12, 12, 12, 8});
  refuses("a base that is not 16-byte aligned", {x.get() + 1, x.get(), x.get(), 8, 8, 8, 8, 8, 8});
  refuses("a leading dimension below k", {x.get(), x.get(), x.get(), 8, 8, 16, 8, 16, 8});
  std::printf(failures ? "%d failures\n" : "gemm_sm90: ok\n", failures);
  return failures ? 1 : 0;
}
