// Plain types that every layer shares. No torch, no CUDA.
#pragma once

#include <cstdint>

// Marks what both devices compile.
#if defined(__CUDACC__)
#define SLK_HD __host__ __device__
#else
#define SLK_HD
#endif

// Encloses inline functions of headers that csrc/cpu includes: its files are compiled once per instruction set, and the
// linker must not take one set's copy for another's.
#if defined(SLK_ISA)
#define SLK_PER_ISA inline namespace SLK_ISA
#else
#define SLK_PER_ISA inline namespace baseline
#endif

namespace slk {

enum class DType : int { f32, bf16, f16, f64 };

// Sparse matrix S [n, m] in compressed-sparse-row form. Columns of a row are sorted and unique.
// `col` holds int16 when col_is_16 (m <= 32768), else int32.
struct Csr {
  const int32_t* crow;  // [n + 1]
  const void* col;      // [nnz]
  bool col_is_16;
  int64_t n, m, nnz;
};

// Half-open range of work.
struct Range {
  int64_t begin, end;
  SLK_HD constexpr int64_t size() const { return end - begin; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace slk
