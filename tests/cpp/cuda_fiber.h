// A function on a stack of its own, which can pause and be resumed: what cuda_emulator.h makes threads of.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// Stacks are used again: a block has as many as the one before it.
class Stack {
 public:
  static constexpr size_t kBytes = size_t{256} << 10;

  Stack() {
    if (pool().empty()) {
      data_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data_ == MAP_FAILED) std::abort();
    } else {
      data_ = pool().back();
      pool().pop_back();
    }
  }
  ~Stack() { pool().push_back(data_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* data() const { return data_; }

 private:
  static std::vector<void*>& pool() {
    static std::vector<void*> stacks;
    return stacks;
  }
  void* data_;
};

#if defined(__x86_64__)
// Saves what a callee must keep on this stack, its top in *from, and goes on where `to` was left.
extern "C" void bmf_switch_stacks(void** from, void* to);
asm(R"(
.text
.globl bmf_switch_stacks
.type bmf_switch_stacks, @function
bmf_switch_stacks:
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
.size bmf_switch_stacks, .-bmf_switch_stacks
)");
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // `body` begins at the first resume.
  void start(std::function<void()> body) {
    body_ = std::move(body);
#if defined(__x86_64__)
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_.data()) + Stack::kBytes);
    *--top = 0;  // where a return address would be: entry never returns
    *--top = reinterpret_cast<uintptr_t>(&Fiber::entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.data();
    own_.uc_stack.ss_size = Stack::kBytes;
    makecontext(&own_, &Fiber::entry, 0);
#endif
  }

  // Runs the body until it pauses or ends.
  void resume() {
    running_ = this;
    enter(&fake_outside_, stack_.data(), Stack::kBytes);
    switch_contexts(outside_, own_);
    left(fake_outside_, nullptr, nullptr);
  }
  void pause() {
    enter(&fake_own_, outside_stack_, outside_bytes_);
    switch_contexts(own_, outside_);
    left(fake_own_, &outside_stack_, &outside_bytes_);
  }

 private:
#if defined(__x86_64__)
  using Context = void*;
  static void switch_contexts(Context& from, Context& to) { bmf_switch_stacks(&from, to); }
#else
  using Context = ucontext_t;
  static void switch_contexts(Context& from, Context& to) { swapcontext(&from, &to); }
#endif
  // AddressSanitizer wants to know whose stack it is on.
#if defined(__SANITIZE_ADDRESS__)
  static void enter(void** save, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(save, stack, bytes);
  }
  static void left(void* saved, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(saved, stack, bytes);
  }
#else
  static void enter(void**, const void*, size_t) {}
  static void left(void*, const void**, size_t*) {}
#endif

  static void entry() {
    Fiber* self = running_;
    left(nullptr, &self->outside_stack_, &self->outside_bytes_);
    self->body_();
    enter(nullptr, self->outside_stack_, self->outside_bytes_);
    switch_contexts(self->own_, self->outside_);
    std::abort();
  }

  inline static Fiber* running_ = nullptr;
  Stack stack_;
  std::function<void()> body_;
  Context own_{}, outside_{};
  void *fake_own_ = nullptr, *fake_outside_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
};

}  // namespace emulator
