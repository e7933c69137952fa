// Fibers, the schedule, barriers and warp collectives.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <memory>

#include "block.h"

#if defined(__SANITIZE_ADDRESS__)
#define FASTATTN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTATTN_ASAN 1
#endif
#endif
#if defined(FASTATTN_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The switch between fibers: a few instructions where they are written below, else ucontext, which makes a system call.
#if !defined(__x86_64__) || defined(__CYGWIN__) || defined(FASTATTN_EMULATE_UCONTEXT)
#define FASTATTN_UCONTEXT 1
#include <ucontext.h>
#else
extern "C" void fastattn_switch_stack(void** save, void* load);
// Saves what the System V ABI wants preserved on the old stack, changes to the new one and pops the same there.
asm(R"(
.text
.globl fastattn_switch_stack
.hidden fastattn_switch_stack
.type fastattn_switch_stack, @function
fastattn_switch_stack:
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
.size fastattn_switch_stack, .-fastattn_switch_stack
.section .note.GNU-stack, "", @progbits
.text
)");
#endif

namespace fastattn::cuda {
namespace emulator {

__thread const Position* position = nullptr;
__thread Block* block = nullptr;
__thread Thread* thread = nullptr;
RaceObserver* race_observer = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;
// Behind the shared memory without a sanitizer: a kernel that writes here wrote beyond its shared memory.
constexpr size_t kCanaryBytes = 4096;

#if defined(FASTATTN_ASAN)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

struct Seed {
  bool set = false;  // by set_seed, in this OS thread
  uint64_t value = 0;
};

thread_local Seed chosen_seed;

uint64_t current_seed() {
  if (chosen_seed.set) return chosen_seed.value;
  const char* text = std::getenv("FASTATTN_EMULATE_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

// The stacks of the fibers, kept from launch to launch. A page without access lies below each.
class Stacks {
 public:
  ~Stacks() { release(); }

  unsigned char* reserve(int count) {
    if (count > count_) {
      release();
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      stride_ = kStackBytes + page;
      void* memory = mmap(nullptr, stride_ * static_cast<size_t>(count), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<unsigned char*>(memory);
      count_ = count;
      for (int n = 0; n < count; ++n) mprotect(base_ + stride_ * static_cast<size_t>(n), page, PROT_NONE);
      page_ = page;
    }
    return base_;
  }

  unsigned char* stack(int n) const { return base_ + stride_ * static_cast<size_t>(n) + page_; }
  const unsigned char* low() const { return base_; }
  const unsigned char* high() const { return base_ + stride_ * static_cast<size_t>(count_); }

 private:
  void release() {
    if (base_ == nullptr) return;
#if defined(FASTATTN_ASAN)
    // Frames of fibers that never returned left their red zones in the shadow memory.
    __asan_unpoison_memory_region(base_, stride_ * static_cast<size_t>(count_));
#endif
    munmap(base_, stride_ * static_cast<size_t>(count_));
    base_ = nullptr;
    count_ = 0;
  }

  unsigned char* base_ = nullptr;
  size_t stride_ = 0, page_ = 0;
  int count_ = 0;
};

Stacks& stacks() {
  thread_local Stacks value;
  return value;
}

// What an error message says about where it happened.
std::string place(const Thread* culprit) {
  if (block == nullptr) return "";
  std::string text = std::string(" [kernel ") + block->kernel_name;
  const Position& at = culprit ? culprit->position : block->threads.front().position;
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  text += ", block " + triple(at.block.x, at.block.y, at.block.z);
  if (culprit) {
    text += ", thread " + triple(at.thread.x, at.thread.y, at.thread.z) + " = warp " + std::to_string(culprit->warp) +
            " lane " + std::to_string(culprit->lane);
  }
  return text + "]";
}

std::string format_message(const char* format, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

}  // namespace

// Runs one block after the other. Everything here is on the stack of launch()'s caller, except entry() and leave().
class Runner {
 public:
  Runner(const char* kernel_name, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* context)
      : grid_(grid), block_size_(block_size), body_(body), context_(context) {
    block_.kernel_name = kernel_name;
    block_.capability = device_info().capability;
    block_.shared_bytes = shared_bytes;
    const int count = static_cast<int>(block_size.x * block_size.y * block_size.z);
    block_.threads.resize(static_cast<size_t>(count));
    block_.warps.resize(static_cast<size_t>((count + kWarpSize - 1) / kWarpSize));
    stacks().reserve(count);
    for (int n = 0; n < count; ++n) {
      Thread& t = block_.threads[static_cast<size_t>(n)];
      t.index = n;
      t.lane = n % kWarpSize;
      t.warp = n / kWarpSize;
      t.stack = stacks().stack(n);
      const unsigned u = static_cast<unsigned>(n);
      t.position.thread = {u % block_size.x, u / block_size.x % block_size.y, u / block_size.x / block_size.y};
      t.position.block_size = block_size;
      t.position.grid_size = grid;
    }
#if defined(FASTATTN_UCONTEXT)
    contexts_.resize(static_cast<size_t>(count));
    for (int n = 0; n < count; ++n) block_.threads[static_cast<size_t>(n)].context = &contexts_[static_cast<size_t>(n)];
    scheduler_ = &scheduler_context_;
#endif
    allocate_shared();
    block = &block_;
    runner = this;
    if (race_observer) race_observer->start_launch(stacks().low(), stacks().high());
  }

  ~Runner() {
    std::free(allocation_);
    block = nullptr;
    thread = nullptr;
    position = nullptr;
    runner = nullptr;
  }

  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  void run_grid() {
    const int64_t count = static_cast<int64_t>(grid_.x) * grid_.y * grid_.z;
    for (int64_t n = 0; n < count; ++n) run_block(seed_ % 2 ? count - 1 - n : n);
  }

  // On a fiber: back to the scheduler. `ended`: the fiber will not be resumed.
  void leave(bool ended) {
    Thread* const me = thread;
#if defined(FASTATTN_ASAN)
    __sanitizer_start_switch_fiber(ended ? nullptr : &me->fake_stack, caller_stack_, caller_stack_bytes_);
#else
    static_cast<void>(ended);
#endif
#if defined(FASTATTN_UCONTEXT)
    swapcontext(static_cast<ucontext_t*>(me->context), &scheduler_context_);
#else
    fastattn_switch_stack(&me->context, scheduler_);
#endif
#if defined(FASTATTN_ASAN)
    __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
  }

  // Takes the text out of `message`: the frames of the fiber are abandoned, so nothing in them may own memory.
  [[noreturn]] void fail_on_fiber(std::string& message) {
    error_.swap(message);
    failed_ = true;
    leave(true);
    std::abort();
  }

  int live() const { return live_; }  // threads that have not returned
  bool on_fiber() const { return on_fiber_; }

  static void complete(Barrier& barrier);

  static __thread Runner* runner;  // of this OS thread; null when it runs no kernel

 private:
  void release_block_barrier();

  void allocate_shared() {
    if (block_.shared_bytes == 0) return;
#if defined(FASTATTN_ASAN)
    const size_t bytes = block_.shared_bytes;
#else
    const size_t bytes = block_.shared_bytes + kCanaryBytes;
#endif
    if (posix_memalign(&allocation_, 1024, bytes) != 0) throw std::bad_alloc();
    block_.shared = static_cast<unsigned char*>(allocation_);
    allocation_bytes_ = bytes;
  }

  void run_block(int64_t index) {
    block_.index = index;
    block_.random_state_ =
        (seed_ + 1) * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(index) * 0xBF58476D1CE4E5B9ull + 1;
    const uint3 at = {static_cast<unsigned>(index % grid_.x), static_cast<unsigned>(index / grid_.x % grid_.y),
                      static_cast<unsigned>(index / grid_.x / grid_.y)};
    if (block_.shared) std::memset(block_.shared, kPoison, allocation_bytes_);
    for (Barrier& barrier : block_.barriers) barrier = Barrier{};
    for (Warp& warp : block_.warps) warp = Warp{};
    block_.loads.clear();
    block_.mbarriers.clear();
    block_.wgmma_log.assign((block_.threads.size() + kWarpgroupSize - 1) / kWarpgroupSize, {});
    for (Thread& t : block_.threads) {
      t.position.block = at;
      t.done = false;
      t.waits_in = "nothing";
      start_thread(t);
      start_fiber(t);
      block_.warps[static_cast<size_t>(t.warp)].runnable |= 1u << t.lane;
    }
    for (Warp& warp : block_.warps) warp.alive = warp.runnable;
    live_ = static_cast<int>(block_.threads.size());
    if (race_observer) race_observer->start_block();
    schedule();
    finish_block();
    check_canary();
  }

  // One warp runs as far ahead as it can, then another random one does.
  void schedule() {
    int current = -1;
    // Asynchronous work gets done as late as possible, now and then before that, or soon: by the seed.
    const uint64_t one_in = seed_ % 3 == 0 ? 0 : seed_ % 3 == 1 ? 64 : 4;
    while (live_ > 0) {
      if (one_in != 0 && (!block_.loads.empty() || deferred()) && block_.random() % one_in == 0) finish_something();
      if (current < 0 || block_.warps[static_cast<size_t>(current)].runnable == 0) current = choose_warp();
      if (current < 0) {
        if (finish_something()) continue;
        report_deadlock();
      }
      Warp& warp = block_.warps[static_cast<size_t>(current)];
      resume_fiber(block_.threads[static_cast<size_t>(current * kWarpSize + choose_lane(warp.runnable))]);
    }
  }

  bool deferred() const {
    for (const Warp& warp : block_.warps) {
      if (warp.deferred) return true;
    }
    return false;
  }

  // Lets a deferred warp go on, or a TMA load land; false when there is neither. A wgmma that reads what a load has not
  // brought yet shows best when the loads come last, the default; other faults may need another order.
  bool finish_something() {
    const size_t count = block_.warps.size(), loads = seed_ % 3 == 0 ? 0 : block_.loads.size();
    const size_t start = static_cast<size_t>(block_.random() % (count + loads));
    if (start >= count) return land_a_load();
    for (size_t n = 0; n < count; ++n) {
      Warp& warp = block_.warps[(start + n) % count];
      if (warp.deferred == 0) continue;
      warp.runnable |= warp.deferred;
      warp.deferred = 0;
      return true;
    }
    return land_a_load();
  }

  int choose_warp() {
    const int count = static_cast<int>(block_.warps.size());
    const int start = static_cast<int>(block_.random() % static_cast<uint64_t>(count));
    for (int n = 0; n < count; ++n) {
      const int candidate = (start + n) % count;
      if (block_.warps[static_cast<size_t>(candidate)].runnable) return candidate;
    }
    return -1;
  }

  int choose_lane(uint32_t runnable) {
    const int start = static_cast<int>(block_.random() % kWarpSize);
    const uint32_t rotated = start == 0 ? runnable : runnable >> start | runnable << (kWarpSize - start);
    return (start + __builtin_ctz(rotated)) % kWarpSize;
  }

  void start_fiber(Thread& t) {
#if defined(FASTATTN_ASAN)
    __asan_unpoison_memory_region(t.stack, kStackBytes);
    t.fake_stack = nullptr;
#endif
#if defined(FASTATTN_UCONTEXT)
    ucontext_t* const context = static_cast<ucontext_t*>(t.context);
    getcontext(context);
    context->uc_stack.ss_sp = t.stack;
    context->uc_stack.ss_size = kStackBytes;
    context->uc_link = nullptr;
    makecontext(context, &Runner::entry, 0);
#else
    // As if entry() had been left by fastattn_switch_stack: six saved registers below its address. A function starts
    // with its stack pointer 8 below a multiple of 16.
    void** top = reinterpret_cast<void**>(t.stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(&Runner::entry);
    for (int n = 0; n < 6; ++n) *--top = nullptr;
    t.context = top;
#endif
  }

  void resume_fiber(Thread& t) {
    block_.warps[static_cast<size_t>(t.warp)].runnable &= ~(1u << t.lane);
    thread = &t;
    position = &t.position;
    on_fiber_ = true;
#if defined(FASTATTN_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, t.stack, kStackBytes);
#endif
#if defined(FASTATTN_UCONTEXT)
    swapcontext(&scheduler_context_, static_cast<ucontext_t*>(t.context));
#else
    fastattn_switch_stack(&scheduler_, t.context);
#endif
#if defined(FASTATTN_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    on_fiber_ = false;
    thread = nullptr;
    position = nullptr;
    if (failed_) throw EmulationError(error_);
    if (t.done) end_thread(t);
  }

  static void entry() {
    Runner* const self = runner;
#if defined(FASTATTN_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_bytes_);
#endif
    self->body_(self->context_);
    thread->done = true;
    self->leave(true);
    std::abort();
  }

  void end_thread(Thread& t) {
    finish_thread(t);
    --live_;
    block_.warps[static_cast<size_t>(t.warp)].alive &= ~(1u << t.lane);
    // A block barrier counts the threads that have not returned.
    release_block_barrier();
  }

  void check_canary() {
#if !defined(FASTATTN_ASAN)
    if (block_.shared == nullptr) return;
    for (size_t n = 0; n < kCanaryBytes; ++n) {
      if (block_.shared[block_.shared_bytes + n] != kPoison) {
        fail("wrote to offset %zu of %zu bytes of shared memory", block_.shared_bytes + n, block_.shared_bytes);
      }
    }
#endif
  }

  [[noreturn]] void report_deadlock() {
    std::string waits;
    for (size_t w = 0; w < block_.warps.size(); ++w) {
      // Lanes of a warp that wait in the same operation share an entry.
      uint32_t told = 0;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const size_t index = w * kWarpSize + static_cast<size_t>(lane);
        if (!(block_.warps[w].alive >> lane & 1) || (told >> lane & 1)) continue;
        uint32_t same = 0;
        for (int other = lane; other < kWarpSize && w * kWarpSize + static_cast<size_t>(other) < block_.threads.size();
             ++other) {
          const Thread& o = block_.threads[w * kWarpSize + static_cast<size_t>(other)];
          if (!o.done && std::strcmp(o.waits_in, block_.threads[index].waits_in) == 0) same |= 1u << other;
        }
        told |= same;
        char entry_text[128];
        std::snprintf(entry_text, sizeof entry_text, "; warp %zu lanes %08x in %s", w, same,
                      block_.threads[index].waits_in);
        waits += entry_text;
      }
    }
    throw EmulationError("deadlock: " + std::to_string(live_) + " threads wait" + waits + place(nullptr));
  }

  Block block_;
  const uint64_t seed_ = current_seed();
  dim3 grid_, block_size_;
  void (*body_)(void*);
  void* context_;
  void* allocation_ = nullptr;
  size_t allocation_bytes_ = 0;
  int live_ = 0;
  bool on_fiber_ = false;
  bool failed_ = false;
  std::string error_;
  void* scheduler_ = nullptr;  // saved stack pointer of the caller
#if defined(FASTATTN_UCONTEXT)
  ucontext_t scheduler_context_;
  std::vector<ucontext_t> contexts_;
#endif
#if defined(FASTATTN_ASAN)
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
#endif
};

__thread Runner* Runner::runner = nullptr;

// ---- errors ----

void fail_with(const Thread* culprit, const char* format, va_list arguments) {
  std::string message = format_message(format, arguments);
  message += place(culprit);
  if (!Runner::runner || !Runner::runner->on_fiber()) throw EmulationError(message);
  Runner::runner->fail_on_fiber(message);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail_with(thread, format, arguments);
  va_end(arguments);
  std::abort();
}

void fail_for(const Thread& culprit, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail_with(&culprit, format, arguments);
  va_end(arguments);
  std::abort();
}

unsigned char* checked_shared(const Thread& culprit, const void* address, size_t bytes, size_t alignment,
                              const char* what) {
  const unsigned char* const p = static_cast<const unsigned char*>(address);
  const uintptr_t start = reinterpret_cast<uintptr_t>(block->shared), at = reinterpret_cast<uintptr_t>(p);
  if (at < start || at - start > block->shared_bytes || bytes > block->shared_bytes - (at - start)) {
    fail_for(culprit, "%s: %zu bytes at offset %lld are not inside the %zu bytes of shared memory", what, bytes,
             static_cast<long long>(at - start), block->shared_bytes);
  }
  if ((at - start) % alignment != 0) {
    fail_for(culprit, "%s: misaligned shared memory offset %zu, it has to be a multiple of %zu", what,
             static_cast<size_t>(at - start), alignment);
  }
  return const_cast<unsigned char*>(p);
}

unsigned char* shared_memory() { return block->shared; }

// ---- waiting ----

void Block::suspend(const char* what) {
  thread->waits_in = what;
  Runner::runner->leave(false);
}

void Block::poll(const char* what) {
  warps[static_cast<size_t>(thread->warp)].polling |= 1u << thread->lane;
  suspend(what);
}

void Block::defer(const char* what) {
  warps[static_cast<size_t>(thread->warp)].deferred |= 1u << thread->lane;
  suspend(what);
}

void Block::notify() {
  for (Warp& warp : warps) {
    warp.runnable |= warp.polling;
    warp.polling = 0;
  }
}

uint64_t Block::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

// ---- barriers ----

void Runner::complete(Barrier& barrier) {
  // A barrier is a matter of whole warps (bar.sync is .aligned): lanes of one warp at different barriers are an error.
  uint32_t lanes[kMaxThreads / kWarpSize] = {};
  for (const Thread* member : barrier.members) lanes[member->warp] |= 1u << member->lane;
  for (const Thread* member : barrier.members) {
    const uint32_t missing = block->warps[static_cast<size_t>(member->warp)].alive & ~lanes[member->warp];
    if (missing) fail_for(*member, "barrier: the lanes %08x of the warp are not here", missing);
  }
  if (race_observer) race_observer->join(barrier.members.data(), barrier.members.size());
  for (Thread* waiting : barrier.waiting) block->resume(*waiting);
  barrier.expected = 0;
  barrier.arrived = 0;
  barrier.waiting.clear();
  barrier.members.clear();
}

void Runner::release_block_barrier() {
  Barrier& barrier = block->barriers[0];
  if (barrier.expected == -1 && barrier.arrived > 0 && barrier.arrived >= live_) complete(barrier);
}

namespace {

// `expected` -1: the whole block.
void arrive(int id, int expected, bool wait, const char* what) {
  if (id < 0 || id >= kNumBarriers) fail("%s: barrier %d, there are %d", what, id, kNumBarriers);
  if (expected != -1 && (expected <= 0 || expected % kWarpSize != 0)) {
    fail("%s: %d threads, it has to be a multiple of %d", what, expected, kWarpSize);
  }
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) {
    fail("%s: barrier %d is in use for %d threads, here for %d (-1: the block)", what, id, barrier.expected, expected);
  }
  ++barrier.arrived;
  barrier.members.push_back(thread);
  const int needed = expected == -1 ? Runner::runner->live() : expected;
  if (barrier.arrived > needed) fail("%s: %d threads at barrier %d for %d", what, barrier.arrived, id, needed);
  if (wait) barrier.waiting.push_back(thread);
  if (barrier.arrived == needed) {
    Runner::complete(barrier);
    // The last to arrive waits for its turn like the others.
    if (wait) block->suspend(what);
  } else if (wait) {
    block->suspend(what);
  }
}

}  // namespace

void block_barrier() { arrive(0, -1, true, "__syncthreads"); }
void named_barrier(int id, int threads) { arrive(id, threads, true, "bar.sync"); }
void named_barrier_arrive(int id, int threads) { arrive(id, threads, false, "bar.arrive"); }

// ---- warp collectives ----

void warp_collective(const Collective& collective, uint32_t mask, void* operands) {
  Warp& warp = block->warps[static_cast<size_t>(thread->warp)];
  const uint32_t me = 1u << thread->lane;
  if (!(mask & me)) fail("%s: the lane is not in its own mask %08x", collective.name, mask);
  if ((mask & warp.alive) != mask) {
    fail("%s: mask %08x names lanes that have returned or do not exist (there are %08x)", collective.name, mask,
         warp.alive);
  }
  OpenCollective* open = nullptr;
  for (int n = 0; n < warp.open_count; ++n) {
    OpenCollective& other = warp.open[n];
    if (other.collective == &collective && other.mask == mask) {
      open = &other;
    } else if ((other.mask & me) && (other.arrived & mask)) {
      // Each waits for the other somewhere else. (One-sided is fine: part of the warp has something to do before it
      // comes.)
      fail("diverged warp: this lane is in %s with mask %08x, lane %d in %s with mask %08x", collective.name, mask,
           __builtin_ctz(other.arrived), other.collective->name, other.mask);
    }
  }
  if (open == nullptr) {
    open = &warp.open[warp.open_count++];
    *open = {&collective, mask, 0};
  }
  open->arrived |= me;
  warp.operands[thread->lane] = operands;
  if (open->arrived != mask) {
    block->suspend(collective.name);
    return;
  }
  *open = warp.open[--warp.open_count];
  collective.run(mask, warp.operands);
  warp.runnable |= mask & ~me;
}

namespace {

struct ShuffleOperands {
  uint64_t value, result;
  int source;
};

void run_shuffle(uint32_t mask, void* const (&operands)[32]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    ShuffleOperands& mine = *static_cast<ShuffleOperands*>(operands[lane]);
    // A source outside the mask gives an undefined value: here NaN.
    mine.result = mask >> mine.source & 1 ? static_cast<ShuffleOperands*>(operands[mine.source])->value : ~uint64_t{0};
  }
}

const Collective kShuffles[] = {{"__shfl_sync", run_shuffle},
                                {"__shfl_xor_sync", run_shuffle},
                                {"__shfl_up_sync", run_shuffle},
                                {"__shfl_down_sync", run_shuffle}};

struct VoteOperands {
  uint32_t value, result;
};

void run_reduce_or(uint32_t mask, void* const (&operands)[32]) {
  uint32_t result = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1)
    result |= static_cast<VoteOperands*>(operands[__builtin_ctz(rest)])->value;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1)
    static_cast<VoteOperands*>(operands[__builtin_ctz(rest)])->result = result;
}

const Collective kBallot = {"a vote (__ballot_sync, __any_sync, __all_sync)", run_reduce_or};
const Collective kReduceOr = {"__reduce_or_sync", run_reduce_or};

void run_sync_warp(uint32_t mask, void* const (&)[32]) {
  if (race_observer == nullptr) return;
  Thread* members[kWarpSize];
  size_t count = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    members[count++] = &block->threads[static_cast<size_t>(thread->warp * kWarpSize + __builtin_ctz(rest))];
  }
  race_observer->join(members, count);
}

const Collective kSyncWarp = {"__syncwarp", run_sync_warp};

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument) {
  const int lane = thread->lane;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = argument & (kWarpSize - 1);
      break;
    case Shuffle::kXor:
      source = lane ^ argument;
      break;
    case Shuffle::kUp:
      source = lane - argument;
      break;
    case Shuffle::kDown:
      source = lane + argument;
      break;
  }
  if (source < 0 || source >= kWarpSize) source = lane;  // such a lane keeps its own value
  ShuffleOperands operands = {value, 0, source};
  warp_collective(kShuffles[static_cast<int>(kind)], mask, &operands);
  return operands.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  VoteOperands operands = {predicate ? 1u << thread->lane : 0u, 0};
  warp_collective(kBallot, mask, &operands);
  return operands.result;
}

uint32_t reduce_or(uint32_t mask, uint32_t value) {
  VoteOperands operands = {value, 0};
  warp_collective(kReduceOr, mask, &operands);
  return operands.result;
}

void sync_warp(uint32_t mask) { warp_collective(kSyncWarp, mask, nullptr); }

void note_atomic(const void* address, size_t bytes) {
  if (race_observer) race_observer->atomic(*thread, address, bytes);
}

void note_device_fence() {
  if (race_observer) race_observer->device_fence(*thread);
}

// ---- launching ----

void set_seed(uint64_t value) { chosen_seed = {true, value}; }

void run(const char* kernel_name, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* context) {
  const auto refuse = [&](const std::string& why) { throw EmulationError(why + " [kernel " + kernel_name + "]"); };
  if (block != nullptr) refuse("a kernel launched from inside a kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("an empty grid");
  if (grid.x > 0x7fffffffu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    refuse("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
           ") blocks; the limits are (2^31 - 1, 65535, 65535)");
  }
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > kMaxThreads || block_size.z > 64)
    refuse("a block of " + std::to_string(threads) + " threads");
  const size_t most = device_info().shared_bytes_per_block_optin;
  if (shared_bytes > most) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory; the device has " + std::to_string(most));
  }
  Runner(kernel_name, grid, block_size, shared_bytes, body, context).run_grid();
}

}  // namespace emulator

// ---- the host interface of platform.h ----

DeviceInfo device_info() {
  // Read each time: tests change it.
  const char* text = std::getenv("FASTATTN_EMULATE_CAPABILITY");
  DeviceInfo info;
  info.capability = text ? std::atoi(text) : 90;
  if (info.capability != 80 && info.capability != 90 && info.capability != 100) {
    throw LaunchError(std::string("FASTATTN_EMULATE_CAPABILITY is ") + text + ", accepted are 80, 90 and 100");
  }
  info.multiprocessors = 4;  // few, so that small tests run several tiles on each block of a persistent kernel
  info.shared_bytes_per_block_optin = info.capability == 80 ? 163 * 1024 : 227 * 1024;
  return info;
}

void zero_async(void* ptr, size_t bytes, void*) { std::memset(ptr, 0, bytes); }

}  // namespace fastattn::cuda
