// The kernels of learned 2:4 masks against the shared arithmetic, group by group on the host: the same bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "project_check.h"
#include "simt/runtime.h"
#include "slkernels/semi24_cuda.h"
#include "slkernels/semi24_mask.cuh"

using namespace slk;
using namespace project_check;

namespace {

constexpr float kKappa = 1.5f, kTau = 0.4f;
constexpr int64_t kSeed = -(int64_t(1) << 40) + 5;

struct Scalars {
  simt::Buffer<float> kappa{std::vector<float>{kKappa}}, tau{std::vector<float>{kTau}};
  simt::Buffer<int64_t> seed{std::vector<int64_t>{kSeed}};
  cuda::SoftMask24 get() const { return {kappa.get(), tau.get(), seed.get()}; }
};

// x, `offset` elements into a buffer: 0 makes 16-byte loads, 1 does not.
template <class T>
class Shifted {
 public:
  Shifted(const std::vector<T>& x, int offset) : offset_(offset), buffer_(padded(x, offset)) {}
  T* get() const { return buffer_.get() + offset_; }
  std::vector<T> host() const {
    const std::vector<T> all = buffer_.host();
    return {all.begin() + offset_, all.end()};
  }

 private:
  static std::vector<T> padded(std::vector<T> x, int offset) {
    x.insert(x.begin(), offset, T());
    return x;
  }
  int offset_;
  simt::Buffer<T> buffer_;
};

// f(group, its first element, its columns)
template <class F>
void each_group(int64_t n, int64_t m, F f) {
  for (int64_t g = 0; g < n * groups24(m); ++g) {
    const int64_t first = 4 * (g % groups24(m));
    f(g, g / groups24(m) * m + first, int(std::min<int64_t>(4, m - first)));
  }
}

SoftGroup<MaskFloat> group_of(const float* gate, int64_t g) {
  float x[kCodes24];
  std::copy_n(gate, kCodes24, x);
  const auto factors = MaskFactors<float>::of<MaskFloat>(kKappa, kTau);
  return soft_group<MaskFloat>(x, factors, uint32_t(g), uint32_t(g >> 32), uint64_t(kSeed));
}

template <class T, class TG>
void check_soft_mask(int64_t n, int64_t m, int offset) {
  const std::vector<T> w = draw<T>(n * m, 1), dy = draw<T>(n * m, 2);
  const std::vector<TG> gate = draw<TG>(n * groups24(m) * kCodes24, 3);
  const Shifted<T> device_w(w, offset), device_dy(dy, offset), y(w, offset), dw(w, offset);
  const Shifted<TG> device_gate(gate, offset), dgate(gate, offset), only_gate(gate, offset);
  const Shifted<T> only_w(w, offset);
  const Scalars scalars;
  const GatedWeight24 x = {type_of(T()), type_of(TG()), device_w.get(), device_gate.get(), n, m};
  const auto backward = [&](TG* to_gate, T* to_w) {
    return cuda::launch_soft_mask24_backward(x, scalars.get(), device_dy.get(), to_gate, to_w, nullptr) == cudaSuccess;
  };
  expect(cuda::launch_soft_mask24(x, scalars.get(), y.get(), nullptr) == cudaSuccess, "launch");
  expect(backward(dgate.get(), dw.get()) && backward(only_gate.get(), nullptr) && backward(nullptr, only_w.get()),
         "launch of the backward");

  std::vector<T> want_y = w, want_dw = w;
  std::vector<TG> want_dgate = gate;
  const auto factors = MaskFactors<float>::of<MaskFloat>(kKappa, kTau);
  each_group(n, m, [&](int64_t g, int64_t at, int columns) {
    float gates[kCodes24], out[kCodes24], cotangent[4] = {}, weight[4] = {};
    for (int k = 0; k < kCodes24; ++k) gates[k] = number(gate[kCodes24 * g + k]);
    const auto soft = group_of(gates, g);
    for (int c = 0; c < columns; ++c) {
      cotangent[c] = number(dy[at + c]);
      weight[c] = number(w[at + c]);
      want_y[at + c] = rounded(weight[c] * soft.mask(c), false, 0, T());
      want_dw[at + c] = rounded(cotangent[c] * soft.mask(c), false, 0, T());
    }
    gate_gradient<MaskFloat>(soft, factors, cotangent, weight, out);
    for (int k = 0; k < kCodes24; ++k) want_dgate[kCodes24 * g + k] = rounded(out[k], false, 0, TG());
  });
  expect(same(y.host(), want_y), "soft mask");
  expect(same(dw.host(), want_dw) && same(only_w.host(), want_dw), "dW");
  expect(same(dgate.host(), want_dgate) && same(only_gate.host(), want_dgate), "d gate");
}

bool near(const std::vector<double>& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(got[i] - want[i]) <= 1e-12 * (1 + std::fabs(want[i])))) return false;
  return got.size() == want.size();
}

void check_soft_mask_f64(int64_t n, int64_t m) {
  const auto wide = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
  const std::vector<double> w = wide(draw<float>(n * m, 1)), dy = wide(draw<float>(n * m, 2));
  const std::vector<double> gate = wide(draw<float>(n * groups24(m) * kCodes24, 3));
  const simt::Buffer<double> device_w(w), device_dy(dy), device_gate(gate);
  const simt::Buffer<double> y(w.size()), dw(w.size()), dgate(gate.size());
  const Scalars scalars;
  const GatedWeight24 x = {DType::f64, DType::f64, device_w.get(), device_gate.get(), n, m};
  cuda::launch_soft_mask24(x, scalars.get(), y.get(), nullptr);
  cuda::launch_soft_mask24_backward(x, scalars.get(), device_dy.get(), dgate.get(), dw.get(), nullptr);
  const GatedWeight24 host = {DType::f64, DType::f64, w.data(), gate.data(), n, m};
  const cpu::SoftMask24 mask = {kKappa, kTau, uint64_t(kSeed)};
  std::vector<double> want_y(w.size()), want_dw(w.size()), want_dgate(gate.size());
  cpu::soft_mask_f64(host, mask, {0, host.groups()}, want_y.data());
  cpu::soft_mask_backward_f64(host, mask, dy.data(), {0, host.groups()}, want_dgate.data(), want_dw.data());
  expect(near(y.host(), want_y) && near(dw.host(), want_dw) && near(dgate.host(), want_dgate), "fp64");
  // fp32 differs by its roundings alone.
  const auto single = [](const std::vector<double>& v) { return std::vector<float>(v.begin(), v.end()); };
  const simt::Buffer<float> w32(single(w)), gate32(single(gate)), y32(w.size());
  cuda::launch_soft_mask24({DType::f32, DType::f32, w32.get(), gate32.get(), n, m}, scalars.get(), y32.get(), nullptr);
  const std::vector<float> got = y32.host();
  for (size_t i = 0; i < got.size(); ++i) expect(std::fabs(got[i] - want_y[i]) <= 1e-5 * std::fabs(w[i]), "fp32");
}

template <class TG>
void check_gate_to_mask(int64_t n, int64_t m, int offset) {
  std::vector<TG> gate = draw<TG>(n * groups24(m) * kCodes24, 4);
  for (size_t i = 0; i < gate.size(); ++i) {
    if (i % 3 == 0) gate[i] = rounded(1.0f, false, 0, TG());  // ties
    if (i % 29 == 0) gate[i] = rounded(std::numeric_limits<float>::quiet_NaN(), false, 0, TG());
  }
  const Shifted<TG> device(gate, offset);
  const Shifted<uint8_t> mask(std::vector<uint8_t>(n * m), offset);
  expect(cuda::launch_gate_to_mask24(type_of(TG()), device.get(), n, m, mask.get(), nullptr) == cudaSuccess, "launch");
  constexpr int kPatterns[kCodes24][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  std::vector<uint8_t> want(n * m);
  each_group(n, m, [&](int64_t g, int64_t at, int columns) {
    int best = 0;
    const auto better = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
    for (int k = 1; k < kCodes24; ++k)
      if (better(number(gate[kCodes24 * g + k]), number(gate[kCodes24 * g + best]))) best = k;
    for (const int c : kPatterns[best])
      if (c < columns) want[at + c] = 1;
  });
  expect(same(mask.host(), want), "gate_to_mask");
}

template <class T>
void check_srste(int64_t count, int offset) {
  const float lam = 0.3f;
  const std::vector<T> w = draw<T>(count, 5), grad = draw<T>(count, 6);
  std::vector<uint8_t> mask(count);
  for (int64_t i = 0; i < count; ++i) mask[i] = i * 7 % 5 < 2;
  const Shifted<T> device_w(w, offset), device_grad(grad, offset);
  const Shifted<uint8_t> device_mask(mask, offset);
  cuda::launch_srste_grad(type_of(T()), device_w.get(), device_mask.get(), lam, count, device_grad.get(), nullptr);
  std::vector<T> want = grad;
  for (int64_t i = 0; i < count; ++i)
    if (!mask[i]) want[i] = rounded(std::fma(lam, number(w[i]), number(grad[i])), false, 0, T());
  expect(same(device_grad.host(), want), "srste_grad_");
}

template <class T>
struct DevicePack {
  Packed24 pack;
  simt::Buffer<T> values;
  simt::Buffer<uint8_t> meta;

  DevicePack(Layout24 layout, int64_t n, int64_t m)
      : pack{nullptr, nullptr, layout, n, m}, values(pack.rows() * pack.row_values()), meta(pack.meta_bytes()) {
    pack.values = values.get();
    pack.meta = meta.get();
  }
  bool operator==(const DevicePack& b) const {
    return same(values.host(), b.values.host()) && same(meta.host(), b.meta.host());
  }
};

// relu2_prune24 against prune_compress24 of what it squares, whose packs tests/simt/semi24.cpp checks.
template <class T>
void check_relu2(int64_t n, int64_t m, Layout24 layout, int offset) {
  std::vector<T> x = draw<T>(n * m, 7), squares = x;
  for (int64_t i = 0; i < n * m; ++i) {
    if (i % 5 == 0) x[i] = rounded(0.5f, false, 0, T());  // ties
    if (i == 11) x[i] = rounded(-0.0f, false, 0, T());
    const float v = std::max(number(x[i]), 0.0f);
    squares[i] = rounded(v * v, false, 0, T());
  }
  const Shifted<T> device_x(x, offset), device_squares(squares, offset);
  const DevicePack<T> got(layout, n, m), got_t(layout, m, n), want(layout, n, m), want_t(layout, m, n);
  expect(cuda::launch_relu2_prune24(type_of(T()), device_x.get(), got.pack, got_t.pack, nullptr) == cudaSuccess &&
             cuda::launch_prune_compress24(type_of(T()), device_squares.get(), nullptr, Prune24::rows, want.pack,
                                           want_t.pack, nullptr) == cudaSuccess,
         "launch");
  expect(got == want, "relu2_prune24");
  expect(got_t == want_t, "relu2_prune24, transposed");
}

template <class T>
void check_relu2_backward(int64_t count, int offset) {
  std::vector<T> y = draw<T>(count, 8);
  const std::vector<T> dy = draw<T>(count, 9);
  for (T& v : y) v = rounded(number(v) * number(v), false, 0, T());
  const Shifted<T> device_y(y, offset), device_dy(dy, offset), dx(y, offset);
  cuda::launch_relu2_backward24(type_of(T()), device_y.get(), device_dy.get(), count, dx.get(), nullptr);
  std::vector<T> want = y;
  for (int64_t i = 0; i < count; ++i) want[i] = rounded(std::sqrt(number(y[i])) * 2 * number(dy[i]), false, 0, T());
  expect(same(dx.host(), want), "relu2_backward24");
}

template <class T>
void check_type() {
  for (const int offset : {0, 1}) {
    check_soft_mask<T, float>(3, 40, offset);
    check_soft_mask<T, __nv_bfloat16>(2, 37, offset);
    check_soft_mask<T, __half>(5, 6, offset);
    check_gate_to_mask<T>(3, 44, offset);
    check_gate_to_mask<T>(4, 7, offset);
    check_srste<T>(3 * 256 * 8 + 3, offset);
    check_srste<T>(5, offset);
    check_relu2<T>(130, 136, Layout24::plain, offset);
    check_relu2_backward<T>(2053, offset);
  }
  check_soft_mask<T, T>(1, 1, 0);
  check_soft_mask<T, T>(300, 9, 0);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<__nv_bfloat16>();
  check_type<__half>();
  check_relu2<__nv_bfloat16>(70, 200, Layout24::sm80, 0);
  check_relu2<__half>(128, 260, Layout24::sm90, 0);
  check_soft_mask_f64(3, 40);
  check_soft_mask_f64(4, 7);
  return finish("semi24_mask");
}
