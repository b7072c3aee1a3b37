// Threads as fibers: a stack each, and a switch that saves what a call must preserve.
#pragma once
#include "engine.h"

static const u64 STACK = 256 << 10;
static const u64 PAGE = 16 << 10;  // the larger of the pages of Linux and of a Mac

#if defined(__APPLE__)
#define SYMBOL(NAME) "_" NAME
#else
#define SYMBOL(NAME) NAME
#endif

extern "C" void emu_switch(void** kept, void* next);
#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL("emu_switch") "\n" SYMBOL("emu_switch") ":\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
static const u32 FRAME = 6, RETURN = 6;
#elif defined(__aarch64__)
asm(".text\n.globl " SYMBOL("emu_switch") "\n" SYMBOL("emu_switch") ":\n"
    "sub sp, sp, #176\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\n"
    "mov x2, sp\nstr x2, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #176\nret\n");
static const u32 FRAME = 22, RETURN = 11;
#else
#error "a processor without a fiber switch here"
#endif

static void leave() {
  E.in_fiber = 0;
  emu_switch(&E.current->sp, E.scheduler);
  E.in_fiber = 1;
}

// The end of this launch: the fiber is never resumed, and what is on its stack needs no release.
static void die() {
  E.stop = true;
  leave();
  __builtin_unreachable();
}

static void fiber_main() {
  Fiber* fiber = E.current;
  E.in_fiber = 1;
  E.launch->entry(E.launch->arguments, &fiber->at);
  fiber->state = DONE;
  leave();
  __builtin_unreachable();
}

static void start(Fiber* fiber) {
  // Equal offsets in every stack would put all of them on the same few lines of the cache.
  u64 top = (u64)(E.stacks + (fiber->thread + 1) * STACK) - (fiber->thread % 61) * 192 - 64;
  u64* sp = (u64*)(top & ~15ul) - FRAME - 2;
  memset(sp, 0, (FRAME + 2) * 8);
  sp[RETURN] = (u64)&fiber_main;
  fiber->sp = sp;
  fiber->state = RUNNING;
}

static void resume(Fiber* fiber) {
  E.current = fiber;
  fiber->state = RUNNING;
  emu_switch(&E.scheduler, fiber->sp);
}

// A collective: the thread stops here until its simdgroup or threadgroup has arrived.
static u64 wait(State state, u64 site) {
  Fiber* fiber = E.current;
  fiber->state = state;
  fiber->site = E.last_site = site;
  leave();
  return fiber->result;
}

// While this exists a time limit waits: what holds a lock of the system's must come to its end.
struct Shielded {
  Shielded() { E.in_fiber = 0; }
  ~Shielded() {
    E.in_fiber = 1;
    if (!E.cancel) return;
    report(HANG, E.last_site);
    die();
  }
};
