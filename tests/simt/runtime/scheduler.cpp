// Fibers, barriers and warp collectives. Contract: simt/runtime.h.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "internal.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

namespace simt {

Fiber* running = nullptr;
bool muted = false;

namespace {

constexpr size_t kStackBytes = 256 << 10;

struct NamedBarrier {
  int arrived = 0;
  Clock clock;
};

struct BlockState {
  std::vector<Fiber> fibers;
  Context scheduler;
  bool any_fence = false;  // until a fence.proxy.async, fenced clocks are all zero
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::map<int, NamedBarrier> named;
  struct Slot {
    void* value;
    void (*drop)(void*);
  };
  std::map<const void*, Slot> slots;
};
BlockState block;
std::vector<void (*)()> exit_checks;
std::vector<std::unique_ptr<char[]>> stacks;

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void join(Clock& into, const Clock& from) {
  join(into.at, from.at);
  if (block.any_fence) join(into.fenced_at, from.fenced_at);
}

// Everything a group of threads knows becomes known to each of them, and each starts a new epoch.
void synchronise(const std::vector<Fiber*>& group) {
  Clock all = group[0]->clock;
  if (group.size() == block.fibers.size()) {
    for (Fiber* f : group)
      all.at[f->view.linear] = f->clock.at[f->view.linear];  // nobody knows more of a thread than itself
    if (block.any_fence)
      for (Fiber* f : group) join(all.fenced_at, f->clock.fenced_at);
  } else {
    for (Fiber* f : group) join(all, f->clock);
  }
  for (Fiber* f : group) {
    f->clock = all;
    ++f->clock.at[f->view.linear];
  }
}

void yield() {
  running->context.switch_to(block.scheduler);
}

// Lets others run until somebody has cleared what `self` waits for.
void wait(Fiber* self) {
  while (self->waiting.kind != Waiting::nothing) yield();
}

[[noreturn]] void report_deadlock() {
  std::string text = "deadlock: no thread of the block can go on";
  int shown = 0, ended = 0;
  const Fiber* first = nullptr;
  for (const Fiber& f : block.fibers) {
    if (f.done) {
      ++ended;
      continue;
    }
    if (first && first->waiting.pc == f.waiting.pc && first->waiting.kind == f.waiting.kind) continue;
    if (shown++ == 8) break;
    first = &f;
    text += "\n  thread " + std::to_string(f.view.linear) + " waits at " + f.waiting.what + where(f.waiting.pc);
  }
  if (ended)
    text += "\n  " + std::to_string(ended) + " of " + std::to_string(block.fibers.size()) + " threads have ended";
  fault("divergence: " + text);
}

void try_release_block_barrier() {
  std::vector<Fiber*> group;
  for (Fiber& f : block.fibers) {
    if (f.done) return;  // a thread that ended never comes: the deadlock report says so
    if (f.waiting.kind != Waiting::block_barrier) return;
    group.push_back(&f);
  }
  int count = 0;
  for (Fiber* f : group) {
    if (f->waiting.pc != group[0]->waiting.pc)
      fault("divergence: thread " + std::to_string(group[0]->view.linear) + " is at the __syncthreads" +
            where(group[0]->waiting.pc) + ", thread " + std::to_string(f->view.linear) + " at another" +
            where(f->waiting.pc));
    count += f->predicate != 0;
  }
  synchronise(group);
  for (Fiber* f : group) {
    f->barrier_result = count;
    f->waiting.kind = Waiting::nothing;
  }
}

void entry() {
  block.body(block.context);
  for (auto* check : exit_checks) check();
  running->done = true;
  running->waiting = {};
  running->context.switch_to(block.scheduler);
}

bool is_ready(Fiber& f) {
  if (f.done) return false;
  if (f.waiting.kind == Waiting::condition) {
    Fiber* const before = running;
    running = &f;  // conditions look at memory on the waiter's behalf
    muted = true;
    const bool ready = (*f.waiting.ready)();
    muted = false;
    running = before;
    if (ready) f.waiting.kind = Waiting::nothing;
  }
  return f.waiting.kind == Waiting::nothing;
}

void run_block() {
  std::mt19937_64 random(options().seed);
  std::vector<size_t> order(block.fibers.size());
  for (size_t i = 0; i < order.size(); ++i)
    order[i] = options().schedule == Schedule::reverse ? order.size() - 1 - i : i;
  for (;;) {
    if (options().schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
    bool ran = false, all_done = true;
    for (size_t i : order) {
      Fiber& f = block.fibers[i];
      if (!is_ready(f)) {
        all_done &= f.done;
        continue;
      }
      running = &f;
      set_stack(stacks[i].get(), kStackBytes);
      block.scheduler.switch_to(f.context);
      running = nullptr;
      ran = true;
      all_done &= f.done;
    }
    if (all_done) return;
    if (!ran) report_deadlock();
  }
}

}  // namespace

Options& options() {
  static Options options = [] {
    Options o;
    const char* schedule = std::getenv("SIMT_SCHEDULE");
    const char* seed = std::getenv("SIMT_SEED");
    if (schedule && !std::strcmp(schedule, "reverse")) o.schedule = Schedule::reverse;
    if (schedule && !std::strcmp(schedule, "shuffled")) o.schedule = Schedule::shuffled;
    if (seed) o.seed = std::strtoull(seed, nullptr, 10);
    return o;
  }();
  return options;
}

std::string where(void* pc) {
  if (!pc) return "";
  char command[512], line[1024] = "";
  char path[256];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0) return "";
  path[length] = 0;
  // A return address points behind the call: look one byte before. Test programs are linked at a fixed address.
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' %p 2>/dev/null", path, static_cast<char*>(pc) - 1);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  std::string text = line;
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() || text[0] == '?' ? "" : " (" + text + ")";
}

void fault(const std::string& message, void* pc) {
  muted = true;
  std::string who;
  if (running) {
    const ThreadView& v = running->view;
    who = "block (" + std::to_string(v.block.x) + "," + std::to_string(v.block.y) + "," + std::to_string(v.block.z) +
          ") thread " + std::to_string(v.linear) + ": ";
  }
  std::fflush(stdout);
  std::fprintf(stderr, "simt: %s%s%s\n", who.c_str(), message.c_str(), where(pc).c_str());
  std::fflush(stderr);
  std::_Exit(kFaultExit);
}

void launch(Dim3 grid, Dim3 block_dim, size_t dynamic_shared_bytes, void (*body)(const void*), const void* context) {
  const size_t threads = size_t(block_dim.x) * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024)
    fault("launch of " + std::to_string(threads) + " threads a block; 1 to 1024 are possible");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    fault("launch of an impossible grid");
  while (stacks.size() < threads) stacks.emplace_back(new char[kStackBytes]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.fibers.resize(threads);
        block.any_fence = false;
        block.body = body;
        block.context = context;
        block.named.clear();
        begin_block(dynamic_shared_bytes);
        for (size_t i = 0; i < threads; ++i) {
          Fiber& f = block.fibers[i];
          const unsigned linear = unsigned(i);
          f.view = {{linear % block_dim.x, linear / block_dim.x % block_dim.y, linear / (block_dim.x * block_dim.y)},
                    {x, y, z},
                    block_dim,
                    grid,
                    int(i),
                    int(i % kWarp),
                    int(i / kWarp)};
          f.done = false;
          f.waiting = {};
          f.clock.at.assign(threads, 0);
          f.clock.fenced_at.assign(threads, 0);
          f.clock.at[i] = 1;
          f.context.start(stacks[i].get(), kStackBytes, entry);
        }
        run_block();
        for (auto& [key, slot] : block.slots) slot.drop(slot.value);
        block.slots.clear();
      }
}

const ThreadView& current() {
  if (!running) fault("device code called outside a launch");
  return running->view;
}
Index thread_index() {
  return current().thread;
}
Index block_index() {
  return current().block;
}
Dim3 block_dim() {
  return current().block_dim;
}
Dim3 grid_dim() {
  return current().grid_dim;
}
int lane() {
  return current().lane;
}
bool in_kernel() {
  return running != nullptr;
}

int block_barrier(int predicate, void* pc) {
  running->predicate = predicate;
  running->waiting = {Waiting::block_barrier, "__syncthreads", 0, 0, pc, nullptr};
  Fiber* const self = running;
  try_release_block_barrier();
  wait(self);
  return self->barrier_result;
}

void named_barrier(int id, int count, bool wait_for_others, void* pc) {
  if (id < 0 || id > 15) fault("bar.sync: barrier " + std::to_string(id) + " is not in 0..15", pc);
  if (count <= 0 || count % kWarp) fault("bar.sync: " + std::to_string(count) + " threads are not whole warps", pc);
  NamedBarrier& barrier = block.named[id];
  join(barrier.clock, running->clock);
  ++running->clock.at[running->view.linear];
  Fiber* const self = running;
  if (wait_for_others) self->waiting = {Waiting::named_barrier, "bar.sync", id, 0, pc, nullptr};
  if (++barrier.arrived == count) {
    for (Fiber& f : block.fibers)
      if (f.waiting.kind == Waiting::named_barrier && f.waiting.id == id) {
        join(f.clock, barrier.clock);
        f.waiting.kind = Waiting::nothing;
      }
    barrier = {};
  }
  wait(self);
}

void warp_collective(const char* kind, uint32_t mask, void* argument, Collective compute, bool orders_memory,
                     void* pc) {
  Fiber* const self = running;
  const int first = self->view.warp * kWarp, threads = int(block.fibers.size());
  if (!(mask >> self->view.lane & 1)) fault(std::string(kind) + ": the calling lane is not in its mask", pc);
  self->argument = argument;
  self->waiting = {Waiting::collective, kind, 0, mask, pc, nullptr};
  void* arguments[kWarp] = {};
  std::vector<Fiber*> group;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads) {
      // A partial last warp: lanes that do not exist take no part, as long as the mask is the full one.
      if (mask == 0xffffffffu) continue;
      fault(std::string(kind) + ": lane " + std::to_string(lane) + " of the mask does not exist", pc);
    }
    Fiber& f = block.fibers[first + lane];
    if (f.done) fault(std::string(kind) + ": lane " + std::to_string(lane) + " of the mask has ended", pc);
    if (f.waiting.kind == Waiting::collective && (std::strcmp(f.waiting.what, kind) || f.waiting.mask != mask))
      fault("divergence: lane " + std::to_string(self->view.lane) + " is at " + kind + where(pc) + ", lane " +
            std::to_string(lane) + " at " + f.waiting.what + where(f.waiting.pc));
    group.push_back(&f);
    arguments[lane] = f.argument;
  }
  bool all_here = true;
  for (Fiber* f : group) all_here &= f->waiting.kind == Waiting::collective;
  if (all_here) {
    uint32_t present = 0;
    for (Fiber* f : group) present |= 1u << f->view.lane;
    muted = true;
    compute(arguments, present);
    muted = false;
    if (orders_memory) synchronise(group);
    for (Fiber* f : group) f->waiting.kind = Waiting::nothing;
  }
  wait(self);
}

void wait_until(const char* what, const std::function<bool()>& ready, void* pc) {
  Fiber* const self = running;
  muted = true;
  const bool now = ready();
  muted = false;
  if (now) return;
  self->waiting = {Waiting::condition, what, 0, 0, pc, &ready};
  wait(self);
}

void release(Clock& clock) {
  join(clock, running->clock);
  ++running->clock.at[running->view.linear];
}
void acquire(const Clock& clock) {
  join(running->clock, clock);
}
void fence_proxy_async() {
  block.any_fence = true;
  running->clock.fenced_at = running->clock.at;
  ++running->clock.at[running->view.linear];
}

void on_behalf_of(const Clock& clock, int linear_thread, const std::function<void()>& work) {
  Fiber ghost;
  ghost.view = block.fibers[linear_thread].view;
  ghost.clock = clock;
  Fiber* const before = running;
  const bool was_muted = muted;
  running = &ghost;
  muted = false;
  work();
  running = before;
  muted = was_muted;
}

void* block_state_slot(const void* key, void* (*make)(), void (*drop)(void*)) {
  auto [it, fresh] = block.slots.try_emplace(key, BlockState::Slot{nullptr, drop});
  if (fresh) it->second.value = make();
  return it->second.value;
}

void at_thread_exit(void (*check)()) {
  for (auto* known : exit_checks)
    if (known == check) return;
  exit_checks.push_back(check);
}

}  // namespace simt
