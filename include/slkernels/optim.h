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

constexpr int64_t kMaxQuantBlock = 4096;     // a block's moments stay in L1 as fp32
constexpr int64_t kQuantBlockMultiple = 16;  // whole vectors on every ISA

namespace cpu {

struct Moment {
  void* data;    // codes, or fp32 where scale is null
  float* scale;  // [ceil(n / block)]
};

struct StepTensor {
  void* p;        // parameters; null for a direction
  void* out;      // the direction, or null
  const void* g;  // of p's dtype
  Moment m, v, slow;
  void* low;     // int16 or int8 remainders of bf16 parameters, or null
  int low_bits;  // 16 or 8
  int64_t n;
  DType dtype, out_dtype;
  uint32_t index;  // in its list: a word of the random numbers' counter
};

struct RandomKey {
  uint64_t seed;
  uint32_t step;
};

struct StepCall {
  StepScalars scalars;
  Rule rule;
  Codec codec;  // of m
  int64_t block;
  bool stochastic;  // rounding of parameters
  RandomKey random;
};

struct OptimKernels {
  // Blocks [begin, end) of an n-element x. random: stochastic rounding, or null.
  void (*quantize)(Codec, DType, const void* x, int64_t n, int64_t block, Range blocks, const RandomKey* random,
                   uint8_t* codes, float* scale);
  void (*dequantize)(Codec, DType, const uint8_t* codes, const float* scale, int64_t n, int64_t block, Range blocks,
                     void* out);
  // Return the number of elements whose moments were kept.
  int64_t (*adam)(const StepTensor&, const StepCall&, Range blocks);
  int64_t (*ademamix)(const StepTensor&, const StepCall&, Range blocks);
  int64_t (*momentum)(const StepTensor&, const StepCall&, Range blocks);
};
const OptimKernels& optim_kernels();

}  // namespace cpu
}  // namespace slk
