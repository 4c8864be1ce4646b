// The weights of two states of attention in their union; shared by both devices.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define SLK_HD_INLINE __host__ __device__ __forceinline__
#else
#define SLK_HD_INLINE inline __attribute__((always_inline))  // compiled for several instruction sets: never shared
#endif

namespace slk {

// exp(lse1 - lse) and exp(lse2 - lse) with lse = log(exp lse1 + exp lse2). Both are 0, and lse is -infinity, where
// neither state kept a key.
struct MergeWeights {
  double first, second, lse;

  SLK_HD_INLINE MergeWeights(double lse1, double lse2) {
    const double top = lse1 > lse2 ? lse1 : lse2;
    if (top == -INFINITY) {
      first = second = 0;
      lse = top;
      return;
    }
    const double e1 = ::exp(lse1 - top), e2 = ::exp(lse2 - top), total = e1 + e2;
    first = e1 / total;
    second = e2 / total;
    lse = top + ::log(total);
  }
};

}  // namespace slk
