// The entry points that -fsanitize=thread makes the compiler call for every access of the kernels' translation units.
// libtsan is not linked: these are all there is.
#include "internal.h"

namespace {

void aligned(const void* p, size_t bytes, bool write, void* pc) {
  if (!simt::running || simt::muted) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    simt::fault("misaligned access of " + std::to_string(bytes) + " bytes: address ends in " +
                    std::to_string(reinterpret_cast<uintptr_t>(p) % 256) + " (mod 256)",
                pc);
  simt::access(p, bytes, write, pc);
}

}  // namespace

#define SIMT_HOOK(size)                                            \
  extern "C" void __tsan_read##size(void* p) {                     \
    aligned(p, size, false, __builtin_return_address(0));          \
  }                                                                \
  extern "C" void __tsan_write##size(void* p) {                    \
    aligned(p, size, true, __builtin_return_address(0));           \
  }                                                                \
  extern "C" void __tsan_volatile_read##size(void* p) {            \
    aligned(p, size, false, __builtin_return_address(0));          \
  }                                                                \
  extern "C" void __tsan_volatile_write##size(void* p) {           \
    aligned(p, size, true, __builtin_return_address(0));           \
  }                                                                \
  extern "C" void __tsan_unaligned_read##size(void* p) {           \
    simt::access(p, size, false, __builtin_return_address(0));     \
  }                                                                \
  extern "C" void __tsan_unaligned_write##size(void* p) {          \
    simt::access(p, size, true, __builtin_return_address(0));      \
  }                                                                \
  extern "C" void __tsan_unaligned_volatile_read##size(void* p) {  \
    simt::access(p, size, false, __builtin_return_address(0));     \
  }                                                                \
  extern "C" void __tsan_unaligned_volatile_write##size(void* p) { \
    simt::access(p, size, true, __builtin_return_address(0));      \
  }

SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t n) {
  simt::access(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  simt::access(p, n, true, __builtin_return_address(0));
}
}
