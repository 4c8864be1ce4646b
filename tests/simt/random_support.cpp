// random_support's CUDA kernels against the CPU's, thread by thread: the same bits for every kind and ragged size.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/sparse.h"

using namespace slk;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t n, int64_t m, double density) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s n=%ld m=%ld density=%g\n", what, long(n), long(m), density);
}

template <class Col>
void compare(const char* what, const SupportSampler& sampler) {
  std::vector<int64_t> scratch(sampler.count);
  std::vector<int32_t> crow(sampler.n + 1);
  std::vector<Col> col(sampler.count);
  cpu::sample_support(sampler, {0, sampler.count}, scratch.data());
  cpu::bucket_support(sampler, scratch.data(), crow.data(), col.data());
  cpu::sort_support(sampler, crow.data(), col.data(), {0, sampler.n});

  simt::Buffer<int32_t> device_crow(sampler.n + 1), device_scratch(sampler.n + sampler.count);
  simt::Buffer<Col> device_col(sampler.count);
  const cudaError_t error = cuda::launch_random_support(sampler, device_crow.get(), device_col.get(), sizeof(Col) == 2,
                                                        device_scratch.get(), nullptr);
  expect(error == cudaSuccess, what, sampler.n, sampler.m, 0);
  expect(device_crow.host() == crow && device_col.host() == col, what, sampler.n, sampler.m, double(sampler.count));
}

template <class BlockCol, class Col>
void compare_blocks(int64_t n, int64_t m, double density, uint64_t seed) {
  const SupportSampler sampler = SupportSampler::blocks(n, m, density, seed);
  std::vector<int64_t> scratch(sampler.count);
  std::vector<int32_t> block_crow(sampler.n + 1), crow(n + 1);
  std::vector<BlockCol> block_col(sampler.count);
  cpu::sample_support(sampler, {0, sampler.count}, scratch.data());
  cpu::bucket_support(sampler, scratch.data(), block_crow.data(), block_col.data());
  cpu::sort_support(sampler, block_crow.data(), block_col.data(), {0, sampler.n});
  std::vector<Col> col(64 * sampler.count);
  cpu::expand_blocks(block_crow.data(), block_col.data(), n, m, crow.data(), col.data());
  col.resize(crow[n]);

  simt::Buffer<int32_t> device_block_crow(block_crow), device_crow(n + 1);
  simt::Buffer<BlockCol> device_block_col(block_col);
  simt::Buffer<Col> device_col(col.size());
  cuda::launch_expand_blocks(device_block_crow.get(), device_block_col.get(), sizeof(BlockCol) == 2, n, m,
                             device_crow.get(), device_col.get(), sizeof(Col) == 2, nullptr);
  expect(device_crow.host() == crow && device_col.host() == col, "expand_blocks", n, m, density);
}

}  // namespace

int main() {
  const int64_t sizes[][2] = {{64, 48}, {37, 1}, {1, 300}, {129, 77}};
  for (const auto& [n, m] : sizes)
    for (double density : {0.0, 0.1, 1.0}) {
      compare<int16_t>("uniform", SupportSampler::uniform(n, m, density, 11));
      compare<int16_t>("row", SupportSampler::rows(SupportKind::row, n, m, density, 12));
      compare<int16_t>("column", SupportSampler::rows(SupportKind::column, n, m, density, 13));
      compare_blocks<int16_t, int16_t>(n, m, density, 14);
    }
  compare<int16_t>("uniform, two passes of the scan", SupportSampler::uniform(1030, 3, 0.1, 18));
  compare<int32_t>("uniform, 32-bit columns", SupportSampler::uniform(3, 40000, 0.01, 15));
  compare<int32_t>("uniform, two bitmap windows", SupportSampler::uniform(2, 300000, 0.001, 16));
  compare_blocks<int16_t, int32_t>(9, 40001, 0.05, 17);
  std::printf(failures ? "%d failures\n" : "random_support: ok\n", failures);
  return failures ? 1 : 0;
}
