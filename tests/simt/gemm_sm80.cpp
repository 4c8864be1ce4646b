// gemm's sm_80 kernel, thread by thread, against fp64: whole and ragged tiles, fewer tiles of k than stages and more.
#include "gemm_check.h"

int main() {
  using namespace gemm_check;
  const auto launcher = slk::cuda::launch_gemm_sm80;
  bool ok = refuses("gemm_sm80", launcher);
  for (const Size& size : {Size{128, 256, 32}, Size{1, 1, 1}, Size{3, 10, 0}, Size{67, 201, 77, 8}, Size{130, 264, 72},
                           Size{9, 16, 200, 16}})
    ok &= run("gemm_sm80", launcher, size);
  std::printf(ok ? "gemm_sm80: ok\n" : "gemm_sm80: failed\n");
  return ok ? 0 : 1;
}
