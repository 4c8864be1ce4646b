// Work on a CSR support that has no SIMD in it: validation and transposition. Contracts: slkernels/sparse.h.
#include "slkernels/sparse.h"

namespace slk::cpu {
namespace {

template <class Col>
SupportFault check_columns(const Csr& s, const Col* col) {
  for (int64_t i = 0; i < s.n; ++i) {
    const int64_t begin = s.crow[i], end = s.crow[i + 1];
    // Branch-free first: sorted, unique and in range <=> every step grows and both ends are inside.
    if (begin == end) continue;
    int ok = col[begin] >= 0 && int64_t(col[end - 1]) < s.m;
    for (int64_t k = begin + 1; k < end; ++k) ok &= col[k - 1] < col[k];
    if (ok) continue;
    for (int64_t k = begin; k < end; ++k) {
      if (col[k] < 0 || int64_t(col[k]) >= s.m) return {SupportFault::col_range, i, k, int64_t(col[k])};
      if (k > begin && col[k] < col[k - 1]) return {SupportFault::col_unsorted, i, k, int64_t(col[k])};
      if (k > begin && col[k] == col[k - 1]) return {SupportFault::col_duplicate, i, k, int64_t(col[k])};
    }
  }
  return {};
}

template <class Col, class Row, class Value>
void transpose_into(const Csr& s, const Col* col, const Value* values, int32_t* crow_t, Row* row_t, Value* values_t) {
  for (int64_t j = 0; j <= s.m; ++j) crow_t[j] = 0;
  for (int64_t k = 0; k < s.nnz; ++k) ++crow_t[col[k] + 1];
  for (int64_t j = 0; j < s.m; ++j) crow_t[j + 1] += crow_t[j];
  // crow_t[j] is the next free slot of column j while filling, and the start of column j + 1 afterwards.
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t k = s.crow[i]; k < s.crow[i + 1]; ++k) {
      const int32_t slot = crow_t[col[k]]++;
      row_t[slot] = Row(i);
      values_t[slot] = values[k];
    }
  for (int64_t j = s.m; j > 0; --j) crow_t[j] = crow_t[j - 1];
  crow_t[0] = 0;
}

}  // namespace

SupportFault check_support(const Csr& s) {
  if (s.crow[0] != 0) return {SupportFault::crow_start, 0, 0, s.crow[0]};
  for (int64_t i = 0; i < s.n; ++i)
    if (s.crow[i + 1] < s.crow[i]) return {SupportFault::crow_decreasing, i, i + 1, s.crow[i + 1]};
  if (s.crow[s.n] != s.nnz) return {SupportFault::crow_end, s.n, s.n, s.crow[s.n]};
  return s.col_is_16 ? check_columns(s, static_cast<const int16_t*>(s.col))
                     : check_columns(s, static_cast<const int32_t*>(s.col));
}

template <class Value>
void transpose_csr(const Csr& s, const Value* values, int32_t* crow_t, void* row_t, Value* values_t) {
  const auto with_rows = [&](auto* col) {
    if (s.n <= 32768)
      transpose_into(s, col, values, crow_t, static_cast<int16_t*>(row_t), values_t);
    else
      transpose_into(s, col, values, crow_t, static_cast<int32_t*>(row_t), values_t);
  };
  if (s.col_is_16)
    with_rows(static_cast<const int16_t*>(s.col));
  else
    with_rows(static_cast<const int32_t*>(s.col));
}

template void transpose_csr(const Csr&, const float*, int32_t*, void*, float*);
template void transpose_csr(const Csr&, const double*, int32_t*, void*, double*);

}  // namespace slk::cpu
