// C = A B^T and nothing else: gemm_sm80.cuh without an epilogue.
#include "cuda/gemm_sm80.cuh"

namespace slk::cuda {
cudaError_t launch_gemm_sm80(const GemmArgs& g, cudaStream_t stream) {
  if (const cudaError_t error = check_gemm_args(g); error != cudaSuccess) return error;
  return gemm_sm80::launch_with(g, gemm_sm80::Product(), stream);
}

}  // namespace slk::cuda
