// Family `optim`: block-wise quantized optimizer state, and the fused multi-tensor steps that live on it.
//
//   quantize_block    a scale and codes for each block: optim_codec.cuh defines the codecs
//   dequantize_block  and back
//   adam_q_, adam_q_dir_, ademamix_q_, momentum_q_
//                     decode the moments, one step in fp32 (optim_step.cuh defines the rules), encode them again, in
//                     one pass over memory
//
// Blocks are runs of `block` elements of the flattened tensor (the last one may be shorter). Moments are used before
// they are quantized. Where a moment would not be finite (a NaN or infinite gradient, or an overflow), the element's
// moments keep their old values, so that one element cannot wipe the scale of its block, and it is counted.
#pragma once

#include "slkernels/optim_codec.cuh"
#include "slkernels/optim_step.cuh"
#include "slkernels/types.h"

namespace slk {

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
