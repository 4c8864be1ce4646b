// Skinny products for decode: every row of W is read once, for up to eight tokens at a time. Contract:
// slkernels/lowrank.h.
//
// A tile is kRows rows of W by NT tokens, one vector accumulator each: kRows + NT loads feed kRows * NT FMAs, so that
// the bound is reading W from memory, not the load ports.
#include "slkernels/lowrank.h"

#include "cpu/simd.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

template <int NR, int NT, class T>
SLK_INLINE void skinny_tile(const float* x, int64_t k, const T* w, int64_t ldw, float (&out)[NR][NT]) {
  V acc[NR][NT];
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) acc[r][t] = zero();
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) {
    V xv[NT];
    for (int t = 0; t < NT; ++t) xv[t] = load(x + t * k + j);
    for (int r = 0; r < NR; ++r) {
      const V wv = load(w + r * ldw + j);
      for (int t = 0; t < NT; ++t) acc[r][t] += wv * xv[t];
    }
  }
  if (j < k) {
    const int rest = int(k - j);
    for (int r = 0; r < NR; ++r) {
      const V wv = load_n(w + r * ldw + j, rest);
      for (int t = 0; t < NT; ++t) acc[r][t] += wv * load_n(x + t * k + j, rest);
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) out[r][t] = sum(acc[r][t]);
}

template <int NR, int NT, class T>
void skinny_rows(const float* x, const T* w, int64_t ldw, int64_t k, int64_t n, int64_t row, float alpha, const T* bias,
                 bool accumulate, float* y) {
  float out[NR][NT];
  skinny_tile<NR, NT>(x, k, w + row * ldw, ldw, out);
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) {
      float& to = y[t * n + row + r];
      to = alpha * out[r][t] + (accumulate ? to : bias ? to_float(bias[row + r]) : 0.f);
    }
}

template <int NT, class T>
void skinny_tokens(const float* x, const T* w, int64_t ldw, int64_t k, int64_t n, Range rows, float alpha,
                   const T* bias, bool accumulate, float* y) {
  constexpr int kRows = NT >= 8 ? 2 : 4;  // 16 accumulators at most
  int64_t i = rows.begin;
  for (; i + kRows <= rows.end; i += kRows) skinny_rows<kRows, NT>(x, w, ldw, k, n, i, alpha, bias, accumulate, y);
  for (; i < rows.end; ++i) skinny_rows<1, NT>(x, w, ldw, k, n, i, alpha, bias, accumulate, y);
}

void skinny(DType dtype, const float* x, int64_t tokens, const void* w, int64_t ldw, int64_t k, int64_t n, Range rows,
            float alpha, const void* bias, bool accumulate, float* y) {
  constexpr int64_t kRowBlock = 64;  // rows of W that stay in L2 while the next group of tokens uses them
  with_float_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* weights = static_cast<const T*>(w);
    const T* offset = static_cast<const T*>(bias);
    for (int64_t first = rows.begin; first < rows.end; first += kRowBlock) {
      const Range block = {first, first + kRowBlock < rows.end ? first + kRowBlock : rows.end};
      for (int64_t t = 0; t < tokens;) {
        const auto run = [&](auto width) {
          skinny_tokens<width>(x + t * k, weights, ldw, k, n, block, alpha, offset, accumulate, y + t * n);
          t += width;
        };
        if (tokens - t >= 8)
          run(std::integral_constant<int, 8>());
        else if (tokens - t >= 4)
          run(std::integral_constant<int, 4>());
        else if (tokens - t >= 2)
          run(std::integral_constant<int, 2>());
        else
          run(std::integral_constant<int, 1>());
      }
    }
  });
}

}  // namespace

extern const LowRankKernels lowrank_table;
const LowRankKernels lowrank_table = {skinny};

}  // namespace slk::cpu::SLK_ISA
