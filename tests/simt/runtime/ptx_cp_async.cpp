// cp.async. Contract: simt/ptx_cp_async.h.
#include <cstring>
#include <deque>

#include "internal.h"
#include "simt/ptx_cp_async.h"

namespace simt {
namespace {

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
  void* pc;
  Clock issued;
};
using Group = std::vector<Copy>;
struct Copies {
  Group open;                   // issued since the last commit
  std::deque<Group> committed;  // oldest first
};
struct BlockCopies {
  std::vector<Copies> by_thread;
};

Copies& mine() {
  std::vector<Copies>& all = block_state<BlockCopies>().by_thread;
  const size_t self = current().linear;
  if (all.size() <= self) all.resize(self + 1);
  return all[self];
}

void arrive(Group& group) {
  for (const Copy& c : group) {
    since(c.issued, [&] { access(c.to, c.size, true, c.pc); });
    std::memcpy(c.to, c.from, c.bytes);
    std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.size - c.bytes);
  }
  group.clear();
}

void check_all_waited_for() {
  Copies& copies = mine();
  const Group* left = copies.open.empty() ? nullptr : &copies.open;
  for (const Group& group : copies.committed)
    if (!group.empty()) left = &group;
  if (left) fault("the thread ends without waiting for its cp.async", left->front().pc);
}

void check_aligned(const char* what, const void* p, int size, void* pc) {
  if (reinterpret_cast<uintptr_t>(p) % size)
    fault("cp.async: the " + std::string(what) + " of a " + std::to_string(size) + "-byte copy is misaligned", pc);
}

}  // namespace

void cp_async(void* to, const void* from, int size, int bytes, void* pc) {
  check_aligned("destination", to, size, pc);
  check_aligned("source", from, size, pc);
  if (bytes < 0 || bytes > size)
    fault("cp.async: " + std::to_string(bytes) + " source bytes of " + std::to_string(size), pc);
  if (!is_shared(to, size)) fault("cp.async: the destination is not in shared memory", pc);
  if (bytes) {
    if (is_shared(from, bytes)) fault("cp.async: the source is not in global memory", pc);
    access(from, bytes, false, pc);
  }
  at_thread_exit(check_all_waited_for);
  Copy copy = {to, from, size, bytes, pc, {}};
  release(copy.issued);
  mine().open.push_back(std::move(copy));
}

void cp_async_commit() {
  Copies& copies = mine();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

void cp_async_wait_group(int still_pending) {
  Copies& copies = mine();
  while (copies.committed.size() > size_t(still_pending)) {
    arrive(copies.committed.front());
    copies.committed.pop_front();
  }
}

void cp_async_wait_all() {
  cp_async_wait_group(0);
  arrive(mine().open);
}

}  // namespace simt
