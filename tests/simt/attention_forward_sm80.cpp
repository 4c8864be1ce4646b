// The sm_80 forward, thread by thread, against fp64: every head size, predicate, addressing and way to share a mask.
#include "attention_check.h"

int main() {
  using attention_check::Case;
  using slk::DType;
  const auto case_of = [](const char* name, auto change) {
    Case c{name};
    change(c);
    return c;
  };
  const Case cases[] = {
      case_of("bits and bounds, ragged", [](Case& c) { c.sq = 130, c.sk = 200, c.block_m = 128, c.block_n = 128; }),
      case_of("one token", [](Case& c) { c.sq = 1, c.sk = 1, c.density = 1, c.partial = 0; }),
      case_of("64 x 64 blocks, own mask a head",
              [](Case& c) { c.sq = 127, c.sk = 129, c.heads_q = 2, c.heads_kv = 1, c.mask_heads = 2; }),
      case_of("group of three shares a mask of 64 rows",
              [](Case& c) { c.sq = 63, c.sk = 70, c.heads_q = 3, c.block_n = 128, c.dtype = DType::f16; }),
      case_of("decoding: few queries, all heads in a tile",
              [](Case& c) { c.sq = 3, c.sk = 150, c.heads_q = 10, c.heads_kv = 2, c.mask_heads = 2, c.block_m = 128; }),
      case_of("batches, tokens first, softcap",
              [](Case& c) {
                c.batch = 2, c.mask_batch = 2, c.sq = 40, c.sk = 90, c.heads_q = c.heads_kv = c.mask_heads = 2;
                c.tokens_first = true, c.softcap = 3;
              }),
      case_of("token offsets and columns",
              [](Case& c) { c.sq = 70, c.sk = 300, c.token_offsets = c.columns = true, c.scale = -0.1; }),
      case_of("columns only", [](Case& c) { c.sq = 20, c.sk = 150, c.density = 0, c.columns = true; }),
      case_of("corrupt", [](Case& c) { c.sq = 130, c.sk = 150, c.corrupt = c.columns = true; }),
      case_of("all full", [](Case& c) { c.sq = 65, c.sk = 128, c.density = 1, c.partial = 0, c.scale = 0; }),
      case_of("Dk 80", [](Case& c) { c.sq = 33, c.sk = 100, c.dk = 80, c.dv = 72; }),
      case_of("Dk 128",
              [](Case& c) { c.sq = 128, c.sk = 130, c.dk = c.dv = 128, c.block_m = 128, c.dtype = DType::f16; }),
      case_of("Dk 192, Dv 128", [](Case& c) { c.sq = 64, c.sk = 70, c.dk = 192, c.dv = 128; }),
      case_of("Dk 256", [](Case& c) { c.sq = 70, c.sk = 64, c.dk = c.dv = 256, c.block_m = 128, c.columns = true; }),
  };
  bool ok = true;
  for (const Case& c : cases) ok &= attention_check::run_forward(slk::cuda::launch_attention_forward_sm80, c);
  std::printf(ok ? "attention_forward_sm80: ok\n" : "attention_forward_sm80: failed\n");
  return ok ? 0 : 1;
}
