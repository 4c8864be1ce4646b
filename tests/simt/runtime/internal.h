// What scheduler.cpp, memory.cpp and hooks.cpp share.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include <memory>
#include <optional>
#include <unordered_map>

#include "fiber.h"
#include "simt/runtime.h"

namespace simt {

struct Waiting {
  enum Kind { nothing, block_barrier, named_barrier, collective, condition } kind = nothing;
  const char* what = "";
  int id = 0;         // named barrier
  uint32_t mask = 0;  // collective
  void* pc = nullptr;
  const std::function<bool()>* ready = nullptr;
};

struct Fiber {
  ThreadView view;
  Context context;
  bool done = false;
  Waiting waiting;
  void* argument = nullptr;  // of the collective
  int predicate = 0, barrier_result = 0;
  Clock clock;
  uint32_t time = 1;          // of this thread itself: counts its releases
  std::optional<Stamp> ends;  // the stamp of accesses that end later than they begin

  bool knows(const Stamp& s) const {
    return s.who == view.linear && s.epoch == clock.seen.epoch ? s.time <= time : clock.seen.covers(s);
  }
  Stamp stamp() const { return ends ? *ends : Stamp{clock.seen.epoch, time, view.linear}; }
};

// The running thread; null outside kernels. Accesses are watched only while it is set and `muted` is not.
extern Fiber* running;
extern bool muted;

// memory.cpp
void begin_block(size_t dynamic_bytes);  // poisons shared memory, forgets its history
void set_stack(const void* low, size_t bytes);

// scheduler.cpp
std::string where(void* pc);
std::string name_of(const Stamp&);  // "thread 3", or an agent's name

}  // namespace simt
