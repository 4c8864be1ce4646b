// Which instance multiplies, and the arguments that none of them could take.
#include "cutlass/semi24_linear_sm90.h"

#include <climits>

namespace slk::cuda {
namespace {

// Time of a large tile in small ones: less than the 2 of its products, because W's and x's tiles are read half as often
// into shared memory. Not measured yet.
constexpr double kLargeTileTime = 1.8;

// The tile whose waves over the device take the shorter time.
bool picks_large(const Linear24Args& a, int sms) {
  const auto waves = [&](int64_t tile_m) {
    return ceil_div(ceil_div(a.n, tile_m) * ceil_div(a.tokens, kLinear24TileN), sms);
  };
  return kLargeTileTime * double(waves(kLinear24LargeM)) <= double(waves(kLinear24SmallM));
}

// TMA wants bases and rows at multiples of 16 bytes; CUTLASS counts rows and columns in int.
bool can_run(DType dtype, const Linear24Args& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return (dtype == DType::bf16 || dtype == DType::f16) && a.m > 0 && a.ld_x % 8 == 0 && a.ld_y % 8 == 0 &&
         a.ld_x >= a.m && a.ld_y >= a.n && aligned(a.values) && aligned(a.meta) && aligned(a.x) && aligned(a.y) &&
         round_up(a.n, kLinear24LargeM) <= INT_MAX && round_up(a.m, kSm90TileK) <= INT_MAX && a.tokens <= INT_MAX;
}

}  // namespace

cudaError_t launch_linear24_sm90(DType dtype, const Linear24Args& a, cudaStream_t stream) {
  if (a.n == 0 || a.tokens == 0) return cudaSuccess;
  if (!can_run(dtype, a)) return cudaErrorInvalidValue;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const bool large = picks_large(a, sms);
  if (dtype == DType::bf16)
    return (large ? launch_linear24_sm90_bf16_large : launch_linear24_sm90_bf16_small)(a, sms, stream);
  return (large ? launch_linear24_sm90_f16_large : launch_linear24_sm90_f16_small)(a, sms, stream);
}

}  // namespace slk::cuda
