// gemm_sm90 against fp64: ragged edges everywhere, a ring that wraps, blocks that walk over several tiles.
#include "gemm_check.h"

int main() {
  using slk::cuda::launch_gemm_sm90;
  bool ok = gemm_check::refuses("gemm_sm90", launch_gemm_sm90);
  // Tiles are 128 x 256 x 64; the harness' device has two multiprocessors, the ring four stages.
  for (const gemm_check::Size& s : {gemm_check::Size{1, 1, 1}, {200, 264, 392, 8}, {64, 520, 64}, {3, 5, 0}})
    ok &= gemm_check::run("gemm_sm90", launch_gemm_sm90, s);
  if (ok) std::printf("gemm_sm90: ok\n");
  return ok ? 0 : 1;
}
