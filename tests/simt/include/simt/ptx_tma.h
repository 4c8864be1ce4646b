// Host bodies of slkernels/ptx/tma.h. What is checked, and when a copy happens: runtime/ptx_tma.cpp.
#pragma once

#include <cuda.h>

#include "simt/device.h"

namespace simt {

struct TileAt {
  int dimensions, x, y, z, w = 0;
};
void tma_prefetch(const CUtensorMap* map, void* pc);
void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, TileAt at, void* pc);
void tma_store(const CUtensorMap* map, const void* from, TileAt at, void* pc);
void tma_store_commit();
void tma_store_wait(size_t pending, bool read_only);

}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void tma_prefetch(const CUtensorMap* map) {
  simt::tma_prefetch(map, SIMT_HERE);
}
SIMT_NOINLINE void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  simt::tma_load(to, map, bar, {2, x, y, 0}, SIMT_HERE);
}
SIMT_NOINLINE void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
  simt::tma_load(to, map, bar, {3, x, y, z}, SIMT_HERE);
}
SIMT_NOINLINE void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z, int w) {
  simt::tma_load(to, map, bar, {4, x, y, z, w}, SIMT_HERE);
}
SIMT_NOINLINE void tma_store_2d(const CUtensorMap* map, const void* from, int x, int y) {
  simt::tma_store(map, from, {2, x, y, 0}, SIMT_HERE);
}
SIMT_NOINLINE void tma_store_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  simt::tma_store(map, from, {3, x, y, z}, SIMT_HERE);
}
SIMT_NOINLINE void tma_store_commit() {
  simt::tma_store_commit();
}
template <int kPending>
SIMT_NOINLINE void tma_store_wait_read() {
  simt::tma_store_wait(kPending, true);
}
template <int kPending>
SIMT_NOINLINE void tma_store_wait() {
  simt::tma_store_wait(kPending, false);
}

}  // namespace slk::ptx
