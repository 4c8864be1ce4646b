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
constexpr size_t kDefaultShared = 48 << 10;  // dynamic shared memory that a kernel gets without asking

struct NamedBarrier {
  int arrived = 0;
  Clock clock;
};

struct BlockState {
  std::vector<Fiber> fibers;
  Context scheduler;
  bool any_fence = false;  // until a fence.proxy.async, nothing is fenced
  size_t at_barrier = 0;   // threads waiting at the block's barrier
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::map<int, NamedBarrier> named;
  struct Slot {
    void* value;
    void (*drop)(void*);
  };
  std::map<const void*, Slot> slots;
  struct Agent {
    std::string name;
    uint32_t time;
  };
  std::vector<Agent> agents;
};
BlockState block;
std::vector<void (*)()> exit_checks;
std::vector<bool (*)()> idle_work;
std::map<const void*, size_t> allowed_shared;  // by kernel
std::vector<std::unique_ptr<char[]>> stacks;

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void join(Knowledge& into, const Knowledge& from) {
  join(into.agents, from.agents);
  if (from.epoch < into.epoch) return;  // what it knows of threads lies before a barrier of the whole block
  if (from.epoch == into.epoch) {
    join(into.threads, from.threads);
  } else {
    into.epoch = from.epoch;
    into.threads = from.threads;
  }
}
}  // namespace

void join(Clock& into, const Clock& from) {
  join(into.seen, from.seen);
  if (block.any_fence) join(into.fenced, from.fenced);
}

namespace {
// All that `f` knows, itself included, which its own clock leaves out.
Clock clock_of(const Fiber& f) {
  Clock clock = f.clock;
  const size_t self = f.view.linear;
  if (clock.seen.threads.size() <= self) clock.seen.threads.resize(self + 1, 0);
  clock.seen.threads[self] = f.time;
  return clock;
}

// Everything a group of threads knows becomes known to each of them, and each starts a new time.
void synchronise(const std::vector<Fiber*>& group) {
  Clock all;
  for (Fiber* f : group) join(all, clock_of(*f));
  for (Fiber* f : group) {
    f->clock = all;
    ++f->time;
  }
}
void synchronise_block() {
  Clock all;
  for (Fiber& f : block.fibers) {
    if (!block.agents.empty()) join(all.seen.agents, f.clock.seen.agents);
    if (block.any_fence) join(all.fenced, f.clock.fenced);
  }
  all.seen.epoch = block.fibers[0].clock.seen.epoch + 1;
  for (Fiber& f : block.fibers) f.clock = all;
}

void yield() {
  running->context.switch_to(block.scheduler);
}

// Lets others run until somebody has cleared what `self` waits for.
void wait(Fiber* self) {
  while (self->waiting.kind != Waiting::nothing) yield();
}

std::string describe(const Waiting& w) {
  char mask[24] = "";
  if (w.kind == Waiting::collective && w.mask != 0xffffffffu) std::snprintf(mask, sizeof mask, ", mask 0x%08x", w.mask);
  return w.what + where(w.pc) + mask;
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
    text += "\n  thread " + std::to_string(f.view.linear) + " waits at " + describe(f.waiting);
  }
  if (ended)
    text += "\n  " + std::to_string(ended) + " of " + std::to_string(block.fibers.size()) + " threads have ended";
  fault("divergence: " + text);
}

// A thread that has ended never comes: then the deadlock report says so.
void try_release_block_barrier() {
  if (++block.at_barrier < block.fibers.size()) return;
  block.at_barrier = 0;
  const Fiber& first = block.fibers[0];
  int count = 0;
  for (Fiber& f : block.fibers) {
    if (f.waiting.pc != first.waiting.pc)
      fault("divergence: thread 0 is at the __syncthreads" + where(first.waiting.pc) + ", thread " +
            std::to_string(f.view.linear) + " at another" + where(f.waiting.pc));
    count += f.predicate != 0;
  }
  synchronise_block();
  for (Fiber& f : block.fibers) {
    f.barrier_result = count;
    f.waiting.kind = Waiting::nothing;
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
    if (ran) continue;
    const bool progress = std::any_of(idle_work.begin(), idle_work.end(), [](bool (*work)()) { return work(); });
    if (!progress) report_deadlock();
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

// The line of the source, and behind it the lines that it was inlined into: " (mma.h:40 < gemm.cu:12)".
std::string where(void* pc) {
  constexpr int kFrames = 4;
  char path[256], command[512], line[1024];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (!pc || length <= 0) return "";
  path[length] = 0;
  // A return address points behind the call: look one byte before. Test programs are linked at a fixed address.
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' %p 2>/dev/null", path, static_cast<char*>(pc) - 1);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    for (int frame = 0; frame < kFrames && std::fgets(line, sizeof line, pipe) && line[0] != '?'; ++frame) {
      line[std::strcspn(line, " \n")] = 0;  // and the "(discriminator 2)" behind
      text += (frame ? " < " : "") + std::string(line);
    }
    pclose(pipe);
  }
  return text.empty() ? "" : " (" + text + ")";
}

void fault(const std::string& message, void* pc) {
  muted = true;
  std::string who;
  if (running) {
    const ThreadView& v = running->view;
    who = "block (" + std::to_string(v.block.x) + "," + std::to_string(v.block.y) + "," + std::to_string(v.block.z) +
          ") " + name_of(running->stamp()) + ": ";
  }
  std::fflush(stdout);
  std::fprintf(stderr, "simt: %s%s%s\n", who.c_str(), message.c_str(), where(pc).c_str());
  std::fflush(stderr);
  std::_Exit(kFaultExit);
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  allowed_shared[kernel] = bytes;
}

void launch(const void* kernel, Dim3 grid, Dim3 block_dim, size_t dynamic_shared_bytes, void (*body)(const void*),
            const void* context) {
  const auto allowed = allowed_shared.find(kernel);
  if (dynamic_shared_bytes > (allowed == allowed_shared.end() ? kDefaultShared : allowed->second))
    fault("launch with " + std::to_string(dynamic_shared_bytes) +
          " bytes of dynamic shared memory, more than cudaFuncSetAttribute has asked for");
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
        block.at_barrier = 0;
        block.body = body;
        block.context = context;
        block.named.clear();
        block.agents.clear();
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
          f.clock = {};
          f.time = 1;
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
  release(barrier.clock);
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
  bool all_here = true;
  uint32_t present = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads) {
      // A partial last warp: lanes that do not exist take no part, as long as the mask is the full one.
      if (mask == 0xffffffffu) continue;
      fault(std::string(kind) + ": lane " + std::to_string(lane) + " of the mask does not exist", pc);
    }
    const Fiber& f = block.fibers[first + lane];
    if (f.done) fault(std::string(kind) + ": lane " + std::to_string(lane) + " of the mask has ended", pc);
    if (f.waiting.kind != Waiting::collective)
      all_here = false;
    else if (f.waiting.pc != pc || f.waiting.mask != mask ||
             (f.waiting.what != kind && std::strcmp(f.waiting.what, kind)))
      fault("divergence: lane " + std::to_string(self->view.lane) + " is at " + describe(self->waiting) + ", lane " +
            std::to_string(lane) + " at " + describe(f.waiting));
    present |= 1u << lane;
  }
  if (all_here) {
    void* arguments[kWarp] = {};
    std::vector<Fiber*> group;
    for (int lane = 0; lane < kWarp; ++lane)
      if (present >> lane & 1) {
        group.push_back(&block.fibers[first + lane]);
        arguments[lane] = group.back()->argument;
      }
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
  join(clock, clock_of(*running));
  ++running->time;
}
void acquire(const Clock& clock) {
  join(running->clock, clock);
}
void fence_proxy_async() {
  block.any_fence = true;
  running->clock.fenced = clock_of(*running).seen;
  ++running->time;
}

namespace {
void run_as(Fiber& ghost, const std::function<void()>& work) {
  Fiber* const before = running;
  const bool was_muted = muted;
  running = &ghost;
  muted = false;
  work();
  running = before;
  muted = was_muted;
}
Fiber ghost_of(const Clock& clock, const ThreadView& view) {
  Fiber ghost;
  ghost.view = view;
  ghost.clock = clock;
  const std::vector<uint32_t>& known = clock.seen.threads;
  ghost.time = size_t(view.linear) < known.size() ? known[view.linear] : 0;
  return ghost;
}
}  // namespace

void on_behalf_of(const Clock& clock, int linear_thread, const std::function<void()>& work) {
  Fiber ghost = ghost_of(clock, block.fibers[linear_thread].view);
  run_as(ghost, work);
}
void since(const Clock& begun, const std::function<void()>& work) {
  Fiber ghost = ghost_of(begun, running->view);
  ghost.ends = running->stamp();
  run_as(ghost, work);
}

int new_agent(const std::string& name) {
  block.agents.push_back({name, 0});
  return int(block.agents.size()) - 1;
}
void run_agent(int agent, Clock& knows, const std::function<void()>& work) {
  const uint32_t time = ++block.agents[agent].time;
  Fiber ghost;
  ghost.view.block = block.fibers[0].view.block;
  ghost.view.linear = -1;  // no thread: an agent's accesses are in no order, until a wait has told who issues the next
  ghost.clock = knows;
  ghost.ends = Stamp{kAgent, time, agent};
  run_as(ghost, work);
  std::vector<uint32_t>& known = knows.seen.agents;
  if (known.size() <= size_t(agent)) known.resize(agent + 1, 0);
  known[agent] = time;
}
Clock release_warp() {
  Clock all;
  for (Fiber& f : block.fibers)
    if (f.view.warp == running->view.warp) {
      join(all, clock_of(f));
      ++f.time;
    }
  return all;
}

std::string name_of(const Stamp& s) {
  return s.epoch == kAgent ? block.agents[s.who].name : "thread " + std::to_string(s.who);
}

void at_idle(bool (*progress)()) {
  if (std::find(idle_work.begin(), idle_work.end(), progress) == idle_work.end()) idle_work.push_back(progress);
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
