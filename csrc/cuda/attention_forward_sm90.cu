// The forward's launcher on sm_90a and its kernels in bf16. Contract: slkernels/attention.h; the kernel:
// attention_forward_sm90.cuh.
#include "cuda/attention_forward_sm90.cuh"

namespace slk::cuda {

template cudaError_t launch_attention_forward_sm90<__nv_bfloat16>(const AttentionForward&, cudaStream_t);

cudaError_t launch_attention_forward_sm90(const AttentionForward& f, cudaStream_t stream) {
  if (const cudaError_t error = check_attention(f); error != cudaSuccess) return error;
  if (f.shape.batch * f.shape.heads_q * f.shape.sq == 0) return cudaSuccess;
  // Gathered columns, and no keys at all, which no tensor map describes: the kernel of sm_80, compiled for sm_90a.
  if (f.mask.col_ptr || f.shape.sk == 0) return launch_attention_forward_sm80(f, stream);
  return f.shape.dtype == DType::bf16 ? launch_attention_forward_sm90<__nv_bfloat16>(f, stream)
                                      : launch_attention_forward_sm90<__half>(f, stream);
}

}  // namespace slk::cuda
