// What threads do to memory: bounds, alignment, shared memory that was never written, and races by vector clocks.
#include <link.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>

#include "internal.h"

namespace simt {
namespace {

struct Region {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t a, size_t bytes) const { return a >= begin && a + bytes <= end; }
  bool touches(uintptr_t a, size_t bytes) const { return a < end && a + bytes > begin; }
};

// One byte of shared memory: its last write, and the set of reads and atomics since.
struct Cell {
  void* pc = nullptr;
  Stamp writer;
  uint32_t since = 0;  // index into `sets`
  bool written = false, by_async = false;
  char padding[6] = {};  // cells are compared as bytes
};
static_assert(std::has_unique_object_representations_v<Cell>);

struct Use {
  Stamp by;
  bool by_async, atomic;
  void* pc;
};

// Sets of uses are shared by the cells that were used alike, and never change: adding a use gives another set.
std::vector<std::vector<Use>> sets;
std::map<std::tuple<uint32_t, uint32_t, uint32_t, int32_t, bool, bool>, uint32_t> larger_sets;

uint32_t with_use(uint32_t set, const Use& use) {
  const auto key = std::make_tuple(set, use.by.epoch, use.by.time, use.by.who, use.by_async, use.atomic);
  const auto [it, fresh] = larger_sets.try_emplace(key, uint32_t(sets.size()));
  if (!fresh) return it->second;
  std::vector<Use> next;
  next.reserve(sets[set].size() + 1);
  for (const Use& u : sets[set])  // of a thread's uses of one kind, the last one says all
    if (u.by.who != use.by.who || (u.by.epoch == kAgent) != (use.by.epoch == kAgent) || u.by_async != use.by_async ||
        u.atomic != use.atomic)
      next.push_back(u);
  next.push_back(use);
  sets.push_back(std::move(next));
  return it->second;
}

constexpr size_t kMaxDynamicShared = 227 << 10;  // sm_90's limit a block
constexpr size_t kAlign = 1024;                  // what 128-byte swizzled TMA tiles ask for
constexpr unsigned char kPoison = 0xff;

alignas(kAlign) unsigned char dynamic_memory[kMaxDynamicShared];
size_t dynamic_bytes_now = 0;
Region stack_now, static_shared, module;
std::vector<Cell> static_shadow, dynamic_shadow;
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

enum class Access { read, write, atomic };

void check_cell(Cell& cell, uintptr_t a, Access access, Proxy proxy, void* pc) {
  const bool async = proxy == Proxy::async;
  const char* const verb = access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
  const auto check_against = [&](const char* what, const Stamp& by, bool by_async, void* by_pc, bool needs_fence) {
    if (!running->knows(by))
      fault("race on " + name_shared(a) + ": the " + what + " of " + name_of(by) + where(by_pc) +
                " is not ordered before this " + verb,
            pc);
    // For the async proxy, a generic write counts only once a fence.proxy.async has covered it.
    if (needs_fence && async && !by_async && !running->clock.fenced.covers(by))
      fault("missing fence.proxy.async on " + name_shared(a) + ": the " + what + " of " + name_of(by) + where(by_pc) +
                " through the generic proxy is not visible to this asynchronous " + verb,
            pc);
  };
  if (cell.written) check_against("write", cell.writer, cell.by_async, cell.pc, true);
  if (access != Access::write && !cell.written)
    fault(std::string(verb) + " of " + name_shared(a) + ", which nobody has written", pc);
  for (const Use& u : sets[cell.since])
    if (u.atomic ? access != Access::atomic : access != Access::read)
      check_against(u.atomic ? "atomic" : "read", u.by, u.by_async, u.pc, u.atomic);
  if (access == Access::write)
    cell = {pc, running->stamp(), 0, true, async, {}};
  else
    cell.since = with_use(cell.since, {running->stamp(), async, access == Access::atomic, pc});
}

void check_cells(Cell* cells, uintptr_t a, size_t bytes, Access access, Proxy proxy, void* pc) {
  Cell before, after;  // neighbours mostly share their history: what one became, the next becomes
  for (size_t i = 0; i < bytes; ++i) {
    if (i == 0 || std::memcmp(&cells[i], &before, sizeof(Cell))) {
      before = cells[i];
      check_cell(cells[i], a + i, access, proxy, pc);
      after = cells[i];
    } else {
      cells[i] = after;
    }
  }
}

void check_access(const void* address, size_t bytes, Access access, Proxy proxy, void* pc) {
  const bool write = access != Access::read;
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (stack_now.holds(a, bytes)) return;
  const bool in_static = static_shared.holds(a, bytes);
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  const Region dynamic_region = {dynamic, dynamic + dynamic_bytes_now};
  if (in_static || dynamic_region.holds(a, bytes)) {
    Cell* cells = in_static ? &static_shadow[a - static_shared.begin] : &dynamic_shadow[a - dynamic];
    check_cells(cells, a, bytes, access, proxy, pc);
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
  if (!write && module.holds(a, bytes)) return;  // constants
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
  std::memset(dynamic_memory, kPoison, dynamic_bytes);
  static_shadow.assign(static_shared.end - static_shared.begin, {});
  dynamic_shadow.assign(dynamic_bytes, {});
  sets.assign(1, {});
  larger_sets.clear();
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

// The first KiB belongs to the system on sm_90: a descriptor of zeros points at no operand.
constexpr uint32_t kReserved = 1024;

uint32_t shared_address(const void* address) {
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(dynamic_memory);
  if (offset >= dynamic_bytes_now)
    fault("the 32-bit shared address of " + name_of_shared(address) + ": only dynamic shared memory has one here");
  return uint32_t(offset) + kReserved;
}
const void* from_shared_address(uint32_t address) {
  return dynamic_memory + (ptrdiff_t(address) - ptrdiff_t(kReserved));
}
std::string name_of_shared(const void* address) {
  const auto a = reinterpret_cast<uintptr_t>(address), dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  if (static_shared.holds(a, 1) || (a >= dynamic && a < dynamic + kMaxDynamicShared)) return name_shared(a);
  return "memory that is not shared";
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
  check_access(address, bytes, write ? Access::write : Access::read, proxy, pc);
}

void atomic_access(const void* address, size_t bytes, void* pc) {
  if (!running || muted) return;
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fault("misaligned atomic of " + std::to_string(bytes) + " bytes at " + hex(address), pc);
  check_access(address, bytes, Access::atomic, Proxy::generic, pc);
}

}  // namespace simt
