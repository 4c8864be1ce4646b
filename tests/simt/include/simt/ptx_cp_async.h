// Host bodies of slkernels/ptx/cp_async.h. Copies are recorded and arrive only at the wait, as late as the manual lets
// them: who reads earlier finds what was there before. Until then the destination is in use (a race with any access
// that is not ordered before the issue or after the wait); the source is checked at the issue. A thread that ends with
// copies under way is at fault.
#pragma once

#include "simt/device.h"

namespace simt {
void cp_async(void* to, const void* from, int size, int bytes, void* pc);
void cp_async_commit();
void cp_async_wait_group(int still_pending);
void cp_async_wait_all();
}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void cp_async_16(void* to, const void* from, int bytes = 16) {
  simt::cp_async(to, from, 16, bytes, SIMT_HERE);
}
SIMT_NOINLINE void cp_async_8(void* to, const void* from, int bytes = 8) {
  simt::cp_async(to, from, 8, bytes, SIMT_HERE);
}
SIMT_NOINLINE void cp_async_4(void* to, const void* from, int bytes = 4) {
  simt::cp_async(to, from, 4, bytes, SIMT_HERE);
}
inline void commit_group() {
  simt::cp_async_commit();
}
template <int N>
void wait_group() {
  static_assert(N >= 0);
  simt::cp_async_wait_group(N);
}
inline void wait_all() {
  simt::cp_async_wait_all();
}

}  // namespace slk::ptx
