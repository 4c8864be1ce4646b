// grad_norm_sq's and clip_coef's CUDA kernels against their definition: the same bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

#include "optim_numbers.h"
#include "simt/runtime.h"
#include "slkernels/optim_cuda.h"
#include "slkernels/optim_norm.h"

using namespace slk;

namespace {

int failures = 0;

struct TensorData {
  int64_t n;
  DType dtype;
  int offset;
};

double chunk_sum(DType dtype, const uint8_t* data, int64_t begin, int64_t end) {
  float sums[kNormSums] = {};
  for (int64_t i = begin; i < end; ++i) {
    const float x = numbers::load(dtype, data, i);
    float& sum = sums[(i - begin) % kNormSums];
    sum = std::fma(x, x, sum);
  }
  double total[kNormSums];
  std::copy(sums, sums + kNormSums, total);
  for (int width = kNormSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) total[j] += total[j + width];
  return total[0];
}

void check(const char* what, const std::vector<TensorData>& list, float planted) {
  std::vector<std::unique_ptr<simt::Buffer<uint8_t>>> buffers;
  std::vector<cuda::NormTensor> tensors;
  std::vector<double> chunk_sums;
  for (const TensorData& d : list) {
    const int bytes = numbers::bytes(d.dtype);
    buffers.push_back(std::make_unique<simt::Buffer<uint8_t>>((d.n + d.offset) * bytes));
    uint8_t* const data = buffers.back()->get() + d.offset * bytes;
    const auto x = numbers::random(d.n, uint64_t(d.n) + buffers.size(), 3);
    for (int64_t i = 0; i < d.n; ++i) numbers::store(d.dtype, data, i, x[i]);
    if (planted != 0 && d.n > 7) numbers::store(d.dtype, data, d.n - 3, planted);
    tensors.push_back({data, d.n, d.dtype});
    for (int64_t i = 0; i < d.n; i += kNormChunk)
      chunk_sums.push_back(chunk_sum(d.dtype, data, i, std::min(d.n, i + kNormChunk)));
  }
  const double want = add_norm_chunks(chunk_sums.data(), int64_t(chunk_sums.size()));
  simt::Buffer<double> sums(chunk_sums.size());
  simt::Buffer<float> out(1), divisor(1);
  const bool ok = cuda::launch_grad_norm_sq(tensors.data(), int64_t(tensors.size()), sums.get(), out.get(), nullptr) ==
                      cudaSuccess &&
                  cuda::launch_clip_coef(out.get(), 0.5f, divisor.get(), nullptr) == cudaSuccess;
  if (!ok || !numbers::same(out[0], float(want)) || !numbers::same(divisor[0], clip_divisor(out[0], 0.5f))) {
    ++failures;
    std::printf("FAIL %s: %.9g, want %.9g; divisor %g\n", what, double(out[0]), double(float(want)),
                double(divisor[0]));
  }
}

}  // namespace

int main() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    check("one", {{3 * kNormChunk + 1000, dtype, 0}}, 0);
    check("misaligned", {{kNormChunk + 77, dtype, 1}}, 0);
    check("small", {{1, dtype, 0}, {0, dtype, 0}, {63, dtype, 0}, {64, dtype, 0}, {65, dtype, 0}}, 0);
    check("NaN", {{5000, dtype, 0}}, std::numeric_limits<float>::quiet_NaN());
    check("infinity", {{5000, dtype, 0}}, -std::numeric_limits<float>::infinity());
  }
  check("mixed", {{2000, DType::f32, 0}, {20000, DType::bf16, 0}, {300, DType::f32, 0}, {1024, DType::f16, 0}}, 0);
  check("nothing", {{0, DType::f32, 0}}, 0);
  std::vector<TensorData> many;
  for (int i = 0; i < 3000; ++i) many.push_back({1 + i % 5, DType::bf16, 0});
  check("more than a launch takes", many, 0);
  std::printf(failures ? "%d failures\n" : "optim_norm: ok\n", failures);
  return failures ? 1 : 0;
}
