// The forward's kernels on sm_90a in fp16: a file of their own, to be compiled beside those in bf16.
#include "cuda/attention_forward_sm90.cuh"

namespace slk::cuda {

template cudaError_t launch_attention_forward_sm90<__half>(const AttentionForward&, cudaStream_t);

}  // namespace slk::cuda
