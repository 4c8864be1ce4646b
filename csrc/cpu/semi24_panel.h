// What the panel kernels of family `semi24` share: tokens run along the lanes, a panel of NV vectors of tokens at a
// time.
//
// A row of the result, yt[row][token], is a sum of rows of a packed block xt[k][token] of kDepth24 features, picked by
// the kept elements' positions. One broadcast of a value feeds NV FMAs whose other operand is loaded from xt: with 8
// vectors the block is 32 KiB on AVX-512, the L1. Half the FMAs of a dense product, at one load each.
// (The other way round, rows of W along the lanes and x broadcast, needs a permutation beside every FMA, and both share
// ports: 1.33 cycles an FMA on Zen 4 before any load, against 1.06 here.)
//
// A chain of FMAs ends with its block and is then added to yt: shorter chains round less, and the order of additions
// does not depend on how rows and tokens are cut into tiles.
#pragma once

#include "cpu/activation24.h"
#include "cpu/panel.h"
#include "cpu/types.h"
#include "slkernels/semi24_linear.h"

namespace slk::cpu::SLK_ISA {

constexpr int kMaxVectors = 8;
static_assert(kMaxVectors * kLanes <= kPanelTokens24);

// f(NV) with the least panel that holds the tokens.
template <class F>
SLK_INLINE void with_panel(int64_t tokens, F f) {
  switch (ceil_div(tokens, kLanes)) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

// f(NV, panel) for the panels of a tile of tokens.
template <class F>
SLK_INLINE void for_panels(Range tokens, F f) {
  for (int64_t t = tokens.begin; t < tokens.end; t += kMaxVectors * kLanes) {
    const Range panel = {t, t + kMaxVectors * kLanes < tokens.end ? t + kMaxVectors * kLanes : tokens.end};
    with_panel(panel.size(), [&](auto vectors) { f(vectors, panel); });
  }
}

// Prefetches columns of activations for the tokens of a panel, a share of it with every row of W: what is packed or
// stored next is as many separate runs of lines as there are tokens, which no hardware prefetcher follows.
class PrefetchRows {
 public:
  PrefetchRows(const Matrix& x, int64_t element, Range tokens, Range columns, Range rows)
      : line_(static_cast<const char*>(x.data) + tokens.begin * x.ld * element + columns.begin * element),
        stride_(x.ld * element),
        lines_(ceil_div((columns.end < x.cols ? columns.end : x.cols) - columns.begin, 64 / element)),
        left_(tokens.size() * lines_),
        share_(ceil_div(left_, rows.size())) {}

  SLK_INLINE void advance(int rows) {
    for (int64_t i = share_ * rows; i > 0 && left_ > 0; --i, --left_) {
      __builtin_prefetch(line_ + at_ * 64, 0, 2);
      if (++at_ == lines_) at_ = 0, line_ += stride_;
    }
  }

 private:
  const char* line_;
  int64_t stride_, lines_, left_, share_, at_ = 0;
};

// Columns [k, k + depth) of x for the tokens of a panel; features up to the next multiple of 4 are zero.
template <int NV, class T>
SLK_INLINE void pack_block(const Matrix& x, Range tokens, int64_t k, int64_t depth, float* xt) {
  constexpr int kPanel = NV * kLanes;
  const Matrix block = {static_cast<T*>(x.data) + k, tokens.end, depth, x.ld};
  pack_panel_t<T>(block, tokens.begin, kPanel, {0, depth}, xt);
  for (int64_t i = depth * kPanel; i < round_up(depth, 4) * kPanel; i += kLanes) store(xt + i, zero());
}

// yt[row][token] of `rows` -> y, transposed.
template <int NV, class T>
void store_panel(const float* yt, const T* bias, Activation24 f, Range rows, Range tokens, const Matrix& y) {
  constexpr int kPanel = NV * kLanes;
  for (int64_t i = rows.begin; i < rows.end; i += kLanes) {
    const int height = int(rows.end - i < kLanes ? rows.end - i : kLanes);
    const V offset = bias ? load_n(bias + i, height) : zero();
    for (int64_t t = tokens.begin; t < tokens.end; t += kLanes) {
      const float* in = yt + (i - rows.begin) * kPanel + (t - tokens.begin);
      T* out = static_cast<T*>(y.data) + t * y.ld + i;
      const int depth = int(tokens.end - t < kLanes ? tokens.end - t : kLanes);
      V tile[kLanes];
      for (int r = 0; r < kLanes; ++r) tile[r] = r < height ? load(in + r * kPanel) : zero();
      transpose(tile);
      if (height == kLanes && depth == kLanes) {
        for (int u = 0; u < kLanes; ++u) store(out + u * y.ld, activate(f, tile[u] + offset));
      } else {
        for (int u = 0; u < depth; ++u) store_n(out + u * y.ld, activate(f, tile[u] + offset), height);
      }
    }
  }
}

}  // namespace slk::cpu::SLK_ISA
