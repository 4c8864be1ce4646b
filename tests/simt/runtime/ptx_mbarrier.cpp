// mbarriers: phases, arrivals and transaction counts, with what each phase's arrivals knew. Contract:
// slkernels/ptx/mbarrier.h.
#include <map>

#include "internal.h"
#include "simt/ptx_mbarrier.h"

namespace simt {
namespace {

constexpr int64_t kMaxCount = (1 << 20) - 1;  // of arrivals, and of the transaction count either way

struct Barrier {
  uint32_t arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced less copied, in this phase
  uint64_t phase = 0;
  Clock arriving, completed;  // of this phase, and of the one before
  int agent = -1;
  int initialised_by = 0;
  bool visible_to_async = false;
};

std::string name(const uint64_t* bar) {
  return "mbarrier at " + name_of_shared(bar);
}

struct Barriers {
  std::map<uint64_t*, Barrier> live;

  ~Barriers() {
    for (const auto& [bar, b] : live)
      if (b.bytes)
        fault(name(bar) + ": the block ended with a transaction count of " + std::to_string(b.bytes) + " bytes");
  }
};

Barrier& find(uint64_t* bar, const char* what, void* pc) {
  auto& live = block_state<Barriers>().live;
  const auto it = live.find(bar);
  if (it == live.end()) fault(std::string(what) + " on an uninitialised " + name(bar), pc);
  access(bar, sizeof *bar, false, pc);  // the init must be ordered before
  return it->second;
}

void complete_if_done(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.completed = std::move(b.arriving);
  b.arriving = {};
  b.missing = b.arrivals;
  ++b.phase;
}

}  // namespace

void mbarrier_init(uint64_t* bar, uint32_t arrivals, void* pc) {
  if (reinterpret_cast<uintptr_t>(bar) % 8) fault(name(bar) + " is not 8-byte aligned", pc);
  if (!is_shared(bar, sizeof *bar)) fault("mbarrier.init outside shared memory", pc);
  if (arrivals < 1 || arrivals > kMaxCount) fault("mbarrier.init with a count of " + std::to_string(arrivals), pc);
  access(bar, sizeof *bar, true, pc);
  Barrier fresh;
  fresh.arrivals = fresh.missing = arrivals;
  fresh.initialised_by = running->view.linear;
  if (!block_state<Barriers>().live.try_emplace(bar, std::move(fresh)).second)
    fault("mbarrier.init of a live " + name(bar) + " (mbarrier.inval comes first)", pc);
}

void mbarrier_inval(uint64_t* bar, void* pc) {
  find(bar, "mbarrier.inval", pc);
  access(bar, sizeof *bar, true, pc);  // all uses must be ordered before
  block_state<Barriers>().live.erase(bar);
}

void mbarrier_arrive(uint64_t* bar, uint32_t expected_bytes, void* pc) {
  Barrier& b = find(bar, "arrival", pc);
  b.bytes += expected_bytes;
  if (b.bytes > kMaxCount) fault(name(bar) + ": transaction count overflow: " + std::to_string(b.bytes), pc);
  if (!b.missing)
    fault(name(bar) + ": arrival count underflow: all " + std::to_string(b.arrivals) +
              " arrivals of this phase have come, and " + std::to_string(b.bytes) + " bytes are still expected",
          pc);
  release(b.arriving);
  --b.missing;
  complete_if_done(b);
}

void mbarrier_wait(uint64_t* bar, uint32_t parity, void* pc) {
  if (parity > 1) fault(name(bar) + ": parity " + std::to_string(parity) + " is neither 0 nor 1", pc);
  Barrier& b = find(bar, "wait", pc);
  Clock known;
  char state[256];
  wait_until(
      state,
      [&] {
        if ((b.phase & 1) != parity) {
          known = b.completed;
          return true;
        }
        std::snprintf(state, sizeof state,
                      "%s for parity %u: phase %lu has %u of %u arrivals missing, %ld bytes expected",
                      name(bar).c_str(), parity, static_cast<unsigned long>(b.phase), b.missing, b.arrivals,
                      static_cast<long>(b.bytes));
        return false;
      },
      pc);
  acquire(known);
}

int mbarrier_agent(uint64_t* bar, void* pc) {
  Barrier& b = find(bar, "bulk copy", pc);
  if (!b.visible_to_async)
    fault("missing fence.mbarrier_init: the async proxy may not see the init of " + name(bar), pc);
  if (b.agent < 0) b.agent = new_agent("the bulk copies on " + name(bar));
  return b.agent;
}

void mbarrier_complete_tx(uint64_t* bar, uint32_t bytes, const Clock& knows, void* pc) {
  auto& live = block_state<Barriers>().live;
  const auto it = live.find(bar);
  if (it == live.end()) fault("a bulk copy ends on " + name(bar) + ", which is no more", pc);
  Barrier& b = it->second;
  b.bytes -= bytes;
  // With all arrivals in, nobody is left to announce more. (Below zero before that, a late expect_tx may still come.)
  if (b.bytes < -kMaxCount || (!b.missing && b.bytes < 0))
    fault(name(bar) + ": transaction count underflow: " + std::to_string(-b.bytes) +
              " bytes more were copied than expect_tx announced",
          pc);
  join(b.arriving, knows);
  complete_if_done(b);
}

void fence_mbarrier_init() {
  for (auto& [bar, b] : block_state<Barriers>().live)
    if (b.initialised_by == running->view.linear) b.visible_to_async = true;
}

}  // namespace simt
