// The backward's kernels in fp16: a file of their own, to be compiled beside those in bf16.
#include "cuda/attention_backward_sm80.cuh"

namespace slk::cuda {

template cudaError_t launch_attention_backward_sm80<__half>(const AttentionBackward&, cudaStream_t);

}  // namespace slk::cuda
