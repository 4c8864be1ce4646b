// Quantized weights of family `project` on the GPU's kernels, thread by thread, against the contract written out.
#include <cuda_runtime.h>

#include <algorithm>

#include "project_check.h"
#include "simt/runtime.h"

using namespace slk;
using namespace project_check;

namespace {

struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<uint8_t> zero;
};

GroupCodes view(Quantized& q, int64_t m, int64_t group, int bits) {
  return {q.codes.data(), q.scale.data(), q.zero.data(), m, group, bits};
}

Quantized empty(int64_t n, int64_t m, int64_t group, int bits) {
  Quantized q;
  const GroupCodes shape = view(q, m, group, bits);
  q.codes.resize(n * shape.row_bytes());
  q.scale.resize(n * shape.groups());
  q.zero.resize(n * shape.groups());
  return q;
}

// The contract of project_quant.h, element by element.
Quantized quantize(const std::vector<float>& x, int64_t n, int64_t m, int64_t group, int bits,
                   const RoundingBits* rng) {
  Quantized q = empty(n, m, group, bits);
  const GroupCodes shape = view(q, m, group, bits);
  const float top = float((1 << bits) - 1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < shape.groups(); ++g) {
      float hi = 0, lo = 0;
      bool finite = true;
      const int64_t end = std::min(m, (g + 1) * group);
      for (int64_t j = g * group; j < end; ++j) {
        hi = std::max(hi, x[i * m + j]);
        lo = std::min(lo, x[i * m + j]);
        finite = finite && std::isfinite(x[i * m + j]);
      }
      const float scale = (hi - lo) / top;
      finite = finite && std::isfinite(scale);
      const float zero = finite && scale > 0 ? std::min(std::nearbyint(-lo / scale), top) : 0;
      for (int64_t j = g * group; j < end; ++j) {
        float code = 0;
        if (finite && scale > 0) {
          const float y = x[i * m + j] / scale;
          const float r =
              rng ? std::floor(y) + (y - std::floor(y) > (*rng)(0, i * m + j) / 65536.0f) : std::nearbyint(y);
          code = std::min(std::max(r + zero, 0.0f), top);
        }
        uint8_t& at = q.codes[i * shape.row_bytes() + (bits == 8 ? j : j / 2)];
        at = uint8_t(bits == 8 ? int(code) : at | int(code) << (j % 2 ? 0 : 4));
      }
      q.scale[i * shape.groups() + g] = finite ? scale : NAN;
      q.zero[i * shape.groups() + g] = uint8_t(zero);
    }
  return q;
}

float decode(const Quantized& q, int64_t i, int64_t j, const GroupCodes& shape) {
  const uint8_t byte = q.codes[i * shape.row_bytes() + (shape.bits == 8 ? j : j / 2)];
  const int code = shape.bits == 8 ? byte : j % 2 ? byte & 15 : byte >> 4;
  const int64_t slot = i * shape.groups() + j / shape.group;
  return float(code - q.zero[slot]) * q.scale[slot];
}

// A Quantized in device memory.
struct Device {
  simt::Buffer<uint8_t> codes;
  simt::Buffer<float> scale;
  simt::Buffer<uint8_t> zero;
  int64_t m, group;
  int bits;
  Device(const Quantized& q, int64_t m, int64_t group, int bits)
      : codes(q.codes), scale(q.scale), zero(q.zero), m(m), group(group), bits(bits) {}
  GroupCodes view() { return {codes.get(), scale.get(), zero.get(), m, group, bits}; }
  bool equals(const Quantized& q) {
    const std::vector<float> scales = scale.host();
    bool ok = codes.host() == q.codes && zero.host() == q.zero;
    for (size_t i = 0; i < scales.size(); ++i)
      ok = ok && (scales[i] == q.scale[i] || (scales[i] != scales[i] && q.scale[i] != q.scale[i]));
    return ok;
  }
};

template <class T>
void check_codes(int64_t n, int64_t m, int64_t group, int bits) {
  std::vector<T> w = draw<T>(n * m, 1);
  if (n > 2) {  // a group of zeros, one of one sign, one that is broken
    for (int64_t j = 0; j < m; ++j) w[j] = rounded(0.0f, false, 0, T());
    for (int64_t j = 0; j < m; ++j) w[m + j] = rounded(1.0f + std::fabs(number(w[m + j])), false, 0, T());
    w[2 * m] = rounded(NAN, false, 0, T());
  }
  std::vector<float> x(w.size());
  for (size_t i = 0; i < w.size(); ++i) x[i] = number(w[i]);
  const simt::Buffer<T> device_w(w);
  const simt::Buffer<int64_t> rng(std::vector<int64_t>{5, 9});
  const RoundingBits bits16 = {5, 9};
  for (const bool stochastic : {false, true}) {
    Quantized want = quantize(x, n, m, group, bits, stochastic ? &bits16 : nullptr);
    Device got(empty(n, m, group, bits), m, group, bits);
    cuda::launch_quantize_group(type_of(T()), device_w.get(), got.view(), n, {stochastic ? rng.get() : nullptr},
                                nullptr);
    expect(got.equals(want), stochastic ? "stochastic codes" : "codes");

    const Range rows = {n / 2, n}, columns = {m > group ? group : 0, m};
    simt::Buffer<T> out(rows.size() * (columns.size() + 1));
    cuda::launch_dequantize_group(got.view(), rows, columns, type_of(T()), out.get(), columns.size() + 1, nullptr);
    const std::vector<T> read = out.host();
    const GroupCodes shape = view(want, m, group, bits);
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        const T expected = rounded(decode(want, i, j, shape), false, 0, T());
        const T at = read[(i - rows.begin) * (columns.size() + 1) + j - columns.begin];
        expect(same_bits(at, expected) || (number(at) != number(at) && number(expected) != number(expected)),
               "decoded");
      }
  }
}

template <class TT>
void check_update_q(int64_t n, int64_t m, int64_t group, bool stochastic) {
  const std::vector<float> start = draw<float>(n * m, 1);
  Quantized q = quantize(start, n, m, group, 8, nullptr);
  const std::vector<TT> t = draw<TT>(n * m, 2);
  const simt::Buffer<TT> device_t(t);
  const simt::Buffer<float> lr(std::vector<float>{0.2f}), yes(std::vector<float>{1.0f});
  const simt::Buffer<int64_t> rng(std::vector<int64_t>{5, 9});
  UpdateOperands operands = {device_t.get(), type_of(TT()), m, 0, nullptr, DType::f32, 0, nullptr, FactorOf::all};
  Device got(q, m, group, 8);
  cuda::DeviceUpdate update = {lr.get(), yes.get(), 0.5f, 0.1f, {stochastic ? rng.get() : nullptr}};
  cuda::launch_update_q(got.view(), {0, n}, operands, update, nullptr);
  expect(got.equals(q), "found_inf leaves codes");
  update.found_inf = nullptr;
  cuda::launch_update_q(got.view(), {0, n}, operands, update, nullptr);

  const UpdateScalars scalars = UpdateScalars::of(0.2f, 0.5f, 0.1f);
  const GroupCodes shape = view(q, m, group, 8);
  std::vector<float> x(n * m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      x[i * m + j] = std::fma(scalars.step, number(t[i * m + j]), decode(q, i, j, shape) * scalars.decay);
  const RoundingBits bits = {5, 9};
  expect(got.equals(quantize(x, n, m, group, 8, stochastic ? &bits : nullptr)), "update_q");
}

template <class T>
void check_linear(int64_t tokens, int64_t n, int64_t m, int64_t group, bool with_bias) {
  Quantized q = quantize(draw<float>(n * m, 1), n, m, group, 8, nullptr);
  const std::vector<T> x = draw<T>(tokens * m, 2), bias = draw<T>(n, 3);
  Device device(q, m, group, 8);
  const simt::Buffer<T> device_x(x), device_bias(bias);
  simt::Buffer<T> y(tokens * n);
  cuda::launch_linear_q(type_of(T()), device.view(), device_x.get(), tokens, n, with_bias ? device_bias.get() : nullptr,
                        y.get(), nullptr);
  const std::vector<T> got = y.host();
  const GroupCodes shape = view(q, m, group, 8);
  const double ulp = sizeof(T) == 4 ? 0x1p-24 : type_of(T()) == DType::bf16 ? 0x1p-8 : 0x1p-11;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; ++i) {
      double want = with_bias ? number(bias[i]) : 0, size = std::fabs(want);
      for (int64_t j = 0; j < m; ++j) {
        const double term = double(decode(q, i, j, shape)) * number(x[t * m + j]);
        want += term;
        size += std::fabs(term);
      }
      expect(std::fabs(number(got[t * n + i]) - want) <= 1.01 * ulp * std::fabs(want) + 1e-6 * size + 1e-7, "linear");
    }
}

}  // namespace

int main() {
  for (const int bits : {4, 8}) {
    check_codes<float>(4, 40, 16, bits);
    check_codes<__nv_bfloat16>(3, 67, 32, bits);
    check_codes<__half>(2, 600, 256, bits);
    check_codes<float>(1, 1, 16, bits);
    check_codes<float>(2, 1000, 512, bits);
  }
  for (const bool stochastic : {false, true}) {
    check_update_q<float>(3, 48, 16, stochastic);
    check_update_q<__nv_bfloat16>(3, 67, 32, stochastic);
    check_update_q<__half>(2, 600, 512, stochastic);
  }
  check_linear<float>(1, 11, 40, 16, false);
  check_linear<__nv_bfloat16>(3, 9, 300, 256, true);
  check_linear<__half>(16, 5, 77, 32, true);
  check_linear<float>(7, 70, 16, 16, true);
  return finish("project_quant");
}
