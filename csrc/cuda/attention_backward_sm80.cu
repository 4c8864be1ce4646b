// The backward's launcher and its kernels in bf16. Contract: slkernels/attention.h; kernels:
// attention_backward_sm80.cuh.
#include "cuda/attention_backward_sm80.cuh"

namespace slk::cuda {

template cudaError_t launch_attention_backward_sm80<__nv_bfloat16>(const AttentionBackward&, cudaStream_t);

cudaError_t launch_attention_backward_sm80(const AttentionBackward& b, cudaStream_t stream) {
  const AttentionForward& f = b.forward;
  if (const cudaError_t error = check_attention(f); error != cudaSuccess) return error;
  if (f.mask.unit != f.mask.block_n || f.mask.col_ptr) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(b.d_o, b.d_o_strides, f.shape.dv) && is_aligned(b.dq, b.dq_strides, f.shape.dk) &&
                       is_aligned(b.dk, b.dk_strides, f.shape.dk) && is_aligned(b.dv, b.dv_strides, f.shape.dv);
  if (!aligned) return cudaErrorMisalignedAddress;
  return f.shape.dtype == DType::bf16 ? launch_attention_backward_sm80<__nv_bfloat16>(b, stream)
                                      : launch_attention_backward_sm80<__half>(b, stream);
}

// wgmma has no part in the backward yet: a Hopper runs the kernels of sm_80, compiled for sm_90a.
cudaError_t launch_attention_backward_sm90(const AttentionBackward& b, cudaStream_t stream) {
  return launch_attention_backward_sm80(b, stream);
}

}  // namespace slk::cuda
