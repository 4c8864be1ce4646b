// linear24's sm_80 kernel, thread by thread, against fp64: both tiles, whole and ragged sizes, fewer tiles of m than
// stages and more, both dtypes, every activation.
#include "semi24_check.h"
#include "slkernels/semi24_gemm.h"

using namespace semi24_check;
using slk::Activation24;
using slk::Layout24;
using slk::cuda::Linear24Args;

namespace {

struct Case {
  int64_t n, m, tokens;
  DType type = DType::bf16;
  Activation24 activation = Activation24::none;
  bool bias = true;
  int64_t ld_y = 0;  // n rounded up to 8 if 0
};

double activate(Activation24 activation, double z) {
  switch (activation) {
    case Activation24::none:
      return z;
    case Activation24::relu:
      return std::max(z, 0.0);
    case Activation24::silu:
      return z / (1 + std::exp(-z));
    case Activation24::gelu:
      return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case Activation24::relu2:
      return std::max(z, 0.0) * std::max(z, 0.0);
  }
  return NAN;
}
// A bound of the derivative between z - 1 and z + 1.
double slope(Activation24 activation, double z) {
  return activation == Activation24::relu2 ? 2 * std::fabs(z) + 2 : 1.2;
}

// Values of the kept elements; kept padding columns are zero.
struct Pack {
  simt::Buffer<uint16_t> values, meta;
};
Pack pack(const Matrix& w, const Mask& mask) {
  const int64_t N = slk::padded_rows24(Layout24::sm80, w.rows), M = slk::padded_columns24(Layout24::sm80, w.columns);
  std::vector<uint16_t> values(size_t(N * M / 2), 0);
  for (int64_t i = 0; i < w.rows; ++i)
    for (int64_t g = 0; g < mask.groups; ++g)
      for (int e = 0; e < 2; ++e) {
        const int64_t column = 4 * g + mask.at(i, g)[e];
        if (column < w.columns) values[size_t(i * M / 2 + 2 * g + e)] = w.at(i, column);
      }
  return {simt::Buffer<uint16_t>(values), simt::Buffer<uint16_t>(sm80_meta(mask, N, M))};
}

bool run(const Case& c) {
  std::mt19937 random(unsigned(c.n * 31 + c.m * 7 + c.tokens));
  const Matrix w(c.n, c.m, c.m), x(c.tokens, c.m, aligned_ld(c.m, 8)), bias(1, c.n, c.n);
  const int64_t ld_y = c.ld_y ? c.ld_y : aligned_ld(c.n, 0);
  const simt::Buffer<uint16_t> y(size_t(c.tokens * ld_y));
  fill(c.type, w, random);
  fill(c.type, x, random);
  fill(c.type, bias, random);
  const Mask mask = random_mask(c.n, c.m, random);
  const Pack packed = pack(w, mask);
  const Linear24Args args = {packed.values.get(),
                             packed.meta.get(),
                             x.bits.get(),
                             c.bias ? bias.bits.get() : nullptr,
                             y.get(),
                             c.n,
                             c.m,
                             c.tokens,
                             x.ld,
                             ld_y,
                             c.activation};
  int64_t errors = slk::cuda::launch_linear24_sm80(c.type, args, nullptr) == cudaSuccess ? 0 : -1;
  const std::vector<double> xs = values(c.type, x);
  for (int64_t i = 0; i < c.n && errors >= 0; ++i) {
    std::vector<std::pair<double, int64_t>> kept;  // value and column
    for (int64_t g = 0; g < mask.groups; ++g)
      for (const int e : mask.at(i, g))
        if (4 * g + e < c.m) kept.push_back({value(c.type, w.at(i, 4 * g + e)), 4 * g + e});
    for (int64_t t = 0; t < c.tokens; ++t) {
      double z = c.bias ? value(c.type, bias.at(0, i)) : 0, size = std::fabs(z);
      const double* row = xs.data() + t * c.m;
      for (const auto& [factor, column] : kept) {
        const double term = factor * row[column];
        z += term;
        size += std::fabs(term);
      }
      // The fp32 sums, a few fp32 roundings of the activation, and one rounding to 16 bits.
      const double exact = activate(c.activation, z), sums = size * double(c.m / 2 + 2) * std::ldexp(1, -23);
      const double bound = half_ulp(c.type, exact) * 1.01 + sums * slope(c.activation, z) +
                           (std::fabs(z) + std::fabs(exact)) * std::ldexp(1, -21);
      const double got = value(c.type, y[t * ld_y + i]);
      if (std::fabs(got - exact) <= bound) continue;
      if (errors++ < 5) std::printf("  y[%ld, %ld] = %g, exactly %g\n", long(t), long(i), got, exact);
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t i = c.n; i < ld_y; ++i) errors += y[t * ld_y + i] != 0xffff;
  if (errors)
    std::printf("FAIL n=%ld m=%ld tokens=%ld %s activation %d: %ld errors\n", long(c.n), long(c.m), long(c.tokens),
                name_of(c.type), int(c.activation), long(errors));
  return errors == 0;
}

// What the launcher must refuse before it launches.
bool refuses() {
  alignas(16) static uint16_t memory[64];
  const Linear24Args good = {memory, memory, memory, nullptr, memory, 1, 8, 1, 8, 8, Activation24::none};
  const auto expect = [&](const char* what, cudaError_t error, DType type, auto change) {
    Linear24Args g = good;
    change(g);
    const bool ok = slk::cuda::launch_linear24_sm80(type, g, nullptr) == error;
    if (!ok) std::printf("FAIL %s\n", what);
    return ok;
  };
  bool ok = expect("negative size", cudaErrorInvalidValue, DType::bf16, [](Linear24Args& g) { g.m = -1; });
  ok &= expect("short rows of x", cudaErrorInvalidValue, DType::bf16, [](Linear24Args& g) { g.ld_x = 0; });
  ok &= expect("fp32", cudaErrorInvalidValue, DType::f32, [](Linear24Args&) {});
  ok &= expect("misaligned values", cudaErrorMisalignedAddress, DType::bf16,
               [](Linear24Args& g) { g.values = memory + 4; });
  ok &= expect("misaligned rows of x", cudaErrorMisalignedAddress, DType::bf16, [](Linear24Args& g) { g.ld_x = 12; });
  ok &= expect("no tokens: nothing to do", cudaSuccess, DType::bf16, [](Linear24Args& g) { g.tokens = 0; });
  return ok;
}

}  // namespace

int main() {
  constexpr auto bf16 = DType::bf16, f16 = DType::f16;
  bool ok = refuses();
  // The small tile: tokens <= 64, or few tiles.
  ok &= run({64, 64, 64});
  ok &= run({1, 1, 1, f16});
  ok &= run({3, 2, 5, bf16, Activation24::relu, true, 3});
  ok &= run({5, 0, 3, f16, Activation24::gelu});
  ok &= run({97, 200, 70, f16, Activation24::silu, true, 97});
  ok &= run({130, 643, 33, bf16, Activation24::gelu});
  ok &= run({40, 72, 65, f16, Activation24::relu2, false});
  // The large one: at least 54 tiles.
  ok &= run({256 * 26 + 33, 250, 130, bf16});
  ok &= run({256 * 53 + 224, 20, 70, f16, Activation24::relu2, true, 256 * 53 + 228});
  std::printf(ok ? "semi24_linear_sm80: ok\n" : "semi24_linear_sm80: failed\n");
  return ok ? 0 : 1;
}
