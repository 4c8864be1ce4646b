// Family `optim`: block-wise quantized optimizer state, and the fused AdamW step that lives on it.
//
//   quantize_block    scale[b] = max |x| of block b;  codes[i] = the code of map nearest to x[i] / scale[b]
//   dequantize_block  x[i] = map[codes[i]] * scale[b]
//   adam_q_           decode m and v, one Adam(W) step in fp32, encode them again, in one pass over memory
//
// Blocks are runs of `block` elements of the flattened tensor (the last one may be shorter). The map `dyn8` is
// bitsandbytes' dynamic map, signed for m and unsigned for v; csrc/cpu/dyn8.h has it in closed form.
//
// One Adam step, element by element (g = grad / grad_scale; torch.optim.AdamW's order, decay before the update):
//   g += weight_decay * p                             only when not decoupled
//   m' = beta1 m + (1 - beta1) g;   v' = beta2 v + (1 - beta2) g^2
//   p  = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)
// m' and v' are used before they are quantized. Where v' is not finite (a NaN or infinite gradient, or an overflow)
// m and v keep their old values, so that one element cannot wipe the scale of its block; p follows the formula, and
// becomes NaN as it does in torch.
#pragma once

#include "slkernels/types.h"

namespace slk {

enum class Codec : int { dyn8, dyn8u };

constexpr int64_t kMaxQuantBlock = 4096;     // a block's m and v stay in L1 as fp32
constexpr int64_t kQuantBlockMultiple = 16;  // whole vectors on every ISA

namespace cpu {

struct AdamTensor {
  void* p;
  const void* g;
  void *m, *v;               // uint8 codes, or fp32 when m_scale is null
  float *m_scale, *v_scale;  // [ceil(n / block)]
  int64_t n;
  DType dtype;  // of p and g
};

struct AdamStep {  // what the step's scalars become, computed once a call in fp64
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;           // 1 - lr * weight_decay, or 1 when not decoupled
  float l2;              // weight_decay when not decoupled, or 0
  float step_size;       // lr / (1 - beta1^t)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  float inv_grad_scale;
};

struct OptimKernels {
  // Blocks [begin, end) of an n-element x.
  void (*quantize)(Codec, DType, const void* x, int64_t n, int64_t block, Range blocks, uint8_t* codes, float* scale);
  void (*dequantize)(Codec, DType, const uint8_t* codes, const float* scale, int64_t n, int64_t block, Range blocks,
                     void* out);
  void (*adam)(const AdamTensor&, const AdamStep&, int64_t block, Range blocks);
};
const OptimKernels& optim_kernels();

}  // namespace cpu
}  // namespace slk
