// Learned 2:4 masks in fp64, a group at a time: what gradient checks compare with. Contract: slkernels/semi24_mask.h.
#include <algorithm>
#include <cstring>

#include "slkernels/semi24_mask.cuh"

namespace slk::cpu {
namespace {

// The columns of group g: where they begin, and how many there are.
struct Columns {
  int64_t at;
  int count;
  Columns(int64_t m, int64_t g) {
    const int64_t row = g / groups24(m), first = 4 * (g % groups24(m));
    at = row * m + first;
    count = int(std::min<int64_t>(4, m - first));
  }
};

SoftGroup<MaskDouble> soft_group_of(const GatedWeight24& x, const SoftMask24& mask, const MaskFactors<double>& factors,
                                    int64_t g) {
  double gate[kCodes24];
  std::copy_n(static_cast<const double*>(x.gate) + kCodes24 * g, kCodes24, gate);
  return soft_group<MaskDouble>(gate, factors, uint32_t(g), uint32_t(uint64_t(g) >> 32), mask.seed);
}

}  // namespace

void soft_mask_f64(const GatedWeight24& x, const SoftMask24& mask, Range groups, double* y) {
  const auto factors = MaskFactors<double>::of<MaskDouble>(mask.kappa, mask.tau);
  const double* w = static_cast<const double*>(x.w);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const auto soft = soft_group_of(x, mask, factors, g);
    const Columns columns(x.m, g);
    for (int c = 0; c < columns.count; ++c) y[columns.at + c] = w[columns.at + c] * soft.mask(c);
  }
}

void soft_mask_backward_f64(const GatedWeight24& x, const SoftMask24& mask, const double* dy, Range groups,
                            double* dgate, double* dw) {
  const auto factors = MaskFactors<double>::of<MaskDouble>(mask.kappa, mask.tau);
  const double* w = static_cast<const double*>(x.w);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const auto soft = soft_group_of(x, mask, factors, g);
    const Columns columns(x.m, g);
    double d[4] = {}, v[4] = {}, out[kCodes24];
    std::copy_n(dy + columns.at, columns.count, d);
    std::copy_n(w + columns.at, columns.count, v);
    if (dgate) {
      gate_gradient<MaskDouble>(soft, factors, d, v, out);
      std::copy_n(out, kCodes24, dgate + kCodes24 * g);
    }
    if (!dw) continue;
    for (int c = 0; c < columns.count; ++c) dw[columns.at + c] = d[c] * soft.mask(c);
  }
}

void gate_to_mask_f64(const double* gate, int64_t m, Range groups, uint8_t* mask) {
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    double x[kCodes24];
    std::copy_n(gate + kCodes24 * g, kCodes24, x);
    const uint32_t bytes = pattern_bytes24(uint32_t(best_code24(x)));
    const Columns columns(m, g);
    std::memcpy(mask + columns.at, &bytes, columns.count);
  }
}

void srste_grad_f64(const double* w, const uint8_t* mask, double lam, Range elements, double* grad) {
  for (int64_t i = elements.begin; i < elements.end; ++i)
    if (!mask[i]) grad[i] += lam * w[i];
}

}  // namespace slk::cpu
