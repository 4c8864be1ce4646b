// Family `semi24`: the activation that ends a product, on both devices.
#pragma once

#include <cmath>

#include "slkernels/semi24_gemm.h"

namespace slk {

// act(z) in fp32, by the formulas of torch.nn.functional. NaN stays NaN.
SLK_HD inline float activate24(Activation24 activation, float z) {
  switch (activation) {
    case Activation24::relu:
      return z < 0 ? 0.0f : z;
    case Activation24::silu:
      return z / (1.0f + expf(-z));
    case Activation24::gelu:
      return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case Activation24::relu2:
      return z < 0 ? 0.0f : z * z;
    case Activation24::none:
      break;
  }
  return z;
}

}  // namespace slk
