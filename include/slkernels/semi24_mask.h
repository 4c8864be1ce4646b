// Family `semi24`, masks that are learned or refined while a model trains. Formats and codes: semi24.h.
//
//   maskllm24      Y = W (*) M, M the mean of the six patterns of each group, weighted by
//                  p = softmax((kappa gate + noise) / tau)         (MaskLLM, arXiv 2409.17481)
//                  backward, from dY:  d gate_k = kappa / tau p_k (q_k - sum_l p_l q_l),  q_k = sum of dY W over
//                  pattern k;  dW = dY (*) M. Both make p anew: nothing of the gates' size is kept.
//   gate_to_mask   the pattern of the largest gate; ties: the lowest code; NaN ranks highest
//   srste_grad_    grad += lam (1 - mask) (*) W                    (SR-STE, arXiv 2102.04010)
//
// W [n, m], gate [n, G, 6] in the order of the codes, G = ceil(m / 4); contiguous. The noise is Gumbel noise as far as
// p can tell (semi24_mask.cuh), a pure function of (seed, group). Arithmetic is fp32 (fp64 for fp64), one rounding at
// the end, and written once for both devices and all instruction sets: in fp32 all give the same bits.
//
// A group costs 6 gates and 4 elements read and 4 written: 40 bytes with fp32 gates and a bf16 W, beside some 430
// instructions a group, a third of them six logarithms and a quarter one Philox draw. On a GPU both take the same time,
// on a CPU the arithmetic decides.
#pragma once

#include "slkernels/semi24.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace slk {

constexpr int kCodes24 = 6;

struct GatedWeight24 {
  DType type, gate_type;  // f64 both or neither
  const void *w, *gate;
  int64_t n, m;
  int64_t groups() const { return n * groups24(m); }
};

namespace cpu {

struct SoftMask24 {
  double kappa, tau;
  uint64_t seed;
};

// Groups are numbered row by row. Not for fp64, which has the functions below.
struct MaskKernels {
  void (*soft_mask)(const GatedWeight24&, const SoftMask24&, Range groups, void* y);
  // dgate or dw may be null.
  void (*soft_mask_backward)(const GatedWeight24&, const SoftMask24&, const void* dy, Range groups, void* dgate,
                             void* dw);
  void (*gate_to_mask)(DType, const void* gate, int64_t m, Range groups, uint8_t* mask);
  void (*srste_grad)(DType, const void* w, const uint8_t* mask, float lam, Range elements, void* grad);
};
const MaskKernels& mask_kernels();

void soft_mask_f64(const GatedWeight24&, const SoftMask24&, Range groups, double* y);
void soft_mask_backward_f64(const GatedWeight24&, const SoftMask24&, const double* dy, Range groups, double* dgate,
                            double* dw);
void gate_to_mask_f64(const double* gate, int64_t m, Range groups, uint8_t* mask);
void srste_grad_f64(const double* w, const uint8_t* mask, double lam, Range elements, double* grad);

}  // namespace cpu

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// Read on the device: a captured graph follows a schedule.
struct SoftMask24 {
  const float *kappa, *tau;
  const int64_t* seed;
};

// Asynchronous on `stream`; arguments as above.
cudaError_t launch_soft_mask24(const GatedWeight24&, const SoftMask24&, void* y, cudaStream_t stream);
cudaError_t launch_soft_mask24_backward(const GatedWeight24&, const SoftMask24&, const void* dy, void* dgate, void* dw,
                                        cudaStream_t stream);
cudaError_t launch_gate_to_mask24(DType, const void* gate, int64_t n, int64_t m, uint8_t* mask, cudaStream_t stream);
cudaError_t launch_srste_grad(DType, const void* w, const uint8_t* mask, double lam, int64_t count, void* grad,
                              cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace slk
