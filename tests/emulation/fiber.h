// One stack per emulated thread and a switch between them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 512 * 1024;
#else
constexpr size_t stack_bytes = 128 * 1024;
#endif

#if defined(__x86_64__)
// ucontext asks the kernel for the signal mask at each switch, 20 times slower; only callee-saved registers matter here.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
#endif

// A suspended computation. `resume` runs it until it calls `suspend` or returns.
class Fiber {
 public:
  Fiber() {
    stack_ = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack_, stack_bytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)()) {
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack_) + stack_bytes) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(top) - 2;  // where `ret` finds the entry; rsp is 8 modulo 16 inside it
    frame[0] = reinterpret_cast<void*>(entry);
    frame[1] = nullptr;
    context_ = frame - 6;
    for (int i = 1; i <= 6; ++i) frame[-i] = nullptr;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
    fake_stack_ = nullptr;
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&outer_fake_stack_, stack_, stack_bytes);
#endif
#if defined(__x86_64__)
    emulator_switch(&outer_, context_);
#else
    swapcontext(&outer_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(outer_fake_stack_, nullptr, nullptr);
#endif
  }

  // First thing the entry function does.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &outer_stack_, &outer_bytes_);
#endif
  }

  // Back to whoever resumed; `for_good`: it will not be resumed again.
  void suspend(bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, outer_stack_, outer_bytes_);
#else
    (void)for_good;
#endif
#if defined(__x86_64__)
    emulator_switch(&context_, outer_);
#else
    swapcontext(&context_, &outer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &outer_stack_, &outer_bytes_);
#endif
  }

 private:
  void* stack_;
#if defined(__x86_64__)
  void *context_ = nullptr, *outer_ = nullptr;
#else
  ucontext_t context_, outer_;
#endif
  void *fake_stack_ = nullptr, *outer_fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* outer_stack_ = nullptr;
  size_t outer_bytes_ = 0;
#endif
};

}  // namespace emulator
