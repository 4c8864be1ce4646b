// Switching between stacks. ucontext does it everywhere but makes two system calls a switch; x86-64 gets eight pushes
// instead.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)

// Saves the callee-saved registers of the System V ABI on the current stack, stores its pointer to *from, and goes on
// from `to`.
extern "C" void simt_switch(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
    auto* slots = reinterpret_cast<void**>(top);
    slots[-1] = nullptr;                         // the entry's return address: it never returns
    slots[-2] = reinterpret_cast<void*>(entry);  // simt_switch returns into it, with the stack aligned as after a call
    for (int i = 3; i <= 8; ++i) slots[-i] = nullptr;
    stack_pointer = &slots[-8];
  }
  void switch_to(Context& next) { simt_switch(&stack_pointer, next.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& next) { swapcontext(&context, &next.context); }
};

#endif

}  // namespace simt
