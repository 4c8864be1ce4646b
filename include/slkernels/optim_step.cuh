// The step rules of family `optim`, element by element: the definition for both devices. Everything that decides a
// code (m', v') is one chain of fp32 operations, each rounded once, so that codes are the same bits everywhere.
//
//   g = grad                                            as it is, if grad_scale is 1 and there is no L2 term, else
//   g = fma(l2, p, fl(grad * inv_grad_scale))           l2 = weight_decay where the decay is coupled, else 0
//
//   Adam:      m' = fma(beta1, m, fl((1 - beta1) g))
//              v' = fma(beta2, v, fl(fl((1 - beta2) g) g))
//              d  = m' / fma(sqrt(v'), 1 / sqrt(1 - beta2^t), eps)
//              p' = fma(-lr / (1 - beta1^t), d, fl(p decay))         decay = 1 - lr weight_decay where decoupled, else
//              1
//   adam_direction: out = fl(d fl(1 / (1 - beta1^t)))
//   AdEMAMix (Pagliardini et al., arXiv 2409.03137), s = the slow moment:
//              s' = fma(beta3, s, fl((1 - beta3) g))
//              d  = fma(m', 1 / (1 - beta1^t), fl(alpha s')) / fma(sqrt(v'), 1 / sqrt(1 - beta2^t), eps)
//              p' = fma(-lr, d, fl(p decay))
//   lion (Chen et al., arXiv 2302.06675), decoupled:
//              c  = fma(beta1, m, fl((1 - beta1) g));   m' = fma(beta2, m, fl((1 - beta2) g))
//              p' = fma(-lr, sign(c), fl(p decay))
//   signum (Bernstein et al., arXiv 1802.04434), decoupled:
//              m' = fma(beta1, m, fl((1 - beta1) g));   p' = fma(-lr, sign(m'), fl(p decay))
//   sgd (torch.optim.SGD), coupled:
//              m' = fma(beta1, m, g), or g at step 1;   p' = fma(-lr, m', p)
//   nesterov (the same), coupled:
//              m' as sgd;                               p' = fma(-lr, fma(beta1, m', g), p)
//
// sign(0) = 0 and sign(NaN) = NaN. Where v' (Adam, AdEMAMix) or m' (the others) is not finite, every moment of the
// element keeps its old value, and the element is counted; p' follows the formula.
#pragma once

#include "slkernels/types.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace slk {

enum class Rule : int { adam, adam_direction, ademamix, lion, signum, sgd, nesterov };

// What a step's scalars become, computed once a call in fp64 (on CUDA: once a block).
struct StepScalars {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float beta3, one_minus_beta3, alpha;
  float eps;
  float decay;           // 1 - lr * weight_decay where decoupled, else 1
  float l2;              // weight_decay where coupled, else 0
  float minus_step;      // adam: -lr / (1 - beta1^t), the others: -lr
  float inv_bias1;       // 1 / (1 - beta1^t)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  float inv_grad_scale;
  bool first;       // t == 1
  bool plain_grad;  // grad_scale is 1 and l2 is 0
};

struct StepOptions {  // host scalars of a call
  Rule rule;
  double beta1, beta2, eps, weight_decay;
  bool decoupled;
};

// x^t for a step t, by squaring: pow() is another function on every device. Its error is below t units in the last
// place.
SLK_HD inline double power(double x, float t) {
  double result = 1;
  for (uint64_t n = t > 0 ? uint64_t(t) : 0; n; n >>= 1, x = x * x)
    if (n & 1) result = result * x;
  return result;
}
// 1 - a b, with the product rounded: no compiler fuses it.
SLK_HD inline double one_minus_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(1, __dmul_rn(a, b));
#else
  const volatile double product = a * b;
  return 1 - product;
#endif
}

// t, lr, grad_scale, beta3, alpha: what the device tensors hold (beta3, alpha: AdEMAMix only).
SLK_HD inline StepScalars step_scalars(const StepOptions& o, float t, float lr, float grad_scale, float beta3,
                                       float alpha) {
  StepScalars s;
  const double bias1 = one_minus_product(power(o.beta1, t), 1), bias2 = one_minus_product(power(o.beta2, t), 1);
  s.beta1 = float(o.beta1);
  s.one_minus_beta1 = float(1 - o.beta1);
  s.beta2 = float(o.beta2);
  s.one_minus_beta2 = float(1 - o.beta2);
  s.beta3 = beta3;
  s.one_minus_beta3 = float(1 - double(beta3));
  s.alpha = alpha;
  s.eps = float(o.eps);
  s.decay = float(o.decoupled ? one_minus_product(double(lr), o.weight_decay) : 1.0);
  s.l2 = float(o.decoupled ? 0.0 : o.weight_decay);
  s.minus_step = float(o.rule == Rule::adam ? -double(lr) / bias1 : -double(lr));
  s.inv_bias1 = float(1 / bias1);
  s.inv_sqrt_bias2 = float(1 / sqrt(bias2));
  s.inv_grad_scale = float(1 / double(grad_scale));
  s.first = t == 1;
  s.plain_grad = s.l2 == 0 && grad_scale == 1;
  return s;
}

}  // namespace slk
