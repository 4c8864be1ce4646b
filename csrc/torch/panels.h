// How CPU products with a sparse matrix walk over tokens: in panels, packed feature-major (slkernels/sparse.h), which
// the threads share out together with parts of the matrix's rows.
#pragma once

#include <algorithm>

#include "slkernels/sparse.h"
#include "torch/support.h"

namespace slk {

// A packed panel of x is panel * m * 4 bytes and is read at random: keep it within three quarters of a 1 MiB L2.
constexpr int64_t kPanelBytes = 768 << 10;
// Packed tokens that an sddmm keeps between its two phases: small enough for a shared L3.
constexpr int64_t kChunkBytes = 8 << 20;

inline int panel_width(int64_t tokens, int64_t features) {
  int panel = tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
  while (panel > 16 && panel * features * 4 > kPanelBytes) panel /= 2;
  return panel;
}

// x's tokens from t0 on, packed; `features` may exceed x's, by zeros.
inline void pack(DType dtype, const Matrix& x, int64_t t0, int panel, int64_t features, float* xt) {
  cpu::sparse_kernels().pack_panel(dtype, x, t0, panel, {0, x.cols}, xt);
  std::fill(xt + x.cols * panel, xt + features * panel, 0.f);
}

// f(packed panel, its first token, part) for every panel of x and every part of the sparse matrix.
template <class F>
void for_panels(DType dtype, const Tensor& x, int panel, int64_t features, int64_t parts, F f) {
  const Matrix xm = as_matrix(x);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = ceil_div(xm.rows, panel), panel_floats = panel * features;
  if (panels >= 4 * threads) {  // enough panels for every thread: pack and use each in one thread's L2
    parallel_for(panels, 1, [&](int64_t b, int64_t e) {
      float* xt = thread_scratch(panel_floats);
      for (int64_t p = b; p < e; ++p) {
        pack(dtype, xm, p * panel, panel, features, xt);
        for (int64_t part = 0; part < parts; ++part) f(xt, p * panel, part);
      }
    });
    return;
  }
  // Few tokens: pack once, then share out the parts.
  const Tensor packed = empty_like_shape(x, {panels * panel_floats}, ScalarType::Float);
  float* xt = packed.mutable_data_ptr<float>();
  parallel_for(panels, 1, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) pack(dtype, xm, p * panel, panel, features, xt + p * panel_floats);
  });
  parallel_for(panels * parts, 1, [&](int64_t b, int64_t e) {
    for (int64_t item = b; item < e; ++item) f(xt + item / parts * panel_floats, item / parts * panel, item % parts);
  });
}

// out = the sum over panels of what f(packed dy, packed x, panel, part, fp32 sums as long as out) adds for its part.
template <class F>
void sum_over_panels(DType dtype, const Tensor& dy, const Tensor& x, int64_t n, int64_t m, const Tensor& out,
                     int64_t parts, F f) {
  const Matrix xm = as_matrix(x), dym = as_matrix(dy);
  const int64_t tokens = xm.rows, count = out.numel();
  const Tensor acc = dtype == DType::f32 ? out : empty_like_shape(x, {count}, ScalarType::Float);
  float* dv = acc.mutable_data_ptr<float>();
  std::fill(dv, dv + count, 0.f);

  const int panel = panel_width(tokens, m);
  const int64_t panels = ceil_div(tokens, panel);
  const int64_t chunk = std::max<int64_t>(1, std::min(panels, kChunkBytes / (panel * (m + n) * 4)));
  const Tensor packed = empty_like_shape(x, {chunk * panel * (m + n)}, ScalarType::Float);
  float* xt = packed.mutable_data_ptr<float>();
  float* dyt = xt + chunk * panel * m;
  for (int64_t first = 0; first < panels; first += chunk) {
    const int64_t here = std::min(chunk, panels - first);
    parallel_for(2 * here, 1, [&](int64_t b, int64_t e) {
      for (int64_t item = b; item < e; ++item) {
        const int64_t p = item / 2, t0 = (first + p) * panel;
        if (item % 2 == 0)
          pack(dtype, xm, t0, panel, m, xt + p * panel * m);
        else
          pack(dtype, dym, t0, panel, n, dyt + p * panel * n);
      }
    });
    // A thread owns a part, so that every sum runs over the panels in one order whatever the thread count.
    parallel_for(parts, 1, [&](int64_t b, int64_t e) {
      for (int64_t part = b; part < e; ++part)
        for (int64_t p = 0; p < here; ++p) f(dyt + p * panel * n, xt + p * panel * m, panel, part, dv);
    });
  }
  if (dtype != DType::f32)
    parallel_for(count, 1 << 15, [&](int64_t b, int64_t e) {
      cpu::sparse_kernels().from_f32(dtype, dv, out.mutable_data_ptr(), {b, e});
    });
}

}  // namespace slk
