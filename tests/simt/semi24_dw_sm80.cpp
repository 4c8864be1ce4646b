// dw_compress24's sm_80 kernel, thread by thread, against fp64: every layout, whole and ragged tiles, fewer tiles of
// tokens than stages and more, both dtypes.
#include "semi24_check.h"
#include "slkernels/semi24_gemm.h"

using namespace semi24_check;
using slk::Layout24;
using slk::cuda::DwCompress24Args;

namespace {

struct Case {
  int64_t n, m, tokens;
  Layout24 layout;
  DType type = DType::bf16;
};

bool run(const Case& c) {
  std::mt19937 random(unsigned(c.n * 31 + c.m * 7 + c.tokens));
  const Matrix dy(c.tokens, c.n, aligned_ld(c.n, 8)), x(c.tokens, c.m, aligned_ld(c.m, 0));
  fill(c.type, dy, random);
  fill(c.type, x, random);
  const Mask mask = random_mask(c.n, c.m, random);
  const int64_t N = slk::padded_rows24(c.layout, c.n), M = slk::padded_columns24(c.layout, c.m);
  const simt::Buffer<uint8_t> plain(plain_meta(mask));
  const simt::Buffer<uint16_t> packed(c.layout == Layout24::plain  ? std::vector<uint16_t>()
                                      : c.layout == Layout24::sm80 ? sm80_meta(mask, N, M)
                                                                   : sm90_meta(mask, N, M));
  const void* meta = c.layout == Layout24::plain ? static_cast<const void*>(plain.get()) : packed.get();
  const simt::Buffer<uint16_t> out(size_t(N * M / 2));
  const DwCompress24Args args = {dy.bits.get(), x.bits.get(), meta,  out.get(), c.n,
                                 c.m,           c.tokens,     dy.ld, x.ld,      c.layout};
  int64_t errors = slk::cuda::launch_dw_compress24_sm80(c.type, args, nullptr) == cudaSuccess ? 0 : -1;
  const std::vector<double> dys = values(c.type, dy), xs = values(c.type, x);
  for (int64_t i = 0; i < N && errors >= 0; ++i)
    for (int64_t slot = 0; slot < M / 2; ++slot) {
      const int64_t group = slot / 2;
      const bool inside = i < c.n && group < mask.groups;
      const int64_t column = inside ? 4 * group + mask.at(i, group)[slot % 2] : 0;
      double exact = 0, size = 0;
      for (int64_t t = 0; t < c.tokens && inside && column < c.m; ++t) {
        const double term = dys[t * c.n + i] * xs[t * c.m + column];
        exact += term;
        size += std::fabs(term);
      }
      const double bound = half_ulp(c.type, exact) * 1.01 + size * double(c.tokens + 1) * std::ldexp(1, -23);
      const double got = value(c.type, out[i * (M / 2) + slot]);
      if (inside ? std::fabs(got - exact) <= bound : got == 0) continue;
      if (errors++ < 5) std::printf("  values[%ld, %ld] = %g, exactly %g\n", long(i), long(slot), got, exact);
    }
  if (errors)
    std::printf("FAIL n=%ld m=%ld tokens=%ld %s layout %d: %ld errors\n", long(c.n), long(c.m), long(c.tokens),
                name_of(c.type), int(c.layout), long(errors));
  return errors == 0;
}

// What the launcher must refuse before it launches.
bool refuses() {
  alignas(16) static uint16_t memory[64];
  const DwCompress24Args good = {memory, memory, memory, memory, 1, 8, 1, 8, 8, Layout24::plain};
  const auto expect = [&](const char* what, cudaError_t error, DType type, auto change) {
    DwCompress24Args d = good;
    change(d);
    const bool ok = slk::cuda::launch_dw_compress24_sm80(type, d, nullptr) == error;
    if (!ok) std::printf("FAIL %s\n", what);
    return ok;
  };
  bool ok = expect("negative size", cudaErrorInvalidValue, DType::bf16, [](DwCompress24Args& d) { d.n = -1; });
  ok &= expect("short rows of dy", cudaErrorInvalidValue, DType::bf16, [](DwCompress24Args& d) { d.ld_dy = 0; });
  ok &= expect("fp32", cudaErrorInvalidValue, DType::f32, [](DwCompress24Args&) {});
  ok &= expect("misaligned x", cudaErrorMisalignedAddress, DType::f16, [](DwCompress24Args& d) { d.x = memory + 4; });
  ok &= expect("misaligned values", cudaErrorMisalignedAddress, DType::f16,
               [](DwCompress24Args& d) { d.values = memory + 1; });
  ok &= expect("no columns: nothing to do", cudaSuccess, DType::bf16, [](DwCompress24Args& d) { d.m = 0; });
  return ok;
}

}  // namespace

int main() {
  bool ok = refuses();
  for (const Case& c : {Case{128, 256, 32, Layout24::plain}, Case{1, 1, 1, Layout24::plain, DType::f16},
                        Case{3, 10, 0, Layout24::plain}, Case{67, 201, 77, Layout24::plain, DType::f16},
                        Case{130, 270, 200, Layout24::plain}, Case{130, 300, 45, Layout24::sm80, DType::f16},
                        Case{33, 64, 161, Layout24::sm80}, Case{70, 300, 20, Layout24::sm90},
                        Case{193, 128, 33, Layout24::sm90, DType::f16}})
    ok &= run(c);
  std::printf(ok ? "semi24_dw_sm80: ok\n" : "semi24_dw_sm80: failed\n");
  return ok ? 0 : 1;
}
