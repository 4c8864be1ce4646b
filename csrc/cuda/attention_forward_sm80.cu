// The forward's launcher and its kernels in bf16. Contract: slkernels/attention.h; the kernel:
// attention_forward_sm80.cuh.
#include "cuda/attention_forward_sm80.cuh"

namespace slk::cuda {

template cudaError_t launch_attention_forward_sm80<__nv_bfloat16>(const AttentionForward&, cudaStream_t);

cudaError_t launch_attention_forward_sm80(const AttentionForward& f, cudaStream_t stream) {
  if (const cudaError_t error = check_attention(f); error != cudaSuccess) return error;
  if (f.shape.batch * f.shape.heads_q * f.shape.sq == 0) return cudaSuccess;
  return f.shape.dtype == DType::bf16 ? launch_attention_forward_sm80<__nv_bfloat16>(f, stream)
                                      : launch_attention_forward_sm80<__half>(f, stream);
}

}  // namespace slk::cuda
