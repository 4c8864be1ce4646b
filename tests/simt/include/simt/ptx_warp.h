// Host bodies of slkernels/ptx/warp.h.
#pragma once

#include "simt/device.h"

namespace slk::ptx {

// Which lane is elected is the hardware's choice: the first, the last or any other, by the schedule.
SIMT_NOINLINE bool elect_one() {
  bool elected = false;
  simt::warp_collective(
      "elect.sync", 0xffffffffu, &elected,
      [](void* const* lanes, uint32_t) {
        const simt::Options& o = simt::options();
        const int lane = o.schedule == simt::Schedule::forward   ? 0
                         : o.schedule == simt::Schedule::reverse ? 31
                                                                 : int(o.seed % 32);
        *static_cast<bool*>(lanes[lane]) = true;
      },
      false, SIMT_HERE);
  return elected;
}

// There are no registers to move; all lanes must come, as the .aligned form asks.
template <int kRegisters>
SIMT_NOINLINE void register_dealloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simt::warp_collective("setmaxnreg.dec", 0xffffffffu, nullptr, [](void* const*, uint32_t) {}, false, SIMT_HERE);
}
template <int kRegisters>
SIMT_NOINLINE void register_alloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simt::warp_collective("setmaxnreg.inc", 0xffffffffu, nullptr, [](void* const*, uint32_t) {}, false, SIMT_HERE);
}

SIMT_NOINLINE void named_barrier_sync(int id, int threads) {
  simt::named_barrier(id, threads, true, SIMT_HERE);
}
SIMT_NOINLINE void named_barrier_arrive(int id, int threads) {
  simt::named_barrier(id, threads, false, SIMT_HERE);
}

}  // namespace slk::ptx
