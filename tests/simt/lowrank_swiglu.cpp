// SwiGLU's kernels, thread by thread, against fp64: every dtype, counts that no vector divides, addresses that no
// vector can be read from, gates whose e^-gate overflows, and elements behind the end that must stay untouched.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/lowrank.h"

using namespace slk;

namespace {

template <class T>
double wide(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return double(float(x));
}

constexpr int64_t kGuard = 16;  // elements behind the end
constexpr float kUntouched = 12345;

template <class T>
bool near(T got, double want, double rounding) {
  const double tiny = std::is_same_v<T, __half> ? 0x1p-24 : 1e-38;
  return std::fabs(wide(got) - want) <= rounding * std::fabs(want) + tiny;
}

// offset: elements from a 16-byte address.
template <class T>
bool check(DType dtype, int64_t count, int64_t offset) {
  std::mt19937 random{unsigned(count)};
  std::normal_distribution<float> normal(0, 3);
  std::vector<T> gate(count + offset), up(count + offset), dh(count + offset);
  for (int64_t i = 0; i < count + offset; ++i) {
    gate[i] = T(i % 7 == 3 ? (i % 2 ? -100.f : 100.f) : normal(random));
    up[i] = T(normal(random));
    dh[i] = T(normal(random));
  }
  const auto guarded = [&](std::vector<T> x) {
    x.insert(x.end(), kGuard, T(kUntouched));
    return x;
  };
  simt::Buffer<T> d_gate(guarded(gate)), d_up(guarded(up)), d_dh(guarded(dh)), d_h(guarded(gate));
  bool ok = cuda::launch_swiglu(dtype, d_gate.get() + offset, d_up.get() + offset, d_h.get() + offset, count,
                                nullptr) == cudaSuccess;
  ok = ok && cuda::launch_swiglu_backward(dtype, d_dh.get() + offset, d_gate.get() + offset, d_up.get() + offset, count,
                                          nullptr) == cudaSuccess;
  const double rounding = std::is_same_v<T, double>   ? 0x1p-48
                          : std::is_same_v<T, float>  ? 0x1p-19  // e^x and the slope's terms, which partly cancel
                          : std::is_same_v<T, __half> ? 0x1.1p-11
                                                      : 0x1.1p-8;
  for (int64_t i = offset; i < offset + count; ++i) {
    const double g = wide(gate[i]), u = wide(up[i]), d = wide(dh[i]), s = 1 / (1 + std::exp(-g));
    const double slope = s * (1 + g * (1 - s)), cancelled = std::fabs(s) + std::fabs(g * s * (1 - s));
    ok = ok && near(d_h[i], g * s * u, rounding) && near(d_up[i], d * g * s, rounding);
    ok = ok && std::fabs(wide(d_gate[i]) - d * u * slope) <=
                   rounding * std::fabs(d * u * slope) + 0x1p-19 * std::fabs(d * u) * cancelled + 0x1p-24;
  }
  for (int64_t i = offset + count; i < offset + count + kGuard; ++i)
    for (const T& x : {d_gate[i], d_up[i], d_h[i]}) ok = ok && wide(x) == wide(T(kUntouched));
  if (!ok) std::printf("FAIL swiglu count=%ld offset=%ld type %d\n", long(count), long(offset), int(dtype));
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (const int64_t count : {1, 7, 8, 2047, 2048, 5461})
    for (const int64_t offset : {0, 1, 8}) {
      ok &= check<__nv_bfloat16>(DType::bf16, count, offset);
      ok &= check<__half>(DType::f16, count, offset);
      ok &= check<float>(DType::f32, count, offset);
      ok &= check<double>(DType::f64, count, offset);
    }
  std::printf(ok ? "lowrank_swiglu: ok\n" : "lowrank_swiglu: failed\n");
  return ok ? 0 : 1;
}
