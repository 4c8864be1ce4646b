// The instances of semi24_linear_sm80.cuh, and which of them a shape gets.
#include "cuda/semi24_linear_sm80.cuh"

namespace slk::cuda {
namespace {

using namespace linear24_sm80;

// Fewer large tiles than this leave more than half of an A100's 108 multiprocessors idle: 16 times as many small ones,
// of half the efficiency, are then faster. Estimated, not measured yet.
constexpr int64_t kFewBlocks = 54;

cudaError_t check(const Linear24Args& g) {
  const auto fits = [](int64_t size) { return size >= 0 && size <= INT32_MAX; };
  if (!fits(g.n) || !fits(g.m) || !fits(g.tokens) || g.ld_x < g.m || g.ld_y < g.n) return cudaErrorInvalidValue;
  const auto unaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (unaligned(g.values) || unaligned(g.meta) || unaligned(g.x) || g.ld_x % kChunk) return cudaErrorMisalignedAddress;
  return cudaSuccess;
}

template <class T>
cudaError_t launch_type(const Linear24Args& g, cudaStream_t stream) {
  const bool small = g.tokens <= Small::kT || blocks_of<Large>(g) < kFewBlocks;
  return small ? launch_with<T, Small>(g, stream) : launch_with<T, Large>(g, stream);
}

}  // namespace

cudaError_t launch_linear24_sm80(DType dtype, const Linear24Args& g, cudaStream_t stream) {
  if (const cudaError_t error = check(g); error != cudaSuccess) return error;
  if (g.n == 0 || g.tokens == 0) return cudaSuccess;
  if (dtype == DType::bf16) return launch_type<__nv_bfloat16>(g, stream);
  if (dtype == DType::f16) return launch_type<__half>(g, stream);
  return cudaErrorInvalidValue;
}

}  // namespace slk::cuda
