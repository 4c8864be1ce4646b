// SIMT on the CPU: runs a kernel's threads as fibers, a block at a time, and watches what they do to memory.
//
// What is reported (message on stderr, exit code kFaultExit, so that a test can ask for it):
//   * divergence: threads of a block waiting at different barriers, lanes of a warp at different collectives, or
//   threads gone
//     while others wait for them;
//   * races: two accesses to a byte of shared memory by two threads, one a write, that no barrier, warp barrier or
//   mbarrier
//     orders (vector clocks: what one schedule happens to do does not matter);
//   * reads of shared memory that nobody wrote; accesses outside the buffers that the test registered; misaligned
//   accesses;
//   * accesses that need fence.proxy.async and lack it.
//
// Memory accesses reach the runtime through the compiler's -fsanitize=thread instrumentation of the kernel's
// translation unit, whose entry points runtime/hooks.cpp defines; libtsan is not linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace simt {

constexpr int kFaultExit = 3;
constexpr int kWarp = 32;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The order in which ready fibers run.
enum class Schedule { forward, reverse, shuffled };
struct Options {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
};
Options& options();  // initialised from SIMT_SCHEDULE (forward | reverse | shuffled) and SIMT_SEED

// As cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize); a launch beyond it, or beyond the 48 KB that
// need no asking, is a fault.
void allow_dynamic_shared(const void* kernel, size_t bytes);
// Runs thread(context) once for every thread of the grid; it calls `kernel`. Neither it nor what it reads is watched:
// that is the kernel's parameter space.
void launch(const void* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, void (*thread)(const void* context),
            const void* context);
template <class F>
__attribute__((no_sanitize("thread"))) void call(const void* f) {
  (*static_cast<const F*>(f))();
}

// Device memory: registered, so that accesses outside it are reported; poisoned with 0xff bytes (NaN in every float
// type).
void* device_malloc(size_t bytes);
void device_free(void*);
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(device_malloc(count * sizeof(T)))), size_(count) {}
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    for (size_t i = 0; i < host.size(); ++i) data_[i] = host[i];
  }
  ~Buffer() { device_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + size_); }

 private:
  T* data_;
  size_t size_;
};

[[noreturn]] void fault(const std::string& message, void* pc = nullptr);

// ---- for the device side (simt/device.h, ptx wrappers)
// ---------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};
struct ThreadView {
  Index thread, block;
  Dim3 block_dim, grid_dim;
  int linear, lane, warp;
};
const ThreadView& current();
Index thread_index();
Index block_index();
Dim3 block_dim();
Dim3 grid_dim();
int lane();
bool in_kernel();

void* dynamic_shared();
size_t dynamic_shared_bytes();

// What a __syncthreads and its counting forms give: the number of threads whose predicate is not zero.
int block_barrier(int predicate, void* pc);
// bar.sync id, count: waits for `count` threads (a multiple of a warp); bar.arrive does not wait.
void named_barrier(int id, int count, bool wait, void* pc);

// All lanes of `mask` meet here; the last to come runs compute(arguments of all lanes, mask). `kind` and `pc` must
// agree.
using Collective = void (*)(void* const* arguments, uint32_t mask);
void warp_collective(const char* kind, uint32_t mask, void* argument, Collective compute, bool orders_memory, void* pc);

// Lets other fibers run until `ready` holds (polling waits: mbarrier.try_wait).
void wait_until(const char* what, const std::function<bool()>& ready, void* pc);

// Memory accesses made on the kernel's behalf by wrappers (ldmatrix, cp.async, ...). `pc` names the caller.
enum class Proxy { generic, async };
void access(const void* address, size_t bytes, bool write, void* pc, Proxy proxy = Proxy::generic);
bool is_shared(const void* address, size_t bytes);

// Happens-before: a release stores the current thread's clock, an acquire joins it. Used by mbarriers and asynchronous
// copies. A barrier of the whole block ends an epoch: everything before it is known to all, so that clocks hold the
// times of one epoch only.
struct Stamp {
  uint32_t epoch = 0, time = 0;
  int32_t who = -1;  // thread, or agent (epoch kAgent: no barrier of the block orders what an agent does)
};
constexpr uint32_t kAgent = 0xffffffffu;
struct Knowledge {
  uint32_t epoch = 0;
  std::vector<uint32_t> threads, agents;  // the last time (for threads, in this epoch) that is known of each; or none
  bool covers(const Stamp& s) const {
    if (s.epoch < epoch) return true;
    const std::vector<uint32_t>& known = s.epoch == kAgent ? agents : threads;
    return (s.epoch == epoch || s.epoch == kAgent) && size_t(s.who) < known.size() && known[s.who] >= s.time;
  }
};
struct Clock {
  Knowledge seen, fenced;  // all that is known, and the part that a fence.proxy.async covers
};
void join(Clock& into, const Clock& from);
void release(Clock&);
void acquire(const Clock&);
void fence_proxy_async();
// Runs `work` as if by the thread that had `clock` when it issued the work (asynchronous copies): its accesses are that
// thread's, at that time.
void on_behalf_of(const Clock& clock, int linear_thread, const std::function<void()>& work);
// Runs `work` that the current thread began when it released `begun` and that ends now (cp.async, from its issue to the
// wait): accesses of others must be ordered before `begun` or after now.
void since(const Clock& begun, const std::function<void()>& work);

// An agent is an asynchronous engine (the copies of one mbarrier, a warp's wgmma, a thread's bulk stores): a
// participant of its own, of whose accesses nobody knows until a wait tells. Agents are made anew for every block.
int new_agent(const std::string& name);
// Runs `work`, whose accesses are the agent's, at a new time of its own and knowing what `knows` knows; then adds that
// time to `knows`, for the completion to hand on.
void run_agent(int agent, Clock& knows, const std::function<void()>& work);
// release() by all lanes of the current warp at once: what they know together.
Clock release_warp();

// Called when no thread of the block can go on: completes one piece of asynchronous work, or says that there is none.
void at_idle(bool (*progress)());

// The address that a 32-bit shared-memory operand or a matrix descriptor holds; dynamic shared memory only.
uint32_t shared_address(const void*);
const void* from_shared_address(uint32_t);
std::string name_of_shared(const void* address);  // for messages

// State that wrappers keep for one block, made anew for every block: block_state<T>() is one T a block.
void* block_state_slot(const void* key, void* (*make)(), void (*drop)(void*));
template <class T>
T& block_state() {
  static const char key = 0;
  return *static_cast<T*>(
      block_state_slot(&key, [] { return static_cast<void*>(new T()); }, [](void* p) { delete static_cast<T*>(p); }));
}
// Called when a thread ends: lets wrappers complain of unfinished work.
void at_thread_exit(void (*check)());

}  // namespace simt
