// Finds accesses of two threads to the same memory, one of them a write, that no synchronisation orders.
//
// A kernel compiled with -fsanitize=thread calls a __tsan_* function at every access to memory. The functions below
// take the place of the thread sanitizer's library, whose threads are not ours: they feed a race check over the threads
// of the emulated block. It watches as soon as one such object file is part of the program; otherwise it costs nothing.
//
// The check is by vector clocks: the clock of an actor tells, for each actor, up to which of its epochs it knows what
// it did. An access is a race unless the accessing actor knows the epoch of every conflicting access before it. Actors
// are the threads of the block, one for all TMA loads, and one per warp for the reads that a warp does as one.
//
// Shared memory starts afresh with every block. In global memory, accesses from different blocks of a launch are
// ordered by one thing only: __threadfence and then an atomic in the first block, an atomic and then __threadfence in
// the second.
#include <algorithm>
#include <map>
#include <memory>
#include <unordered_map>

#include "block.h"

namespace fastattn::cuda::emulator {
namespace {

using Clock = std::vector<uint32_t>;

void merge(Clock& into, const Clock& from) {
  for (size_t n = 0; n < into.size(); ++n) into[n] = std::max(into[n], from[n]);
}

// What an actor knows.
struct Knowledge {
  Clock known;
  Clock fenced;  // of that, what has passed a proxy fence
  // Publications of other blocks: those with numbers below have been seen, and have passed __threadfence since.
  int64_t seen = 0, published = 0;

  void reset(size_t actors) {
    known.assign(actors, 0);
    fenced.assign(actors, 0);
    seen = published = 0;
  }
  void learn(const Knowledge& other) {
    merge(known, other.known);
    merge(fenced, other.fenced);
    seen = std::max(seen, other.seen);
    published = std::max(published, other.published);
  }
};

// What a thread knew at its last __threadfence, made known by an atomic after that.
struct Publication {
  int64_t block;
  Clock clock;
};

struct Access {
  int actor = -1;
  uint32_t epoch = 0;
  const char* what = "";
  bool asynchronous = false;
};

// The accesses to one byte that a later one may race with.
struct Byte {
  Access writer;  // the last write
  // Since then, one entry for each actor.
  std::vector<Access> readers, atomics;
  int64_t block = -1;  // whose accesses these are
  // Also by another block, in this launch.
  bool read_elsewhere = false, atomic_elsewhere = false;
};

// Byte states of some memory, in pages made at the first access.
class Shadow {
 public:
  static constexpr size_t kPageBytes = 1024;

  void clear() { pages_.clear(); }

  Byte& at(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    if (page != last_page_ || pages_.empty()) {
      std::unique_ptr<Byte[]>& bytes = pages_[page];
      if (!bytes) bytes.reset(new Byte[kPageBytes]);
      last_ = bytes.get();
      last_page_ = page;
    }
    return last_[address % kPageBytes];
  }

 private:
  std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages_;
  uintptr_t last_page_ = 0;
  Byte* last_ = nullptr;
};

// The state of one OS thread's launch.
struct State {
  std::vector<Knowledge> actors;
  std::unordered_map<const void*, Knowledge> keys;
  std::map<int64_t, Knowledge> landing;  // TMA loads in flight, by ticket
  int64_t next_ticket = 0;
  std::vector<Clock> before_fence;        // of each thread at its last __threadfence; empty before the first
  std::vector<Publication> publications;  // in this launch
  Shadow shared, global;
  uintptr_t stacks_low = 0, stacks_high = 0;
  Knowledge reader;  // what all lanes know in the warp read in progress
  int reading_warp = 0;

  int threads() const { return static_cast<int>(block->threads.size()); }
  int tma() const { return threads(); }
  int warp_actor(int warp) const { return threads() + 1 + warp; }
  Knowledge& of(int actor) { return actors[static_cast<size_t>(actor)]; }
  uint32_t& epoch(int actor) { return of(actor).known[static_cast<size_t>(actor)]; }
};

State& state() {
  thread_local State value;
  return value;
}

bool in_shared(uintptr_t address) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(block->shared);
  return block->shared != nullptr && address >= start && address - start < block->shared_bytes;
}

std::string name_of(int actor) {
  if (actor == state().tma()) return "TMA";
  if (actor > state().tma()) return "warp " + std::to_string(actor - state().tma() - 1);
  return "thread " + std::to_string(actor);
}

[[noreturn]] void report(const char* kind, uintptr_t address, const Access& before, const Access& now,
                         const char* missing) {
  const bool shared = in_shared(address);
  char where[64], text[384];
  std::snprintf(where, sizeof where, shared ? "shared memory offset %zu" : "global memory %#zx",
                static_cast<size_t>(shared ? address - reinterpret_cast<uintptr_t>(block->shared) : address));
  {
    const std::string other = name_of(before.actor), me = name_of(now.actor);
    std::snprintf(text, sizeof text, "race (%s) on %s: %s by %s, then %s by %s, without %s", kind, where, before.what,
                  other.c_str(), now.what, me.c_str(), missing);
  }
  fail("%s", text);
}

[[noreturn]] void report_blocks(uintptr_t address, const char* before, const Access& now) {
  fail("race on global memory %#zx: %s in another block of the grid and %s here", static_cast<size_t>(address), before,
       now.what);
}

enum class Kind { kRead, kWrite, kAtomic };

// Whether somebody who knows `mine` knows of an access of another block.
bool published(int64_t of_block, const Access& before, const Knowledge& mine) {
  const std::vector<Publication>& all = state().publications;
  for (size_t n = 0; n < static_cast<size_t>(mine.published); ++n) {
    if (all[n].block == of_block && before.epoch <= all[n].clock[static_cast<size_t>(before.actor)]) return true;
  }
  return false;
}

// Only global memory outlives a block.
void check_other_blocks(Byte& byte, const Access& now, Kind kind, const Knowledge& mine, uintptr_t address) {
  if (byte.block != block->index) {
    if (byte.writer.actor >= 0 && !published(byte.block, byte.writer, mine))
      report_blocks(address, byte.writer.what, now);
    byte.writer = Access{};
    byte.read_elsewhere |= !byte.readers.empty();
    byte.atomic_elsewhere |= !byte.atomics.empty();
    byte.readers.clear();
    byte.atomics.clear();
    byte.block = block->index;
  }
  if (byte.read_elsewhere && kind != Kind::kRead) report_blocks(address, "load", now);
  if (byte.atomic_elsewhere && kind != Kind::kAtomic) report_blocks(address, "atomic", now);
}

void check_order(const Access& before, const Access& now, const Knowledge& mine, const char* kind, uintptr_t address) {
  if (before.actor < 0 || before.actor == now.actor) return;
  if (before.epoch > mine.known[static_cast<size_t>(before.actor)]) {
    report(kind, address, before, now, "synchronisation between them");
  }
}

void record(std::vector<Access>& accesses, const Access& now) {
  for (Access& access : accesses) {
    if (access.actor == now.actor) {
      access = now;
      return;
    }
  }
  accesses.push_back(now);
}

// One access, `now`, by an actor that knows `mine`.
void check(const Access& now, Kind kind, const Knowledge& mine, const void* pointer, size_t bytes) {
  State& s = state();
  const uintptr_t start = reinterpret_cast<uintptr_t>(pointer);
  if (start >= s.stacks_low && start < s.stacks_high) return;  // local variables
  const bool shared = in_shared(start);
  Shadow& shadow = shared ? s.shared : s.global;
  for (uintptr_t address = start; address < start + bytes; ++address) {
    Byte& byte = shadow.at(address);
    check_other_blocks(byte, now, kind, mine, address);
    const Access& writer = byte.writer;
    check_order(writer, now, mine, kind == Kind::kRead ? "read after write" : "write after write", address);
    if (kind == Kind::kRead && shared && now.asynchronous && writer.actor >= 0 && !writer.asynchronous &&
        writer.epoch > mine.fenced[static_cast<size_t>(writer.actor)]) {
      report("proxy", address, writer, now, "fence_proxy_async between them");
    }
    if (kind != Kind::kAtomic) {
      for (const Access& atomic : byte.atomics) check_order(atomic, now, mine, "beside an atomic", address);
    }
    if (kind != Kind::kRead) {
      for (const Access& reader : byte.readers) check_order(reader, now, mine, "write after read", address);
    }
    if (kind == Kind::kRead) {
      record(byte.readers, now);
    } else if (kind == Kind::kAtomic) {
      record(byte.atomics, now);
    } else {
      byte.readers.clear();
      byte.atomics.clear();
      byte.writer = now;
    }
  }
}

class VectorClocks final : public RaceObserver {
 public:
  void start_launch(const unsigned char* stacks_low, const unsigned char* stacks_high) override {
    State& s = state();
    s.stacks_low = reinterpret_cast<uintptr_t>(stacks_low);
    s.stacks_high = reinterpret_cast<uintptr_t>(stacks_high);
    s.global.clear();
    s.publications.clear();
  }

  void start_block() override {
    State& s = state();
    const size_t count = block->threads.size() + 1 + block->warps.size();
    s.actors.resize(count);
    for (size_t n = 0; n < count; ++n) {
      s.actors[n].reset(count);
      s.actors[n].known[n] = 1;
    }
    s.before_fence.assign(block->threads.size(), Clock());
    s.keys.clear();
    s.landing.clear();
    s.shared.clear();
  }

  void read(const Thread& by, const void* address, size_t bytes, Proxy proxy, const char* what) override {
    State& s = state();
    check({by.index, s.epoch(by.index), what, proxy == Proxy::kAsync}, Kind::kRead, s.of(by.index), address, bytes);
  }

  void write(const Thread& by, const void* address, size_t bytes, const char* what) override {
    State& s = state();
    check({by.index, s.epoch(by.index), what, false}, Kind::kWrite, s.of(by.index), address, bytes);
  }

  void atomic(const Thread& by, const void* address, size_t bytes) override {
    State& s = state();
    check({by.index, s.epoch(by.index), "atomic", false}, Kind::kAtomic, s.of(by.index), address, bytes);
    const Clock& before_fence = s.before_fence[static_cast<size_t>(by.index)];
    if (!before_fence.empty() && !in_shared(reinterpret_cast<uintptr_t>(address))) {
      s.publications.push_back({block->index, before_fence});
    }
    s.of(by.index).seen = static_cast<int64_t>(s.publications.size());
  }

  void start_warp_read(int warp) override {
    State& s = state();
    s.reading_warp = warp;
    const int first = warp * kWarpSize, actor = s.warp_actor(warp);
    // The data go to every lane, so every lane has to know of the writes.
    s.reader = s.of(first);
    for (int lane = 1; lane < kWarpSize; ++lane) {
      const Knowledge& other = s.of(first + lane);
      for (size_t n = 0; n < s.reader.known.size(); ++n) {
        s.reader.known[n] = std::min(s.reader.known[n], other.known[n]);
        s.reader.fenced[n] = std::min(s.reader.fenced[n], other.fenced[n]);
      }
      s.reader.published = std::min(s.reader.published, other.published);
    }
    const uint32_t epoch = ++s.epoch(actor);
    for (int lane = 0; lane < kWarpSize; ++lane) s.of(first + lane).known[static_cast<size_t>(actor)] = epoch;
  }

  void warp_read(const void* address, size_t bytes, Proxy proxy, const char* what) override {
    State& s = state();
    const int actor = s.warp_actor(s.reading_warp);
    check({actor, s.epoch(actor), what, proxy == Proxy::kAsync}, Kind::kRead, s.reader, address, bytes);
  }

  void join(Thread* const* members, size_t count) override {
    State& s = state();
    Knowledge all = s.of(members[0]->index);
    for (size_t n = 1; n < count; ++n) all.learn(s.of(members[n]->index));
    for (size_t n = 0; n < count; ++n) {
      s.of(members[n]->index) = all;
      ++s.epoch(members[n]->index);
    }
  }

  void release(const Thread& by, const void* key) override {
    hand_over(key, state().of(by.index));
    ++state().epoch(by.index);
  }

  void acquire(const Thread& by, const void* key) override {
    State& s = state();
    const auto found = s.keys.find(key);
    if (found != s.keys.end()) s.of(by.index).learn(found->second);
  }

  void proxy_fence(const Thread& by) override {
    Knowledge& mine = state().of(by.index);
    mine.fenced = mine.known;
    ++state().epoch(by.index);  // what it writes from now on is not fenced
  }

  void device_fence(const Thread& by) override {
    State& s = state();
    Knowledge& mine = s.of(by.index);
    s.before_fence[static_cast<size_t>(by.index)] = mine.known;
    mine.published = mine.seen;
    ++s.epoch(by.index);  // what it writes from now on is not published
  }

  int64_t async_write(const Thread& by, const void* address, size_t bytes, const char* what) override {
    State& s = state();
    const int actor = s.tma();
    const uint32_t epoch = ++s.epoch(actor);
    Knowledge knowledge = s.of(by.index);
    check({actor, epoch, what, true}, Kind::kWrite, knowledge, address, bytes);
    ++s.epoch(by.index);
    knowledge.known[static_cast<size_t>(actor)] = epoch;
    s.landing[s.next_ticket] = std::move(knowledge);
    return s.next_ticket++;
  }

  void async_landed(int64_t ticket, const void* key) override {
    State& s = state();
    hand_over(key, s.landing[ticket]);
    s.landing.erase(ticket);
  }

 private:
  static void hand_over(const void* key, const Knowledge& knowledge) {
    const auto [place, fresh] = state().keys.try_emplace(key, knowledge);
    if (!fresh) place->second.learn(knowledge);
  }
};

void touched(const void* address, size_t bytes, Kind kind) {
  if (thread == nullptr) return;  // the host side of a file with kernels
  if (kind == Kind::kRead) {
    race_observer->read(*thread, address, bytes, Proxy::kGeneric, "load");
  } else {
    race_observer->write(*thread, address, bytes, "store");
  }
}

}  // namespace
}  // namespace fastattn::cuda::emulator

// ---- what the compilers call ----

using fastattn::cuda::emulator::Kind;
using fastattn::cuda::emulator::touched;

extern "C" {

// Called by a constructor of every object file that was compiled with -fsanitize=thread.
void __tsan_init() {
  static fastattn::cuda::emulator::VectorClocks observer;
  fastattn::cuda::emulator::race_observer = &observer;
}

void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, unsigned long bytes) { touched(address, bytes, Kind::kRead); }
void __tsan_write_range(void* address, unsigned long bytes) { touched(address, bytes, Kind::kWrite); }

void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  touched(from, bytes, Kind::kRead);
  touched(to, bytes, Kind::kWrite);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  touched(from, bytes, Kind::kRead);
  touched(to, bytes, Kind::kWrite);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  touched(to, bytes, Kind::kWrite);
  return std::memset(to, value, bytes);
}

#define FASTATTN_ACCESS(bytes)                                                               \
  void __tsan_read##bytes(void* address) { touched(address, bytes, Kind::kRead); }           \
  void __tsan_write##bytes(void* address) { touched(address, bytes, Kind::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* address) { touched(address, bytes, Kind::kRead); } \
  void __tsan_unaligned_write##bytes(void* address) { touched(address, bytes, Kind::kWrite); }
FASTATTN_ACCESS(1)
FASTATTN_ACCESS(2)
FASTATTN_ACCESS(4)
FASTATTN_ACCESS(8)
FASTATTN_ACCESS(16)
#undef FASTATTN_ACCESS

// C++ atomics, of the host code in such a file: done as they are.
#define FASTATTN_ATOMIC(bits, type)                                                                             \
  type __tsan_atomic##bits##_load(const volatile type* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* a, type v, int) { __atomic_store_n(a, v, __ATOMIC_SEQ_CST); } \
  type __tsan_atomic##bits##_exchange(volatile type* a, type v, int) {                                          \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_add(volatile type* a, type v, int) {                                         \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_sub(volatile type* a, type v, int) {                                         \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* a, type* expected, type v, int, int) {       \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* a, type* expected, type v, int, int) {         \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }
FASTATTN_ATOMIC(8, uint8_t)
FASTATTN_ATOMIC(16, uint16_t)
FASTATTN_ATOMIC(32, uint32_t)
FASTATTN_ATOMIC(64, uint64_t)
#undef FASTATTN_ATOMIC

}  // extern "C"
