// What threads do to memory: bounds, alignment, shared memory that was never written, and races by vector clocks.
#include <link.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "internal.h"

namespace simt {
namespace {

struct Region {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t a, size_t bytes) const { return a >= begin && a + bytes <= end; }
  bool touches(uintptr_t a, size_t bytes) const { return a < end && a + bytes > begin; }
};

// One byte of shared memory: who wrote it last and when, and who has read it since.
struct Shadow {
  uint32_t write_clock = 0;
  int16_t writer = -1;
  bool written = false, by_async = false, atomic = false;
  void* pc = nullptr;
  struct Read {
    int16_t thread;
    bool by_async;
    uint32_t clock;
    void* pc;
  };
  std::vector<Read> reads;
};

constexpr size_t kMaxDynamicShared = 227 << 10;  // sm_90's limit a block
constexpr size_t kAlign = 1024;                  // what 128-byte swizzled TMA tiles ask for
constexpr unsigned char kPoison = 0xff;

alignas(kAlign) unsigned char dynamic_memory[kMaxDynamicShared];
size_t dynamic_bytes_now = 0;
Region stack_now, static_shared, module;
std::vector<Shadow> static_shadow, dynamic_shadow;
std::map<uintptr_t, size_t> buffers;  // device_malloc's, by begin

int find_module(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_name && info->dlpi_name[0]) return 0;  // the main program comes with an empty name
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& p = info->dlpi_phdr[i];
    if (p.p_type == PT_TLS && info->dlpi_tls_data) {
      const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      static_shared = {begin, begin + p.p_memsz};
    }
    if (p.p_type == PT_LOAD) {
      const uintptr_t begin = info->dlpi_addr + p.p_vaddr, end = begin + p.p_memsz;
      if (!module.begin || begin < module.begin) module.begin = begin;
      if (end > module.end) module.end = end;
    }
  }
  return 1;
}

std::string hex(const void* p) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", p);
  return text;
}

std::string name_shared(uintptr_t a) {
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  if (a >= dynamic && a < dynamic + kMaxDynamicShared) return "dynamic shared memory + " + std::to_string(a - dynamic);
  return "static shared memory + " + std::to_string(a - static_shared.begin);
}

bool happens_before(int thread, uint32_t clock) {
  return thread == running->view.linear || running->clock.at[thread] >= clock;
}
// For the async proxy, a generic access counts only once a fence.proxy.async has covered it.
bool fenced_before(int thread, uint32_t clock) {
  return running->clock.fenced_at[thread] >= clock;
}

void check_byte(Shadow& s, uintptr_t a, bool write, bool atomic, Proxy proxy, void* pc) {
  const int self = running->view.linear;
  const bool async = proxy == Proxy::async;
  const auto conflict = [&](const char* what, int other, void* other_pc) {
    fault(std::string("race on ") + name_shared(a) + ": " + what + " thread " + std::to_string(other) +
              where(other_pc) + " is not ordered before this " + (write ? "write" : "read"),
          pc);
  };
  const auto unfenced = [&](const char* what, int other, void* other_pc) {
    fault(std::string("missing fence.proxy.async on ") + name_shared(a) + ": " + what + " thread " +
              std::to_string(other) + where(other_pc) +
              " through the generic proxy is not visible to this asynchronous " + (write ? "write" : "read"),
          pc);
  };
  if (s.written && !(atomic && s.atomic)) {
    if (!happens_before(s.writer, s.write_clock)) conflict("the write of", s.writer, s.pc);
    if (async && !s.by_async && !fenced_before(s.writer, s.write_clock)) unfenced("the write of", s.writer, s.pc);
  }
  if (write) {
    for (const Shadow::Read& r : s.reads)
      if (!happens_before(r.thread, r.clock)) conflict("the read of", r.thread, r.pc);
    s.reads.clear();
    s.written = true;
    s.writer = int16_t(self);
    s.write_clock = running->clock.at[self];
    s.by_async = async;
    s.atomic = atomic;
    s.pc = pc;
    return;
  }
  if (!s.written) fault("read of " + name_shared(a) + ", which nobody has written", pc);
  for (Shadow::Read& r : s.reads)
    if (r.thread == self) {
      r = {int16_t(self), async, running->clock.at[self], pc};
      return;
    }
  s.reads.push_back({int16_t(self), async, running->clock.at[self], pc});
}

void check_access(const void* address, size_t bytes, bool write, bool atomic, Proxy proxy, void* pc) {
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (stack_now.holds(a, bytes)) return;
  const bool in_static = static_shared.holds(a, bytes);
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  const Region dynamic_region = {dynamic, dynamic + dynamic_bytes_now};
  if (in_static || dynamic_region.holds(a, bytes)) {
    Shadow* shadow = in_static ? &static_shadow[a - static_shared.begin] : &dynamic_shadow[a - dynamic];
    for (size_t i = 0; i < bytes; ++i) check_byte(shadow[i], a + i, write, atomic, proxy, pc);
    return;
  }
  if (a >= dynamic && a < dynamic + kMaxDynamicShared)
    fault(std::string(write ? "write" : "read") + " past the " + std::to_string(dynamic_bytes_now) +
              " bytes of dynamic shared memory: " + name_shared(a),
          pc);
  auto it = buffers.upper_bound(a);
  if (it != buffers.begin()) {
    --it;
    if (a + bytes <= it->first + it->second) return;
  }
  if (module.holds(a, bytes)) return;  // constants
  std::string text = std::string(write ? "write" : "read") + " of " + std::to_string(bytes) +
                     " bytes out of bounds at " + hex(address);
  if (it != buffers.end() && a >= it->first && a < it->first + it->second + (1 << 20))
    text += ", " + std::to_string(a - it->first) + " bytes into a buffer of " + std::to_string(it->second);
  fault(text, pc);
}

}  // namespace

void begin_block(size_t dynamic_bytes) {
  if (!module.begin) dl_iterate_phdr(find_module, nullptr);
  if (dynamic_bytes > kMaxDynamicShared)
    fault("launch with " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory; " +
          std::to_string(kMaxDynamicShared) + " are possible");
  dynamic_bytes_now = dynamic_bytes;
  std::memset(dynamic_memory, kPoison, sizeof dynamic_memory);
  static_shadow.assign(static_shared.end - static_shared.begin, {});
  dynamic_shadow.assign(dynamic_bytes, {});
  if (static_shared.begin) std::memset(reinterpret_cast<void*>(static_shared.begin), kPoison, static_shadow.size());
}

void set_stack(const void* low, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(low);
  stack_now = {begin, begin + bytes};
}

void* dynamic_shared() {
  return dynamic_memory;
}
size_t dynamic_shared_bytes() {
  return dynamic_bytes_now;
}

bool is_shared(const void* address, size_t bytes) {
  const auto a = reinterpret_cast<uintptr_t>(address), dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  return static_shared.holds(a, bytes) || (a >= dynamic && a + bytes <= dynamic + dynamic_bytes_now);
}

void* device_malloc(size_t bytes) {
  // 256-byte alignment as cudaMalloc's; a gap behind every buffer, so that a step outside meets no other buffer.
  constexpr size_t kGap = 4096;
  void* p = std::aligned_alloc(256, (bytes + kGap + 255) / 256 * 256);
  std::memset(p, kPoison, bytes);
  buffers[reinterpret_cast<uintptr_t>(p)] = bytes;
  return p;
}
void device_free(void* p) {
  buffers.erase(reinterpret_cast<uintptr_t>(p));
  std::free(p);
}

void access(const void* address, size_t bytes, bool write, void* pc, Proxy proxy) {
  if (!running || muted) return;
  check_access(address, bytes, write, false, proxy, pc);
}

void atomic_access(const void* address, size_t bytes, void* pc) {
  if (!running || muted) return;
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fault("misaligned atomic of " + std::to_string(bytes) + " bytes at " + hex(address), pc);
  if (is_shared(address, bytes)) check_access(address, bytes, false, true, Proxy::generic, pc);
  check_access(address, bytes, true, true, Proxy::generic, pc);
}

}  // namespace simt
