// W = alpha B A + S by the tensor-core kernel whose epilogue adds S, thread by thread, against fp64: ragged tiles,
// ranks from 1, empty rows, rows with every column, more than one tile in each direction.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/sparse.h"

using namespace slk;

namespace {

using Launcher = cudaError_t (*)(const cuda::GemmArgs&, const Csr&, const void*, float, cudaStream_t);

double wide(__nv_bfloat16 x) {
  return double(float(x));
}

struct Size {
  int64_t n, m, r;
  double density;
};

template <class Col>
bool check(const char* name, Launcher launcher, const Size& z) {
  std::mt19937 random(unsigned(z.n * 131 + z.m * 7 + z.r));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<int32_t> crow{0};
  std::vector<Col> col;
  for (int64_t i = 0; i < z.n; ++i) {  // row 1 is full, row 2 empty
    for (int64_t j = 0; j < z.m; ++j)
      if (i == 1 || (i != 2 && uniform(random) < z.density)) col.push_back(Col(j));
    crow.push_back(int32_t(col.size()));
  }
  const int64_t ld = round_up(z.r, 8), ldc = round_up(z.m, 8);
  const auto draw = [&](size_t count) {
    std::vector<__nv_bfloat16> x(count);
    for (auto& v : x) v = __nv_bfloat16(normal(random));
    return x;
  };
  const std::vector<__nv_bfloat16> B = draw(z.n * ld), At = draw(z.m * ld), values = draw(col.size());
  simt::Buffer<__nv_bfloat16> d_b(B), d_at(At), d_values(values), w(z.n * ldc);
  simt::Buffer<int32_t> d_crow(crow);
  simt::Buffer<Col> d_col(col);
  const Csr s = {d_crow.get(), d_col.get(), sizeof(Col) == 2, z.n, z.m, int64_t(col.size())};
  const cuda::GemmArgs g = {d_b.get(), d_at.get(), w.get(), z.n, z.m, z.r, ld, ld, ldc};
  const float alpha = 0.75f;
  if (launcher(g, s, d_values.get(), alpha, nullptr) != cudaSuccess) {
    std::printf("FAIL %s: launch\n", name);
    return false;
  }
  int64_t wrong = 0;
  for (int64_t i = 0; i < z.n; ++i) {
    int k = crow[i];
    for (int64_t j = 0; j < z.m; ++j) {
      double exact = 0, size = 0;
      for (int64_t q = 0; q < z.r; ++q) {
        const double term = alpha * wide(B[i * ld + q]) * wide(At[j * ld + q]);
        exact += term;
        size += std::fabs(term);
      }
      if (k < crow[i + 1] && col[k] == j) exact += wide(values[k++]);
      const double bound = 1.01 * 0x1p-9 * 2 * std::fabs(exact) + (size + std::fabs(exact)) * double(z.r + 2) * 0x1p-23;
      if (!(std::fabs(wide(w[i * ldc + j]) - exact) <= bound)) ++wrong;
    }
    for (int64_t j = z.m; j < ldc; ++j) wrong += !std::isnan(float(w[i * ldc + j]));  // poison: not written
  }
  if (wrong) std::printf("FAIL %s n=%ld m=%ld r=%ld: %ld wrong\n", name, long(z.n), long(z.m), long(z.r), long(wrong));
  return wrong == 0;
}

bool check_all(const char* name, Launcher launcher) {
  bool ok = check<int16_t>(name, launcher, {130, 300, 40, 0.05});
  ok &= check<int16_t>(name, launcher, {3, 8, 1, 0.5});
  ok &= check<int32_t>(name, launcher, {33, 261, 5, 0.3});
  ok &= check<int16_t>(name, launcher, {5, 257, 8, 0.0});
  return ok;
}

}  // namespace

int main() {
  bool ok = check_all("compose_sm80", cuda::launch_compose_sm80);
  ok &= check_all("compose_sm90", cuda::launch_compose_sm90);
  // Two multiprocessors, six tiles: the builders and the consumers hand the tile of W back and forth.
  ok &= check<int16_t>("compose_sm90", cuda::launch_compose_sm90, {260, 520, 72, 0.1});
  std::printf(ok ? "sparse_compose: ok\n" : "sparse_compose: failed\n");
  return ok ? 0 : 1;
}
