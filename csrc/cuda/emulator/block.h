// The inside of the emulator, shared by its source files: the state of the block that is running.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "instructions.h"

namespace fastattn::cuda::emulator {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr int kNumBarriers = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in float, bfloat16 and half alike

// A 16-byte cp.async that has been issued and has not landed.
struct PendingCopy {
  unsigned char* destination;
  const void* source;
  int bytes;  // read from the source; the rest is zeros
  int64_t group;
};

// A wgmma that was issued and whose warp has not waited for it.
struct PendingWgmma {
  WgmmaShape shape;
  uint32_t a[4];
  uint64_t descriptor_a, descriptor_b;
  float* d;
  int64_t group;
};

// What has to be equal in all threads that issue a wgmma together.
struct WgmmaRecord {
  WgmmaShape shape;
  uint64_t descriptor_a, descriptor_b;
};

// An accumulator that wgmmas in flight add to. The registers hold NaN meanwhile.
struct Accumulator {
  float* d;
  std::vector<float> value;
};

struct WgmmaState {
  std::vector<PendingWgmma> pending;
  std::vector<Accumulator> accumulators;
  int64_t issued = 0;
  int64_t group = 0;
  bool fenced = false;  // wgmma_fence since the thread last waited
};

// A TMA transfer in flight: of a box of a tensor, or of a run of bytes (`linear`).
struct BulkTransfer {
  unsigned char* shared;
  EmulatedTensorMap map;
  int coordinate[4];
  unsigned char* linear;
  uint32_t bytes;
  uint64_t* barrier;
  int64_t group;
  int64_t ticket;  // of the race check
};

struct Thread {
  Position position;
  int index = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waits_in = "nothing";  // the operation it is blocked in, for messages

  // Asynchronous operations it issued and has to wait for; a group number counts the commits before it.
  std::vector<PendingCopy> copies;
  int64_t copy_group = 0;
  std::vector<BulkTransfer> stores;
  int64_t store_group = 0;
  WgmmaState wgmma;
  int registers = 0;  // as set by setmaxnreg; 0 when it never was

  // Fiber.
  unsigned char* stack = nullptr;  // lowest address
  void* context = nullptr;         // saved stack pointer, or ucontext_t
  void* fake_stack = nullptr;      // address sanitizer
};

struct Barrier {
  int expected = 0;  // threads of the round in progress; 0 when nobody has arrived, -1 the whole block
  int arrived = 0;   // including those that only arrive
  std::vector<Thread*> waiting;
  std::vector<Thread*> members;  // everybody who arrived, for the race check
};

// A warp collective that some of its lanes have arrived at.
struct OpenCollective {
  const Collective* collective;
  uint32_t mask, arrived;
};

struct Warp {
  uint32_t runnable = 0;  // lanes that the scheduler may resume
  uint32_t alive = 0;     // lanes that have not returned
  uint32_t polling = 0;   // lanes that look again after the next notify()
  uint32_t deferred = 0;  // lanes that go on only when nothing else can
  int open_count = 0;     // more than one only when parts of the warp work apart
  OpenCollective open[kWarpSize];
  void* operands[kWarpSize];  // what each lane passed to the collective it is in
};

class Block {
 public:
  const char* kernel_name = "";
  int capability = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNumBarriers];
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<BulkTransfer> loads;  // TMA loads in flight
  std::vector<const uint64_t*> mbarriers;
  std::vector<std::vector<WgmmaRecord>> wgmma_log;  // per warpgroup: what its n-th wgmma was
  int64_t index = 0;                                // in the grid

  // For the running thread.
  void suspend(const char* what);  // until somebody calls resume() for it
  void poll(const char* what);     // until the next notify()
  void defer(const char* what);    // until nothing else can run, or for a random time; the whole warp does it

  void resume(Thread& thread) { warps[thread.warp].runnable |= 1u << thread.lane; }
  void notify();  // something that a polling thread may wait for has happened

  uint64_t random();  // xorshift

 private:
  friend class Runner;
  uint64_t random_state_ = 1;
};

extern __thread Block* block;
extern __thread Thread* thread;  // null on the stack of launch()'s caller

// As fail(), blaming `culprit` instead of the running thread.
[[noreturn]] void fail_for(const Thread& culprit, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Checks that [address, address + bytes) is dynamic shared memory and aligned; fails for `culprit` otherwise.
unsigned char* checked_shared(const Thread& culprit, const void* address, size_t bytes, size_t alignment,
                              const char* what);

// ---- instructions.cpp ----

void start_thread(Thread& thread);   // fresh state of the asynchronous instructions
void finish_thread(Thread& thread);  // fails when the thread leaves something asynchronous behind
void finish_block();
bool land_a_load();  // completes a randomly chosen TMA load; false when there is none

// ---- race check ----

// Shared memory is reached by two proxies: loads, stores and mma operands by the generic one, wgmma operands and TMA by
// the asynchronous one. What one wrote the other sees after a proxy fence only.
enum class Proxy { kGeneric, kAsync };

// Receives the accesses and the synchronisation of the running block; null unless a kernel was compiled for the race
// check (race_check.cpp).
class RaceObserver {
 public:
  virtual void start_launch(const unsigned char* stacks_low, const unsigned char* stacks_high) = 0;
  virtual void start_block() = 0;
  virtual void read(const Thread& by, const void* address, size_t bytes, Proxy proxy, const char* what) = 0;
  virtual void write(const Thread& by, const void* address, size_t bytes, const char* what) = 0;
  virtual void atomic(const Thread& by, const void* address, size_t bytes) = 0;
  // A read that a whole warp does as one (ldmatrix, wgmma): it is over for all lanes when it is for one.
  // start_warp_read comes before the reads of one instruction.
  virtual void start_warp_read(int warp) = 0;
  virtual void warp_read(const void* address, size_t bytes, Proxy proxy, const char* what) = 0;
  // Everybody in the list has met: what any did before, all know from now on.
  virtual void join(Thread* const* members, size_t count) = 0;
  // What `by` did and knows is handed to whoever acquires the key.
  virtual void release(const Thread& by, const void* key) = 0;
  virtual void acquire(const Thread& by, const void* key) = 0;
  virtual void proxy_fence(const Thread& by) = 0;
  virtual void device_fence(const Thread& by) = 0;
  // A TMA load writes from its issue on; with the ticket it hands that over to its barrier when it lands.
  virtual int64_t async_write(const Thread& by, const void* address, size_t bytes, const char* what) = 0;
  virtual void async_landed(int64_t ticket, const void* key) = 0;

 protected:
  ~RaceObserver() = default;
};

extern RaceObserver* race_observer;

}  // namespace fastattn::cuda::emulator
