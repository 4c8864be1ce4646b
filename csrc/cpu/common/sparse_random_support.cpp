// random_support on the CPU: sample, bucket by row (a counting sort), sort within rows. Contracts: slkernels/sparse.h.
#include <algorithm>
#include <vector>

#include "slkernels/sparse.h"

namespace slk::cpu {
namespace {

constexpr int64_t kBlock = 8;

// Sorts distinct columns by marking them in a bitmap of m bits and reading it back; std::sort where the row is so
// sparse that scanning the bitmap would cost more than the row.
template <class Col>
void sort_columns(Col* first, Col* last, int64_t m, std::vector<uint64_t>& bitmap) {
  if ((last - first) < m / 64) {
    std::sort(first, last);
    return;
  }
  for (const Col* p = first; p < last; ++p) bitmap[*p / 64] |= uint64_t(1) << (*p % 64);
  for (size_t w = 0; w < bitmap.size(); ++w) {
    for (uint64_t bits = bitmap[w]; bits; bits &= bits - 1) *first++ = Col(w * 64 + __builtin_ctzll(bits));
    bitmap[w] = 0;
  }
}

}  // namespace

void sample_support(const SupportSampler& sampler, Range samples, int64_t* scratch) {
  for (int64_t i = samples.begin; i < samples.end; ++i) {
    const Position p = sampler(i);
    scratch[i] = p.row << 32 | p.col;
  }
}

template <class Col>
void bucket_support(const SupportSampler& sampler, const int64_t* scratch, int32_t* crow, Col* col) {
  std::fill(crow, crow + sampler.n + 1, 0);
  for (int64_t i = 0; i < sampler.count; ++i) ++crow[(scratch[i] >> 32) + 1];
  for (int64_t r = 0; r < sampler.n; ++r) crow[r + 1] += crow[r];
  // crow[r] runs through row r's slots and ends at the start of row r + 1: shift it back afterwards.
  for (int64_t i = 0; i < sampler.count; ++i) col[crow[scratch[i] >> 32]++] = Col(scratch[i] & 0xffffffff);
  for (int64_t r = sampler.n; r > 0; --r) crow[r] = crow[r - 1];
  crow[0] = 0;
}

template <class Col>
void sort_support(const SupportSampler& sampler, const int32_t* crow, Col* col, Range rows) {
  std::vector<uint64_t> bitmap(ceil_div(sampler.m, 64));
  for (int64_t r = rows.begin; r < rows.end; ++r) sort_columns(col + crow[r], col + crow[r + 1], sampler.m, bitmap);
}

template <class BlockCol, class Col>
void expand_blocks(const int32_t* block_crow, const BlockCol* block_col, int64_t n, int64_t m, int32_t* crow,
                   Col* col) {
  crow[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t k = crow[i];
    for (int32_t b = block_crow[i / kBlock]; b < block_crow[i / kBlock + 1]; ++b) {
      const int64_t begin = int64_t(block_col[b]) * kBlock, end = std::min(begin + kBlock, m);
      for (int64_t j = begin; j < end; ++j) col[k++] = Col(j);
    }
    crow[i + 1] = k;
  }
}

template void bucket_support(const SupportSampler&, const int64_t*, int32_t*, int16_t*);
template void bucket_support(const SupportSampler&, const int64_t*, int32_t*, int32_t*);
template void sort_support(const SupportSampler&, const int32_t*, int16_t*, Range);
template void sort_support(const SupportSampler&, const int32_t*, int32_t*, Range);
template void expand_blocks(const int32_t*, const int16_t*, int64_t, int64_t, int32_t*, int16_t*);
template void expand_blocks(const int32_t*, const int16_t*, int64_t, int64_t, int32_t*, int32_t*);
template void expand_blocks(const int32_t*, const int32_t*, int64_t, int64_t, int32_t*, int32_t*);

}  // namespace slk::cpu
