// Host bodies of slkernels/ptx/fence.h.
#pragma once

#include "simt/ptx_mbarrier.h"

namespace slk::ptx {

SIMT_NOINLINE void fence_proxy_async() {
  simt::fence_proxy_async();
  simt::fence_mbarrier_init();  // a proxy fence covers barriers as well
}
SIMT_NOINLINE void fence_mbarrier_init() {
  simt::fence_mbarrier_init();
}

}  // namespace slk::ptx
