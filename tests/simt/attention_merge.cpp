// merge_attention_states and its gradient, thread by thread, against slkernels/attention.h's formulas in fp64.
#include "attention_check.h"

namespace {

using attention_check::Errors;
using attention_check::Tensor4;
using slk::DType;

struct Case {
  const char* name;
  int64_t batch, heads, tokens, features;
  DType dtype;
  bool tokens_first, dlse;
};

bool run(const Case& c) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  Errors errors(c.name);
  const auto tensor = [&] {
    Tensor4 t(c.batch, c.heads, c.tokens, c.features, c.tokens_first, c.dtype);
    return t;
  };
  Tensor4 o1 = tensor(), o2 = tensor(), o = tensor(), d_o = tensor(), do1 = tensor(), do2 = tensor();
  for (Tensor4* t : {&o1, &o2, &d_o}) t->fill(random);
  const size_t rows = size_t(c.batch * c.heads * c.tokens);
  simt::Buffer<float> lse1(rows), lse2(rows), lse(rows), dlse(rows), dlse1(rows), dlse2(rows);
  for (size_t i = 0; i < rows; ++i) {
    lse1[i] = i % 5 == 3 ? -INFINITY : 3 * normal(random);  // rows 3, 18, ...: neither state has a key
    lse2[i] = i % 3 == 0 ? -INFINITY : 3 * normal(random);
    dlse[i] = normal(random);
  }
  slk::MergeStates m = {c.batch,    c.heads,    c.tokens,   c.features, c.dtype, o1.get(),  o2.get(),
                        lse1.get(), lse2.get(), o1.strides, o2.strides, o.get(), lse.get(), o.strides};
  const slk::MergeStatesBackward g = {m,           d_o.get(),   c.dlse ? dlse.get() : nullptr,
                                      d_o.strides, do1.get(),   do2.get(),
                                      dlse1.get(), dlse2.get(), do1.strides,
                                      do2.strides};
  if (slk::cuda::launch_merge_attention_states(m, nullptr) != cudaSuccess ||
      slk::cuda::launch_merge_attention_states_backward(g, nullptr) != cudaSuccess) {
    std::printf("FAIL %s: launch\n", c.name);
    return false;
  }
  const double rounding = c.dtype == DType::bf16 ? std::ldexp(1, -8) : std::ldexp(1, -11);
  size_t row = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.tokens; ++i, ++row) {
        const double l1 = lse1[row], l2 = lse2[row], top = std::max(l1, l2);
        const double want = top == -INFINITY ? top : top + std::log(std::exp(l1 - top) + std::exp(l2 - top));
        const double w1 = top == -INFINITY ? 0 : std::exp(l1 - want), w2 = top == -INFINITY ? 0 : std::exp(l2 - want);
        errors.expect("lse", b, h, i, 0, double(lse[row]), want, 1e-6 * (1 + std::fabs(want)));
        double dot = 0, size = 0;
        for (int64_t d = 0; d < c.features; ++d) {
          const double x = o1(b, h, i, d), y = o2(b, h, i, d), z = d_o(b, h, i, d), sum = w1 * x + w2 * y;
          errors.expect("o", b, h, i, d, o(b, h, i, d), sum, rounding * (std::fabs(sum) + 1e-3) * 1.01);
          errors.expect("do1", b, h, i, d, do1(b, h, i, d), w1 * z, rounding * std::fabs(w1 * z) * 1.01 + 1e-7);
          errors.expect("do2", b, h, i, d, do2(b, h, i, d), w2 * z, rounding * std::fabs(w2 * z) * 1.01 + 1e-7);
          dot += z * (x - y);
          size += std::fabs(z) * (std::fabs(x) + std::fabs(y));
        }
        const double dl = c.dlse ? dlse[row] : 0;
        errors.expect("dlse1", b, h, i, 0, double(dlse1[row]), w1 * (dl + w2 * dot), 1e-6 * (1 + size));
        errors.expect("dlse2", b, h, i, 0, double(dlse2[row]), w2 * (dl - w1 * dot), 1e-6 * (1 + size));
      }
  for (const auto* t : {&o, &do1, &do2}) errors.expect_gaps("results", *t);
  return errors.none();
}

}  // namespace

int main() {
  const Case cases[] = {
      {"one element", 1, 1, 1, 1, DType::bf16, false, true},
      {"vectors, tokens first", 2, 3, 37, 64, DType::bf16, true, true},
      {"many rows, f16", 1, 2, 300, 128, DType::f16, false, false},
      {"ragged features", 1, 2, 33, 37, DType::bf16, false, true},
      {"wide", 1, 1, 5, 400, DType::f16, false, true},
      {"no features", 1, 1, 5, 0, DType::bf16, false, true},
  };
  bool ok = true;
  for (const Case& c : cases) ok &= run(c);
  std::printf(ok ? "attention_merge: ok\n" : "attention_merge: failed\n");
  return ok ? 0 : 1;
}
