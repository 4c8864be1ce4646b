// The rules of slkernels/optim_step.cuh in vectors.
#pragma once

#include "cpu/simd_pairs.h"
#include "slkernels/optim_step.cuh"

namespace slk::cpu::SLK_ISA {

// The rules with one moment share a kernel, which is told apart at run time: a branch that always goes the same way. It
// goes by the name of sgd.
constexpr bool has_v(Rule r) {
  return r == Rule::adam || r == Rule::adam_direction || r == Rule::ademamix;
}

struct VectorScalars {
  V beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, alpha, eps, decay, minus_step, inv_bias1,
      inv_sqrt_bias2, inv_grad_scale;
  bool first;
  Rule rule;
  VectorScalars(const StepScalars& s, Rule rule)
      : beta1(broadcast(s.beta1)),
        one_minus_beta1(broadcast(s.one_minus_beta1)),
        beta2(broadcast(s.beta2)),
        one_minus_beta2(broadcast(s.one_minus_beta2)),
        beta3(broadcast(s.beta3)),
        one_minus_beta3(broadcast(s.one_minus_beta3)),
        alpha(broadcast(s.alpha)),
        eps(broadcast(s.eps)),
        decay(broadcast(s.decay)),
        minus_step(broadcast(s.minus_step)),
        inv_bias1(broadcast(s.inv_bias1)),
        inv_sqrt_bias2(broadcast(s.inv_sqrt_bias2)),
        inv_grad_scale(broadcast(s.inv_grad_scale)),
        first(s.first),
        rule(rule) {}
};

struct Moments {
  V m, slow, v, root;  // root of v
};

SLK_INLINE V sign(V x) {  // of NaN: NaN
  const V one = (V)(((VI)x & INT32_MIN) | (VI)broadcast(1.0f));
  return ((VI)((VU)x << 1) == 0) ? zero() : ((x == x) ? one : x);
}

// One step of kLanes elements: p' (or the direction), with the moments brought up to date.
template <Rule kRule>
SLK_INLINE V step_vector(const VectorScalars& s, V p, V g, Moments& x) {
  if constexpr (has_v(kRule)) {
    x.m = fma(s.beta1, x.m, s.one_minus_beta1 * g);
    x.v = fma(s.beta2, x.v, s.one_minus_beta2 * g * g);
    x.root = sqrt(x.v);
    const V denominator = fma(x.root, s.inv_sqrt_bias2, s.eps);
    if constexpr (kRule == Rule::ademamix) {
      x.slow = fma(s.beta3, x.slow, s.one_minus_beta3 * g);
      return fma(s.minus_step, fma(x.m, s.inv_bias1, s.alpha * x.slow) / denominator, p * s.decay);
    }
    const V direction = x.m / denominator;
    return kRule == Rule::adam_direction ? direction * s.inv_bias1 : fma(s.minus_step, direction, p * s.decay);
  } else {
    V update;
    switch (s.rule) {
      case Rule::lion:
        update = sign(fma(s.beta1, x.m, s.one_minus_beta1 * g));
        x.m = fma(s.beta2, x.m, s.one_minus_beta2 * g);
        break;
      case Rule::signum:
        x.m = fma(s.beta1, x.m, s.one_minus_beta1 * g);
        update = sign(x.m);
        break;
      default:
        x.m = s.first ? g : fma(s.beta1, x.m, g);
        update = s.rule == Rule::nesterov ? fma(s.beta1, x.m, g) : x.m;
    }
    return fma(s.minus_step, update, p * s.decay);  // sgd, nesterov: decay is 1
  }
}

}  // namespace slk::cpu::SLK_ISA
