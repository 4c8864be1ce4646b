// attention_colstats' kernels, thread by thread, against fp64: every way to list keys, ranges of queries, a known and
// an unknown lse, work cut into parts and splits.
#include <type_traits>

#include "attention_check.h"

namespace {

using attention_check::Case;
using attention_check::Errors;
using attention_check::Problem;
using slk::ceil_div;
using slk::DType;
using Sums = std::vector<double>;

struct ColStatsCase : Case {
  int64_t row_begin = 0, row_end = -1, parts = 1, splits = 1;
  bool known_lse = false;
  int plain = -1;  // 0 dense, 1 causal: launch_plain_mask's lists in place of random ones
};

bool run(const ColStatsCase& c) {
  Problem p(c);
  Errors errors(c.name);
  const int64_t heads = c.batch * c.heads_q, end = c.row_end < 0 ? c.sq : c.row_end;
  const int64_t blocks = ceil_div(c.sq, c.block_m), key_blocks = ceil_div(c.sk, c.block_n), runs = c.parts * c.splits;
  const auto buffer = [](int64_t n, float value) {
    auto made = std::make_unique<simt::Buffer<float>>(size_t(n));
    std::fill(made->get(), made->get() + n, value);
    return made;
  };
  const auto part_sum = buffer(heads * runs * c.sk, 0), part_max = buffer(heads * runs * c.sk, 0),
             part_diagonal = buffer(heads * runs * (c.sk + c.sq - 1), 0),
             part_blocks = buffer(heads * c.splits * blocks * key_blocks, 0);
  const auto partial_lse = buffer(2 * heads * c.sq * c.splits, NAN), sum = buffer(heads * c.sk, NAN),
             top = buffer(heads * c.sk, NAN), diagonal = buffer(heads * c.sk, NAN),
             block_sum = buffer(heads * blocks * key_blocks, NAN);

  slk::cuda::ColStatsLaunch launch = {};
  launch.stats.forward = p.forward();
  launch.stats.forward.v = launch.stats.forward.o = nullptr;
  launch.stats.forward.shape.dv = 0;
  simt::Buffer<int32_t> lists(size_t(3 * blocks + key_blocks + c.sq));
  if (c.plain >= 0) {
    int32_t* first = lists.get();
    const slk::cuda::PlainMask to = {first, first + blocks, first + 2 * blocks, first + 3 * blocks,
                                     first + 3 * blocks + key_blocks};
    if (slk::cuda::launch_plain_mask(launch.stats.forward.shape, c.plain == 1, c.block_m, c.block_n, to, nullptr))
      return false;
    slk::BlockRows mask = {};
    mask.rows = {to.ptr, to.cnt, to.nmask, to.idx, nullptr, key_blocks, blocks};
    mask.batches = mask.heads = 1;
    mask.block_m = c.block_m, mask.block_n = mask.unit = c.block_n;
    mask.hi = c.plain == 1 ? to.hi : nullptr;
    launch.stats.forward.mask = mask;
    p.layout.keep.assign(size_t(c.sq * c.sk), true);
    for (int64_t i = 0; c.plain == 1 && i < c.sq; ++i)
      for (int64_t j = std::max<int64_t>(0, i + 1 + c.sk - c.sq); j < c.sk; ++j) p.layout.keep[i * c.sk + j] = false;
  }

  Sums want_sum(sum->size()), want_max(sum->size()), want_diagonal(sum->size()), want_block(block_sum->size());
  Sums s, slope;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < c.sq; ++i) {
      p.logits(h / c.heads_q, h % c.heads_q, i, s, slope);
      const double lse = Problem::log_sum(s);
      p.lse[h * c.sq + i] = float(lse);
      if (i < c.row_begin || i >= end) continue;
      for (int64_t j = 0; j < c.sk; ++j) {
        if (s[j] == -INFINITY) continue;
        const double x = std::exp(s[j] - lse);
        want_sum[h * c.sk + j] += x;
        want_max[h * c.sk + j] = std::max(want_max[h * c.sk + j], x);
        const int64_t distance = i + c.sk - c.sq - j;
        if (distance >= 0 && distance < c.sk) want_diagonal[h * c.sk + distance] += x;
        want_block[(h * blocks + i / c.block_m) * key_blocks + j / c.block_n] += x;
      }
    }

  launch.stats.forward.lse = c.known_lse ? p.lse.get() : nullptr;
  launch.stats.queries = {c.row_begin, end};
  launch.stats.parts = c.parts;
  launch.stats.col_sum = part_sum->get(), launch.stats.col_max = part_max->get();
  launch.stats.diagonal = part_diagonal->get(), launch.stats.block_sum = part_blocks->get();
  launch.splits = c.splits;
  launch.partial_lse = c.known_lse ? nullptr : partial_lse->get();
  launch.col_sum = sum->get(), launch.col_max = top->get(), launch.diag_sum = diagonal->get();
  launch.block_sum = block_sum->get();
  const cudaError_t error = slk::cuda::launch_attention_colstats(launch, nullptr);
  if (error != cudaSuccess) {
    std::printf("FAIL %s: error %d\n", c.name, int(error));
    return false;
  }
  // q and k are exact in fp32; a logit is off by some of its terms' roundings, p by as much relatively.
  const auto compare = [&](const char* what, const simt::Buffer<float>& got, const Sums& want) {
    for (size_t i = 0; i < want.size(); ++i)
      errors.expect(what, 0, 0, 0, int64_t(i), double(got[i]), want[i], 2e-5 * want[i] + 1e-30);
  };
  compare("col_sum", *sum, want_sum);
  compare("col_max", *top, want_max);
  compare("diag_sum", *diagonal, want_diagonal);
  compare("block_sum", *block_sum, want_block);
  return errors.none();
}

}  // namespace

int main() {
  const auto case_of = [](const char* name, auto change) {
    ColStatsCase c;
    c.name = name;
    change(c);
    return c;
  };
  const ColStatsCase cases[] = {
      case_of("causal, last queries, splits",
              [](ColStatsCase& c) { c.plain = 1, c.sq = 40, c.sk = 300, c.splits = 3, c.heads_q = 2; }),
      case_of("causal, more queries than keys",
              [](ColStatsCase& c) { c.plain = 1, c.sq = 150, c.sk = 70, c.parts = 2; }),
      case_of("dense, 128 x 128, a range of queries",
              [](ColStatsCase& c) {
                c.plain = 0, c.sq = 300, c.sk = 130, c.block_m = c.block_n = 128, c.row_begin = 70, c.row_end = 200;
                c.parts = 2, c.dtype = DType::f16;
              }),
      case_of("bits and bounds, known lse",
              [](ColStatsCase& c) {
                c.sq = 130, c.sk = 200, c.block_m = 128, c.known_lse = true, c.heads_q = 4, c.heads_kv = 2;
                c.mask_heads = 2;
              }),
      case_of("token offsets and columns, softcap",
              [](ColStatsCase& c) {
                c.sq = 70, c.sk = 300, c.token_offsets = c.columns = true, c.softcap = 2, c.splits = 2;
              }),
      case_of("columns only", [](ColStatsCase& c) { c.sq = 20, c.sk = 150, c.density = 0, c.columns = true; }),
      case_of("corrupt", [](ColStatsCase& c) { c.sq = 130, c.sk = 150, c.corrupt = c.columns = true; }),
      case_of("batches, Dk 128, scale < 0",
              [](ColStatsCase& c) {
                c.batch = 2, c.sq = 33, c.sk = 90, c.dk = 120, c.block_n = 128, c.scale = -0.1, c.tokens_first = true;
              }),
      case_of("Dk 256, scale 0, 32 keys", [](ColStatsCase& c) { c.sq = 65, c.sk = 100, c.dk = 200, c.scale = 0; }),
  };
  bool ok = true;
  for (const ColStatsCase& c : cases) ok &= run(c);
  std::printf(ok ? "attention_colstats: ok\n" : "attention_colstats: failed\n");
  return ok ? 0 : 1;
}
