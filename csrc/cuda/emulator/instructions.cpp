// The PTX instructions that the kernels use, after the layouts of the PTX ISA.
#include "instructions.h"

#include <algorithm>

#include "../hopper.h"
#include "block.h"

namespace fastattn::cuda::emulator {

namespace {

// Eight floats as the compilers know them, so that the products are fast in every build. Loose alignment: they lie in
// arrays of floats.
typedef float Row8 __attribute__((vector_size(32), aligned(4), may_alias));

// The 8 bytes of an mbarrier. The tag tells it from memory that was never initialised, or has been overwritten.
struct MBarrier {
  uint64_t tag : 8, phase : 1, expected : 11, pending : 12;
  int64_t bytes : 32;  // expected and not yet arrived; below 0 when a copy lands before it is expected
};
static_assert(sizeof(MBarrier) == sizeof(uint64_t));
constexpr uint64_t kMBarrierTag = 0xb5;
constexpr int kMaxArrivals = 1023;

}  // namespace

// ---- state of the asynchronous instructions ----

void start_thread(Thread& t) {
  t.copies.clear();
  t.copy_group = 0;
  t.stores.clear();
  t.store_group = 0;
  t.registers = 0;
  t.wgmma = WgmmaState{};
}

void finish_thread(Thread& t) {
  if (!t.copies.empty()) fail_for(t, "the thread returned with %zu cp.async that it did not wait for", t.copies.size());
  if (!t.stores.empty())
    fail_for(t, "the thread returned with %zu TMA stores that it did not wait for", t.stores.size());
  if (!t.wgmma.pending.empty()) {
    fail_for(t, "the thread returned with %zu wgmma that it did not wait for", t.wgmma.pending.size());
  }
}

void finish_block() {
  if (!block->loads.empty()) fail("the block ended with %zu TMA loads in flight", block->loads.size());
  for (const uint64_t* address : block->mbarriers) {
    MBarrier barrier;
    std::memcpy(&barrier, address, sizeof barrier);
    if (barrier.tag == kMBarrierTag && barrier.bytes != 0) {
      fail("the block ended with an mbarrier that is owed %lld bytes", static_cast<long long>(barrier.bytes));
    }
  }
  // setmaxnreg: the register file has 64 Ki registers; asking for more would wait for ever.
  int64_t registers = 0;
  for (const Thread& t : block->threads) {
    registers += t.registers;
    if (t.registers != block->threads[static_cast<size_t>(t.index / kWarpgroupSize * kWarpgroupSize)].registers) {
      fail_for(t, "setmaxnreg: not the same in all threads of the warpgroup");
    }
  }
  if (registers > 65536) fail("setmaxnreg: %lld registers in all, there are 65536", static_cast<long long>(registers));
}

// ---- sm_80 ----

uint32_t shared_address(const void* pointer) {
  // One byte behind the end is a legal address to form.
  return static_cast<uint32_t>(checked_shared(*thread, pointer, 0, 1, "shared_address") - block->shared);
}

float exp2_flushed(float x) {
  constexpr float kSmallestNormal = 0x1p-126f;
  if (std::fabs(x) < kSmallestNormal) return 1.0f;
  const float y = std::exp2(x);
  return y < kSmallestNormal ? 0.0f : y;
}

void copy16(void* destination, const void* source, int bytes) {
  if (bytes < 0 || bytes > 16) fail("cp.async: %d bytes of 16", bytes);
  unsigned char* const to = checked_shared(*thread, destination, 16, 16, "cp.async");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(source) % 16 != 0)
    fail("cp.async: misaligned global address %p", source);
  if (race_observer) race_observer->write(*thread, to, 16, "cp.async");
  std::memset(to, kPoison, 16);
  thread->copies.push_back({to, source, bytes, thread->copy_group});
}

void copy_commit() { ++thread->copy_group; }

void copy_wait(int pending_groups) {
  const int64_t first_pending = thread->copy_group - pending_groups;
  size_t landed = 0;
  for (const PendingCopy& copy : thread->copies) {
    if (copy.group >= first_pending) break;
    if (race_observer) {
      if (copy.bytes > 0)
        race_observer->read(*thread, copy.source, static_cast<size_t>(copy.bytes), Proxy::kGeneric, "cp.async");
      race_observer->write(*thread, copy.destination, 16, "cp.async");
    }
    if (copy.bytes > 0) std::memcpy(copy.destination, copy.source, static_cast<size_t>(copy.bytes));
    std::memset(copy.destination + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
    ++landed;
  }
  thread->copies.erase(thread->copies.begin(), thread->copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

namespace {

struct LoadMatrixOperands {
  uint32_t* registers;
  const void* row;
};

template <int kCount, bool kTransposed>
void run_load_matrix(uint32_t, void* const (&operands)[32]) {
  Thread* const lanes = &block->threads[static_cast<size_t>(thread->warp * kWarpSize)];
  if (race_observer) race_observer->start_warp_read(thread->warp);
  for (int m = 0; m < kCount; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const int lane = m * 8 + i;
      const void* const row = static_cast<const LoadMatrixOperands*>(operands[lane])->row;
      const unsigned char* const from = checked_shared(lanes[lane], row, 16, 16, "ldmatrix");
      if (race_observer) race_observer->warp_read(from, 16, Proxy::kGeneric, "ldmatrix");
      std::memcpy(matrix[i], from, 16);
    }
    // Lane l gets elements (l / 4, 2 * (l % 4)) and the one right of it, or of the transposed matrix.
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t lo = kTransposed ? matrix[j][i] : matrix[i][j];
      const uint32_t hi = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<LoadMatrixOperands*>(operands[lane])->registers[m] = lo | hi << 16;
    }
  }
}

const Collective kLoadMatrix[2][2] = {
    {{"ldmatrix.x2", run_load_matrix<2, false>}, {"ldmatrix.x2.trans", run_load_matrix<2, true>}},
    {{"ldmatrix.x4", run_load_matrix<4, false>}, {"ldmatrix.x4.trans", run_load_matrix<4, true>}}};

struct MultiplyOperands {
  float* c;
  uint32_t a[4], b[2];
};

inline float element(bool is_bfloat16, uint32_t bits) {
  return is_bfloat16 ? float_from_bits(bits << 16) : float_from_half_bits(static_cast<uint16_t>(bits));
}

inline float low_element(bool is_bfloat16, uint32_t pair) { return element(is_bfloat16, pair & 0xffffu); }
inline float high_element(bool is_bfloat16, uint32_t pair) { return element(is_bfloat16, pair >> 16); }

// With g = lane / 4 and t = 2 * (lane % 4), a pair is an element and its right (A) or lower (B) neighbour:
//   A 16x16, registers: (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)
//   B 16x8, registers:  (t, g), (t + 8, g)
//   C 16x8:             (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)
template <bool kIsBFloat16>
void run_multiply(uint32_t, void* const (&operands)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MultiplyOperands& in = *static_cast<const MultiplyOperands*>(operands[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r & 1), k = t + 8 * (r >> 1);
      a[row][k] = low_element(kIsBFloat16, in.a[r]);
      a[row][k + 1] = high_element(kIsBFloat16, in.a[r]);
    }
    for (int r = 0; r < 2; ++r) {
      b[t + 8 * r][g] = low_element(kIsBFloat16, in.b[r]);
      b[t + 8 * r + 1][g] = high_element(kIsBFloat16, in.b[r]);
    }
  }
  float product[16][8];
  for (int i = 0; i < 16; ++i) {
    Row8 sum = {};
    for (int k = 0; k < 16; ++k) sum += a[i][k] * *reinterpret_cast<const Row8*>(b[k]);
    *reinterpret_cast<Row8*>(product[i]) = sum;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* const c = static_cast<MultiplyOperands*>(operands[lane])->c;
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) c[r] += product[g + 8 * (r >> 1)][t + (r & 1)];
  }
}

const Collective kMultiply[2] = {{"mma.m16n8k16 (float16)", run_multiply<false>},
                                 {"mma.m16n8k16 (bfloat16)", run_multiply<true>}};

constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace

void load_matrix(uint32_t* registers, int count, bool transposed, const void* row) {
  LoadMatrixOperands operands = {registers, row};
  warp_collective(kLoadMatrix[count == 4][transposed], kAllLanes, &operands);
}

void multiply_m16n8k16(bool is_bfloat16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  MultiplyOperands operands = {c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  warp_collective(kMultiply[is_bfloat16], kAllLanes, &operands);
}

// ---- sm_90: barriers in shared memory ----

namespace {

// Kernels with these instructions are compiled for sm_90a, and do nothing on other devices.
void require_hopper(const char* what) {
  if (block->capability != 90) fail("%s on a device of capability %d", what, block->capability);
}

MBarrier read_mbarrier(const uint64_t* address, const char* what) {
  checked_shared(*thread, address, sizeof(MBarrier), alignof(uint64_t), what);
  MBarrier barrier;
  std::memcpy(&barrier, address, sizeof barrier);
  if (barrier.tag != kMBarrierTag) fail("%s: no initialised mbarrier at this address", what);
  return barrier;
}

// Stores it, after the completion of the phase when everything has arrived.
void update_mbarrier(uint64_t* address, MBarrier barrier) {
  const bool complete = barrier.pending == 0 && barrier.bytes == 0;
  if (complete) {
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
  }
  std::memcpy(address, &barrier, sizeof barrier);
  if (complete) block->notify();
}

void count_arrival(MBarrier& barrier, const char* what) {
  if (barrier.pending == 0) fail("%s: more arrivals than the %d expected", what, static_cast<int>(barrier.expected));
  --barrier.pending;
}

}  // namespace

void mbarrier_init(uint64_t* address, int arrivals) {
  require_hopper("mbarrier.init");
  checked_shared(*thread, address, sizeof(MBarrier), alignof(uint64_t), "mbarrier.init");
  if (arrivals < 1 || arrivals > kMaxArrivals) fail("mbarrier.init: %d arrivals", arrivals);
  if (race_observer) race_observer->write(*thread, address, sizeof(MBarrier), "mbarrier.init");
  MBarrier barrier = {};
  barrier.tag = kMBarrierTag;
  barrier.expected = static_cast<unsigned>(arrivals) & 0x7ffu;
  barrier.pending = barrier.expected;
  std::memcpy(address, &barrier, sizeof barrier);
  block->mbarriers.push_back(address);
}

void mbarrier_arrive(uint64_t* address) {
  MBarrier barrier = read_mbarrier(address, "mbarrier.arrive");
  count_arrival(barrier, "mbarrier.arrive");
  if (race_observer) {
    race_observer->read(*thread, address, sizeof barrier, Proxy::kGeneric, "mbarrier.arrive");
    race_observer->release(*thread, address);
  }
  update_mbarrier(address, barrier);
}

void mbarrier_expect(uint64_t* address, uint32_t bytes, bool arrive) {
  const char* const what = arrive ? "mbarrier.arrive.expect_tx" : "mbarrier.expect_tx";
  MBarrier barrier = read_mbarrier(address, what);
  if (bytes >= 1u << 20) fail("%s: %u bytes, at most 2^20 - 1", what, bytes);
  barrier.bytes += bytes;
  if (arrive) count_arrival(barrier, what);
  if (race_observer) {
    race_observer->read(*thread, address, sizeof barrier, Proxy::kGeneric, what);
    race_observer->release(*thread, address);
  }
  update_mbarrier(address, barrier);
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  if (parity > 1) fail("mbarrier.try_wait: parity %u", parity);
  if (race_observer) race_observer->read(*thread, address, sizeof(MBarrier), Proxy::kGeneric, "mbarrier.try_wait");
  while (read_mbarrier(address, "mbarrier.try_wait").phase == parity) block->poll("mbarrier.try_wait");
  if (race_observer) race_observer->acquire(*thread, address);
}

void proxy_fence() {
  if (race_observer) race_observer->proxy_fence(*thread);
}

// ---- TMA ----

namespace {

constexpr size_t kSwizzleAlignment = 1024;

// 128-byte swizzle: the 16-byte chunk of a 128-byte row is XORed with the number of the row modulo 8.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 3 & 0x70u); }

uint32_t box_bytes(const EmulatedTensorMap& map) {
  return static_cast<uint32_t>(map.box_rows * map.box_columns * map.element_bytes);
}

// Calls visit(global address or null beyond the ends of the tensor, shared address) for every element of the box.
template <typename Visit>
void for_each_element(const BulkTransfer& transfer, Visit visit) {
  const EmulatedTensorMap& map = transfer.map;
  const uint32_t base = static_cast<uint32_t>(transfer.shared - block->shared);
  const auto inside = [&](int dimension, int64_t at) { return at >= 0 && at < map.size[dimension]; };
  const bool plane = inside(2, transfer.coordinate[2]) && inside(3, transfer.coordinate[3]);
  uint32_t offset = base;
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t row = int64_t{transfer.coordinate[1]} + r;
    for (int c = 0; c < map.box_columns; ++c, offset += static_cast<uint32_t>(map.element_bytes)) {
      const int64_t column = int64_t{transfer.coordinate[0]} + c;
      unsigned char* global = nullptr;
      if (plane && inside(1, row) && inside(0, column)) {
        global = map.base + column * map.stride_bytes[0] + row * map.stride_bytes[1] +
                 transfer.coordinate[2] * map.stride_bytes[2] + transfer.coordinate[3] * map.stride_bytes[3];
      }
      visit(global, block->shared + swizzled(offset));
    }
  }
}

void issue_load(BulkTransfer& transfer, const char* what) {
  read_mbarrier(transfer.barrier, what);
  if (race_observer) transfer.ticket = race_observer->async_write(*thread, transfer.shared, transfer.bytes, what);
  std::memset(transfer.shared, kPoison, transfer.bytes);
  block->loads.push_back(transfer);
}

void land_load(const BulkTransfer& transfer) {
  if (transfer.linear) {
    std::memcpy(transfer.shared, transfer.linear, transfer.bytes);
  } else {
    const size_t bytes = static_cast<size_t>(transfer.map.element_bytes);
    for_each_element(transfer, [bytes](const unsigned char* global, unsigned char* shared) {
      if (global) {
        std::memcpy(shared, global, bytes);
      } else {
        std::memset(shared, 0, bytes);
      }
    });
  }
  MBarrier barrier = read_mbarrier(transfer.barrier, "TMA load");
  barrier.bytes -= transfer.bytes;
  if (race_observer) race_observer->async_landed(transfer.ticket, transfer.barrier);
  update_mbarrier(transfer.barrier, barrier);
}

}  // namespace

bool land_a_load() {
  if (block->loads.empty()) return false;
  const size_t n = static_cast<size_t>(block->random() % block->loads.size());
  const BulkTransfer transfer = block->loads[n];
  block->loads.erase(block->loads.begin() + static_cast<std::ptrdiff_t>(n));
  // Its errors are reported as of the first thread: nobody is running.
  Thread* const running = thread;
  thread = running ? running : &block->threads.front();
  land_load(transfer);
  thread = running;
  return true;
}

void tensor_load(void* destination, const EmulatedTensorMap& map, uint64_t* barrier, int column, int row, int head,
                 int batch) {
  BulkTransfer transfer = {};
  transfer.bytes = box_bytes(map);
  transfer.shared = checked_shared(*thread, destination, transfer.bytes, kSwizzleAlignment, "TMA load");
  transfer.map = map;
  const int coordinates[4] = {column, row, head, batch};
  std::copy(coordinates, coordinates + 4, transfer.coordinate);
  transfer.barrier = barrier;
  issue_load(transfer, "TMA load");
}

void linear_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fail("cp.async.bulk: %u bytes from %p, both have to be multiples of 16", bytes, source);
  }
  BulkTransfer transfer = {};
  transfer.bytes = bytes;
  transfer.shared = checked_shared(*thread, destination, bytes, 16, "cp.async.bulk");
  transfer.linear = static_cast<unsigned char*>(const_cast<void*>(source));
  transfer.barrier = barrier;
  issue_load(transfer, "cp.async.bulk");
}

void tensor_store(const EmulatedTensorMap& map, const void* source, int column, int row, int head, int batch) {
  require_hopper("TMA store");
  BulkTransfer transfer = {};
  transfer.bytes = box_bytes(map);
  transfer.shared = checked_shared(*thread, source, transfer.bytes, kSwizzleAlignment, "TMA store");
  transfer.map = map;
  const int coordinates[4] = {column, row, head, batch};
  std::copy(coordinates, coordinates + 4, transfer.coordinate);
  transfer.group = thread->store_group;
  thread->stores.push_back(transfer);
}

void store_commit() { ++thread->store_group; }

void store_wait(int pending_groups) {
  const int64_t first_pending = thread->store_group - pending_groups;
  size_t done = 0;
  for (const BulkTransfer& transfer : thread->stores) {
    if (transfer.group >= first_pending) break;
    const size_t bytes = static_cast<size_t>(transfer.map.element_bytes);
    for_each_element(transfer, [bytes](unsigned char* global, const unsigned char* shared) {
      if (global == nullptr) return;
      if (race_observer) {
        race_observer->read(*thread, shared, bytes, Proxy::kAsync, "TMA store");
        race_observer->write(*thread, global, bytes, "TMA store");
      }
      std::memcpy(global, shared, bytes);
    });
    ++done;
  }
  thread->stores.erase(thread->stores.begin(), thread->stores.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace fastattn::cuda::emulator

namespace fastattn::cuda {

TensorMap make_tensor_map(const TensorRef& tensor, const int64_t (&dims)[4], int box_rows, int box_columns) {
  if (!tensor_map_able(tensor, dims)) throw LaunchError("make_tensor_map: TMA cannot read this tensor in place");
  if (box_rows < 1 || box_rows > kTensorMapRows || box_columns != kTensorMapColumns) {
    throw LaunchError("make_tensor_map: a box of " + std::to_string(box_rows) + " x " + std::to_string(box_columns));
  }
  TensorMap map = {};
  map.base = static_cast<unsigned char*>(tensor.ptr);
  map.element_bytes = 2;
  map.box_rows = box_rows;
  map.box_columns = box_columns;
  for (int n = 0; n < 4; ++n) {
    map.size[n] = dims[3 - n];
    map.stride_bytes[n] = tensor.stride[3 - n] * map.element_bytes;
  }
  return map;
}

}  // namespace fastattn::cuda

namespace fastattn::cuda::emulator {

// ---- wgmma ----

namespace {

constexpr int kWgmmaDepth = 16, kMaxWgmmaColumns = 256;

bool same(const WgmmaRecord& a, const WgmmaRecord& b) {
  const WgmmaShape &s = a.shape, &t = b.shape;
  return s.is_bfloat16 == t.is_bfloat16 && s.n == t.n && s.a_in_registers == t.a_in_registers &&
         s.transposed_a == t.transposed_a && s.transposed_b == t.transposed_b && s.accumulate == t.accumulate &&
         a.descriptor_a == b.descriptor_a && a.descriptor_b == b.descriptor_b;
}

// Into `text`, not a string: the caller is about to fail.
void describe(const WgmmaRecord& record, char (&text)[160]) {
  const WgmmaShape& shape = record.shape;
  std::snprintf(text, sizeof text, "m64n%dk16 %s, A %s%s, B%s, %s, descriptors %llx %llx", shape.n,
                shape.is_bfloat16 ? "bfloat16" : "float16", shape.a_in_registers ? "in registers" : "in shared memory",
                shape.transposed_a ? " transposed" : "", shape.transposed_b ? " transposed" : "",
                shape.accumulate ? "accumulating" : "from zero", static_cast<unsigned long long>(record.descriptor_a),
                static_cast<unsigned long long>(record.descriptor_b));
}

// Element (r, k) of an operand in shared memory, r the row of A or the column of B, under the 128-byte swizzle:
//   k-major: rows r of 128 bytes along k; 8 rows make an atom of 1024 bytes, atoms `stride` apart;
//   transposed (r-major): rows k of 128 bytes along r (64 elements); 8 rows make an atom, atoms `stride` apart along k
//   and `leading` apart along r.
class Operand {
 public:
  Operand(bool is_bfloat16, uint64_t descriptor, bool transposed) : is_bfloat16_(is_bfloat16), transposed_(transposed) {
    if (descriptor >> 62 != 1)
      fail("wgmma: a descriptor without the 128-byte swizzle: %llx", static_cast<unsigned long long>(descriptor));
    start_ = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  }

  float at(int r, int k) const {
    const uint32_t ur = static_cast<uint32_t>(r), uk = static_cast<uint32_t>(k);
    const uint32_t offset = transposed_ ? ur % 64 * 2 + ur / 64 * leading_ + uk % 8 * 128 + uk / 8 * stride_
                                        : ur % 8 * 128 + ur / 8 * stride_ + uk * 2;
    const uint32_t address = swizzled(start_ + offset);
    if (address + 2 > block->shared_bytes)
      fail("wgmma: operand element (%d, %d) at shared memory offset %u of %zu", r, k, address, block->shared_bytes);
    const unsigned char* const from = block->shared + address;
    if (race_observer) race_observer->warp_read(from, 2, Proxy::kAsync, "wgmma");
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return element(is_bfloat16_, bits);
  }

 private:
  bool is_bfloat16_, transposed_;
  uint32_t start_, leading_, stride_;
};

Accumulator* find_accumulator(Thread& t, const float* d) {
  for (Accumulator& accumulator : t.wgmma.accumulators) {
    if (accumulator.d == d) return &accumulator;
  }
  return nullptr;
}

// The n-th pending wgmma of every lane, computed for the 16 rows of this warp.
void multiply_rows(Thread* lanes, size_t n) {
  const PendingWgmma& first = lanes[0].wgmma.pending[n];
  const WgmmaShape& shape = first.shape;
  const int row0 = lanes[0].warp % 4 * 16;
  static thread_local float a[16][kWgmmaDepth], b[kWgmmaDepth][kMaxWgmmaColumns], product[16][kMaxWgmmaColumns];
  if (shape.a_in_registers) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int r = 0; r < 4; ++r) {
        const uint32_t pair = lanes[lane].wgmma.pending[n].a[r];
        const int row = g + 8 * (r & 1), k = t + 8 * (r >> 1);
        a[row][k] = low_element(shape.is_bfloat16, pair);
        a[row][k + 1] = high_element(shape.is_bfloat16, pair);
      }
    }
  } else {
    const Operand operand(shape.is_bfloat16, first.descriptor_a, shape.transposed_a);
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < kWgmmaDepth; ++k) a[i][k] = operand.at(row0 + i, k);
    }
  }
  const Operand operand(shape.is_bfloat16, first.descriptor_b, shape.transposed_b);
  for (int k = 0; k < kWgmmaDepth; ++k) {
    for (int j = 0; j < shape.n; ++j) b[k][j] = operand.at(j, k);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < shape.n; j += 8) {
      Row8 sum = {};
      for (int k = 0; k < kWgmmaDepth; ++k) sum += a[i][k] * *reinterpret_cast<const Row8*>(&b[k][j]);
      *reinterpret_cast<Row8*>(&product[i][j]) = sum;
    }
  }
  // Accumulator 4 * m + r of a lane is element (g + 8 * (r / 2), 8 * m + t + r % 2).
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    float* const value = find_accumulator(lanes[lane], lanes[lane].wgmma.pending[n].d)->value.data();
    for (int m = 0; m < shape.n / 8; ++m) {
      for (int r = 0; r < 4; ++r) {
        const float sum = product[g + 8 * (r >> 1)][8 * m + t + (r & 1)];
        float& into = value[4 * m + r];
        into = shape.accumulate ? into + sum : sum;
      }
    }
  }
}

struct WgmmaWaitOperands {
  size_t count;  // how many of the pending ones have to finish
};

void run_wgmma_wait(uint32_t, void* const (&operands)[32]) {
  Thread* const lanes = &block->threads[static_cast<size_t>(thread->warp * kWarpSize)];
  const size_t count = static_cast<const WgmmaWaitOperands*>(operands[0])->count;
  for (int lane = 1; lane < kWarpSize; ++lane) {
    if (static_cast<const WgmmaWaitOperands*>(operands[lane])->count != count ||
        lanes[lane].wgmma.issued != lanes[0].wgmma.issued) {
      fail("wgmma.wait_group: lane 0 and lane %d have issued different wgmmas", lane);
    }
  }
  if (race_observer) race_observer->start_warp_read(thread->warp);
  for (size_t n = 0; n < count; ++n) multiply_rows(lanes, n);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    WgmmaState& state = lanes[lane].wgmma;
    state.pending.erase(state.pending.begin(), state.pending.begin() + static_cast<std::ptrdiff_t>(count));
    // Accumulators that nothing in flight adds to become readable.
    const auto finished = [&](const Accumulator& accumulator) {
      for (const PendingWgmma& rest : state.pending) {
        if (rest.d == accumulator.d) return false;
      }
      std::copy(accumulator.value.begin(), accumulator.value.end(), accumulator.d);
      return true;
    };
    state.accumulators.erase(std::remove_if(state.accumulators.begin(), state.accumulators.end(), finished),
                             state.accumulators.end());
  }
}

const Collective kWgmmaWait = {"wgmma.wait_group", run_wgmma_wait};

void check_warpgroup(const char* what) {
  require_hopper(what);
  if (static_cast<size_t>(thread->index / kWarpgroupSize + 1) * kWarpgroupSize > block->threads.size()) {
    fail("%s: the thread is not in a complete warpgroup of %d threads", what, kWarpgroupSize);
  }
}

}  // namespace

void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b) {
  check_warpgroup("wgmma");
  WgmmaState& state = thread->wgmma;
  if (!state.fenced) fail("wgmma: no wgmma.fence since the registers could have changed");
  // The n-th wgmma of every thread of the warpgroup has to be the same one.
  std::vector<WgmmaRecord>& log = block->wgmma_log[static_cast<size_t>(thread->index / kWarpgroupSize)];
  const WgmmaRecord mine = {shape, descriptor_a, descriptor_b};
  if (static_cast<size_t>(state.issued) == log.size()) log.push_back(mine);
  const WgmmaRecord& theirs = log[static_cast<size_t>(state.issued)];
  if (!same(mine, theirs)) {
    char here[160], elsewhere[160];
    describe(mine, here);
    describe(theirs, elsewhere);
    fail("wgmma: the threads of the warpgroup differ: here %s, elsewhere %s", here, elsewhere);
  }
  ++state.issued;
  PendingWgmma pending = {shape, {0, 0, 0, 0}, descriptor_a, descriptor_b, d, state.group};
  if (a) std::copy(a, a + 4, pending.a);
  state.pending.push_back(pending);
  const size_t count = static_cast<size_t>(shape.n / 2);
  if (find_accumulator(*thread, d) == nullptr) {
    state.accumulators.push_back({d, std::vector<float>(d, d + count)});
    std::memset(d, kPoison, count * sizeof(float));
  }
  block->notify();  // a warp that waits for the whole warpgroup to issue
}

void wgmma_fence() {
  check_warpgroup("wgmma.fence");
  thread->wgmma.fenced = true;
}

void wgmma_commit() { ++thread->wgmma.group; }

void wgmma_wait(int pending_groups) {
  check_warpgroup("wgmma.wait_group");
  WgmmaState& state = thread->wgmma;
  WgmmaWaitOperands operands = {0};
  for (const PendingWgmma& pending : state.pending) operands.count += pending.group < state.group - pending_groups;
  // The instruction runs when all four warps have issued it; each warp may see its own rows finished before the others.
  const int64_t needed = state.issued - static_cast<int64_t>(state.pending.size() - operands.count);
  const size_t first = static_cast<size_t>(thread->index / kWarpgroupSize) * kWarpgroupSize;
  const auto all_issued = [&] {
    for (size_t n = first; n < first + kWarpgroupSize; ++n) {
      if (block->threads[n].wgmma.issued < needed) return false;
    }
    return true;
  };
  while (!all_issued()) block->poll("wgmma.wait_group (a thread of the warpgroup has not issued it)");
  block->defer("wgmma.wait_group");
  warp_collective(kWgmmaWait, kAllLanes, &operands);
  if (pending_groups == 0) state.fenced = false;
}

void set_max_registers(int count) {
  check_warpgroup("setmaxnreg");
  if (count < 24 || count > 256 || count % 8 != 0)
    fail("setmaxnreg: %d registers, multiples of 8 from 24 to 256", count);
  thread->registers = count;
}

}  // namespace fastattn::cuda::emulator
