// Runs a launcher of family `gemm` under the harness on given sizes, against fp64. Used by gemm_sm80.cpp,
// gemm_sm90.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/gemm.h"

namespace gemm_check {

using slk::cuda::GemmArgs;
using Launcher = cudaError_t (*)(const GemmArgs&, cudaStream_t);

struct Size {
  int64_t m, n, k;
  int64_t pad = 0;  // elements between rows beyond the next multiple of 8; a multiple of 8
};

inline double value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rows of random bf16; what lies between the rows stays poison (NaN), which no result may show.
inline void fill(const simt::Buffer<uint16_t>& out, int64_t rows, int64_t columns, int64_t ld, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float x = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      out[i * ld + j] = uint16_t(bits >> 16);
    }
}

// Number of wrong elements of C, and of elements beyond its columns that were written.
inline int64_t count_errors(const GemmArgs& g, const simt::Buffer<uint16_t>& a, const simt::Buffer<uint16_t>& b,
                            const simt::Buffer<uint16_t>& c) {
  int64_t errors = 0;
  for (int64_t i = 0; i < g.m; ++i) {
    for (int64_t j = 0; j < g.n; ++j) {
      double exact = 0, size = 0;
      for (int64_t k = 0; k < g.k; ++k) {
        const double term = value(a[i * g.lda + k]) * value(b[j * g.ldb + k]);
        exact += term;
        size += std::fabs(term);
      }
      // One rounding to bf16 (half of 2^-7), and k fp32 sums.
      const double bound = std::fabs(exact) * std::ldexp(1, -8) + size * double(g.k + 1) * std::ldexp(1, -23);
      const double error = std::fabs(value(c[i * g.ldc + j]) - exact);
      if (error <= bound) continue;
      if (errors++ < 5)
        std::printf("  C[%ld, %ld] = %g, exactly %g\n", long(i), long(j), value(c[i * g.ldc + j]), exact);
    }
    for (int64_t j = g.n; j < g.ldc; ++j) errors += c[i * g.ldc + j] != 0xffff;
  }
  return errors;
}

inline bool run(const char* name, Launcher launcher, const Size& s) {
  const auto distance = [&](int64_t columns) { return std::max<int64_t>(8, (columns + 7) / 8 * 8) + s.pad; };
  GemmArgs g = {nullptr, nullptr, nullptr, s.m, s.n, s.k, distance(s.k), distance(s.k), distance(s.n)};
  // The last row of A and B ends with its last column: a read behind it is out of bounds.
  const auto elements = [](int64_t rows, int64_t columns, int64_t ld) { return size_t((rows - 1) * ld + columns); };
  simt::Buffer<uint16_t> a(elements(s.m, s.k, g.lda)), b(elements(s.n, s.k, g.ldb)), c(s.m * g.ldc);
  std::mt19937 random(unsigned(s.m * 31 + s.n * 7 + s.k));
  fill(a, s.m, s.k, g.lda, random);
  fill(b, s.n, s.k, g.ldb, random);
  g.a = a.get();
  g.b = b.get();
  g.c = c.get();
  const cudaError_t error = launcher(g, nullptr);
  const int64_t errors = error == cudaSuccess ? count_errors(g, a, b, c) : -1;
  if (errors)
    std::printf("FAIL %s m=%ld n=%ld k=%ld: %ld errors\n", name, long(s.m), long(s.n), long(s.k), long(errors));
  return errors == 0;
}

// What every launcher must refuse before it launches.
inline bool refuses(const char* name, Launcher launcher) {
  alignas(16) static uint16_t memory[64];
  const GemmArgs good = {memory, memory, memory, 1, 8, 8, 8, 8, 8};
  const auto expect = [&](const char* what, cudaError_t error, auto change) {
    GemmArgs g = good;
    change(g);
    const bool ok = launcher(g, nullptr) == error;
    if (!ok) std::printf("FAIL %s: %s\n", name, what);
    return ok;
  };
  bool ok = expect("negative size", cudaErrorInvalidValue, [](GemmArgs& g) { g.m = -1; });
  ok &= expect("short row", cudaErrorInvalidValue, [](GemmArgs& g) { g.lda = 0; });
  ok &= expect("misaligned A", cudaErrorMisalignedAddress, [](GemmArgs& g) { g.a = memory + 4; });
  ok &= expect("misaligned rows of B", cudaErrorMisalignedAddress, [](GemmArgs& g) { g.ldb = 12; });
  ok &= expect("misaligned rows of C", cudaErrorMisalignedAddress, [](GemmArgs& g) { g.ldc = 12; });
  ok &= expect("no rows: nothing to do", cudaSuccess, [](GemmArgs& g) { g.m = 0; });
  return ok;
}

}  // namespace gemm_check
