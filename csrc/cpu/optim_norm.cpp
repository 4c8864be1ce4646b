// Sums of squares. Contract: slkernels/optim_norm.h.
#include "slkernels/optim_norm.h"

#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr int kVectors = kNormSums / kLanes;

template <class T>
double sum_of_squares_t(const T* x, int64_t n) {
  V sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kNormSums <= n; i += kNormSums)
    for (int j = 0; j < kVectors; ++j) {
      const V v = load(x + i + j * kLanes);
      sums[j] = fma(v, v, sums[j]);
    }
  for (int j = 0; i < n; i += kLanes, ++j) {
    const V v = load_n(x + i, int(n - i < kLanes ? n - i : kLanes));
    sums[j] = fma(v, v, sums[j]);
  }
  float partial[kNormSums];
  for (int j = 0; j < kVectors; ++j) store(partial + j * kLanes, sums[j]);
  double total[kNormSums];
  for (int j = 0; j < kNormSums; ++j) total[j] = partial[j];
  for (int width = kNormSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) total[j] += total[j + width];
  return total[0];
}

double sum_of_squares(DType dtype, const void* x, int64_t n) {
  double sum = 0;
  with_float_type(dtype,
                  [&](auto* type) { sum = sum_of_squares_t(static_cast<const Element<decltype(type)>*>(x), n); });
  return sum;
}

}  // namespace

extern const NormKernels norm_table;
const NormKernels norm_table = {sum_of_squares};

}  // namespace slk::cpu::SLK_ISA
