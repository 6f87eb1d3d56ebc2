// Stackful coroutines: `switch_stack` saves what a call must preserve and continues another stack.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" void emu_switch_stack(void** save, void* load);

#define FIBER_STR_(x) #x
#define FIBER_STR(x) FIBER_STR_(x)
#define FIBER_SYMBOL FIBER_STR(__USER_LABEL_PREFIX__) "emu_switch_stack"

#if defined(__x86_64__)
__asm__(".text\n.globl " FIBER_SYMBOL "\n" FIBER_SYMBOL ":\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
        "  retq\n");
constexpr size_t RETURN_WORD = 6, FRAME_WORDS = 8;
#elif defined(__aarch64__)
__asm__(".text\n.globl " FIBER_SYMBOL "\n" FIBER_SYMBOL ":\n"
        "  sub sp, sp, #160\n"
        "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
        "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
        "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
        "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
        "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
        "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
        "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
        "  add sp, sp, #160\n  ret\n");
constexpr size_t RETURN_WORD = 11, FRAME_WORDS = 20;
#else
#error "no stack switch for this processor"
#endif

// A stack that starts in `entry` (which never returns) when switched to. `top` is 16-byte aligned.
inline void* new_stack(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top) - FRAME_WORDS;
  for (size_t i = 0; i < FRAME_WORDS; i++) frame[i] = nullptr;
  frame[RETURN_WORD] = reinterpret_cast<void*>(entry);
  return frame;
}
