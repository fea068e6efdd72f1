/* The device functions of cnnc/backends/cuda/tma.py: what their instructions do, by the PTX ISA ("Tensors", "mbarrier",
 * "cp.async.bulk.tensor").
 *
 * A copy lands at any time between its start and the end of its barrier's phase.  With threads in FORWARD order that is
 * when no thread can go on without it; in BACKWARD order at once; else by chance.  Of a wait more is asked than of the
 * hardware: threads wait for each phase in turn.
 */
#pragma once

#include "tensor_map.h"
#include "wgmma.h"

#define CNNC_TMA

struct __attribute__((aligned(64))) cnnc_tma_map {
  unsigned long long opaque[16];
};

#pragma GCC push_options
#pragma GCC optimize("O2")

namespace cnnc_emulation {

static_assert(sizeof(tensor_map) <= sizeof(cnnc_tma_map), "a map holds what the emulation puts there");

enum { BULK_ALIGNMENT = 128, MOST_TRANSACTIONS = (1 << 20) - 1 };

static const std::uint64_t BARRIER_MAGIC = 0xbadc0ffee0ddf00dull;

static unsigned shared_address(const void *pointer) {
  return machine.shared_start + unsigned(static_cast<const char *>(pointer) - machine.dynamic_shared.data());
}

/* Finds a barrier and tells whether this thread may know of it. */
static PhaseBarrier *find_barrier(const void *pointer) {
  auto found = machine.barriers.find(pointer);
  if (found == machine.barriers.end()) {
    machine.error = "mbarrier: there is none at this address";
    return nullptr;
  }
  PhaseBarrier &barrier = found->second;
  if (std::memcmp(pointer, &BARRIER_MAGIC, sizeof BARRIER_MAGIC) != 0) {
    machine.error = "mbarrier: something was written over it";
    return nullptr;
  }
  if (barrier.maker != machine.current && barrier.made_before == machine.block_barriers) {
    machine.error = "mbarrier: used before a barrier of the block says that it was made";
    return nullptr;
  }
  return &barrier;
}

/* Ends a phase if nothing is missing any more. */
static void check_phase(PhaseBarrier &barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) {
    return;
  }
  for (const BulkCopy &copy : machine.bulk_copies) {
    if (copy.barrier == &barrier && copy.phase == barrier.phase) {
      machine.error = "mbarrier: a phase ends before its copies have landed, which expected fewer bytes";
    }
  }
  barrier.phase++;
  barrier.pending = barrier.arrivals;
}

/* Gives the bytes at a place in the tensor; null outside of it. */
static const char *element(const tensor_map &map, const std::int64_t *place) {
  std::uint64_t offset = std::uint64_t(place[0]) * map.element_bytes;
  for (int i = 0; i < map.rank; i++) {
    if (place[i] < 0 || place[i] > std::int64_t(map.last[i])) {
      return nullptr;
    }
    offset += i > 0 ? std::uint64_t(place[i]) * map.strides[i - 1] : 0;
  }
  return reinterpret_cast<const char *>(map.address) + offset;
}

/* Writes elements side by side in shared memory, as the map swizzles them; `offset` is from where the copy writes. */
static void write_line(const BulkCopy &copy, unsigned offset, std::int64_t *place, unsigned count) {
  const tensor_map &map = copy.map;
  for (unsigned i = 0; i < count; i++, place[0]++) {
    unsigned address = shared_address(copy.to) + offset + i * map.element_bytes;
    address ^= map.swizzle_bytes == 0 ? 0 : (address >> 7 & (map.swizzle_bytes / CHUNK - 1u)) << 4;
    std::size_t at = address - machine.shared_start;
    const char *from = element(map, place);
    for (char *memory : {machine.dynamic_shared.data(), machine.published_shared.data()}) {
      if (from != nullptr) {
        std::memcpy(memory + at, from, map.element_bytes);
      } else {
        std::memset(memory + at, 0, map.element_bytes);
      }
    }
  }
}

/* Tiled mode: a box, of which steps leave out elements. */
static void write_box(const BulkCopy &copy) {
  const tensor_map &map = copy.map;
  unsigned counts[MOST_RANK] = {1, 1, 1, 1, 1}, index[MOST_RANK] = {}, lines = 1;
  for (int i = 1; i < map.rank; i++) {
    counts[i] = (map.box[i] + map.steps[i] - 1u) / map.steps[i];
    lines *= counts[i];
  }
  for (unsigned line = 0; line < lines; line++) {
    std::int64_t place[MOST_RANK] = {copy.place[0]};
    for (int i = 1; i < map.rank; i++) {
      place[i] = std::int64_t(copy.place[i]) + index[i] * map.steps[i];
    }
    write_line(copy, line * map.box[0] * map.element_bytes, place, map.box[0]);
    for (int i = 1; i < map.rank && ++index[i] == counts[i]; i++) {
      index[i] = 0;
    }
  }
}

/* Im2col mode: pixels that a window's base goes through in the bounding box, then in that of the next image. */
static void write_pixels(const BulkCopy &copy) {
  const tensor_map &map = copy.map;
  int spatial = map.rank - 2;
  std::int64_t base[MOST_RANK];
  for (int i = 0; i < map.rank; i++) {
    base[i] = copy.place[i];
  }
  for (unsigned pixel = 0; pixel < map.pixels; pixel++) {
    std::int64_t place[MOST_RANK] = {base[0]};
    for (int i = 0; i < spatial; i++) {
      place[i + 1] = base[i + 1] + copy.offset[i];
    }
    place[map.rank - 1] = base[map.rank - 1];
    write_line(copy, pixel * map.channels * map.element_bytes, place, map.channels);
    int axis = 0;
    for (; axis < spatial; axis++) {
      base[axis + 1] += map.steps[axis + 1];
      if (base[axis + 1] <= std::int64_t(map.last[axis + 1]) + map.upper[axis]) {
        break;
      }
      base[axis + 1] = map.lower[axis];
    }
    base[map.rank - 1] += axis == spatial;
  }
}

static unsigned bytes_of(const tensor_map &map) {
  unsigned elements = map.pixels != 0 ? unsigned(map.pixels) * map.channels : map.box[0];
  for (int i = 1; map.pixels == 0 && i < map.rank; i++) {
    elements *= (map.box[i] + map.steps[i] - 1u) / map.steps[i];
  }
  return elements * map.element_bytes;
}

static void land_bulk(std::size_t number) {
  BulkCopy copy = machine.bulk_copies[number];
  machine.bulk_copies.erase(machine.bulk_copies.begin() + std::ptrdiff_t(number));
  if (copy.map.pixels != 0) {
    write_pixels(copy);
  } else {
    write_box(copy);
  }
  copy.barrier->bytes -= long(bytes_of(copy.map));
  check_phase(*copy.barrier);
}

/* Whether an image's place in im2col mode is one that the PTX ISA has. */
static const char *check_window(const BulkCopy &copy) {
  const tensor_map &map = copy.map;
  int spatial = map.rank - 2;
  for (int i = 0; i < spatial; i++) {
    if (copy.place[i + 1] < map.lower[i] || copy.place[i + 1] > std::int64_t(map.last[i + 1]) + map.upper[i]) {
      return "im2col: the window's base is not in the bounding box";
    }
    if (copy.offset[i] < 0 || copy.offset[i] >= 1 << 16 / spatial) {
      return "im2col: an offset is out of range";
    }
  }
  return nullptr;
}

static const char *check_bulk(const void *to, const cnnc_tma_map *map, const tensor_map &known, int rank, bool im2col) {
  if (reinterpret_cast<std::uintptr_t>(map) % MAP_ALIGNMENT != 0 || known.magic != MAP_MAGIC) {
    return "cp.async.bulk.tensor: there is no map at this address";
  }
  if (known.rank != rank || (known.pixels != 0) != im2col) {
    return "cp.async.bulk.tensor: the map is of another rank or mode";
  }
  if (!is_shared(to, bytes_of(known)) || shared_address(to) % BULK_ALIGNMENT != 0) {
    return "cp.async.bulk.tensor: copies to shared memory, to addresses that are multiples of 128";
  }
  unsigned line = (im2col ? known.channels : known.box[0]) * known.element_bytes;
  if (known.swizzle_bytes != 0 && line != known.swizzle_bytes) {
    return "cp.async.bulk.tensor: lines shorter than the swizzle are not emulated";
  }
  return nullptr;
}

static void start_bulk(void *to, const cnnc_tma_map *map, void *pointer, int rank, const int *place, const int *offset) {
  PhaseBarrier *barrier = find_barrier(pointer);
  BulkCopy copy{};
  std::memcpy(&copy.map, map, sizeof copy.map);
  const char *error = check_bulk(to, map, copy.map, rank, offset != nullptr);
  if (barrier == nullptr || error != nullptr) {
    machine.error = error != nullptr ? error : machine.error;
    return;
  }
  if (!barrier->fenced) {
    machine.error = "cp.async.bulk.tensor: no fence says that the barrier was made";
    return;
  }
  copy.to = static_cast<char *>(to);
  copy.barrier = barrier;
  copy.phase = barrier->phase;
  std::memcpy(copy.place, place, unsigned(rank) * sizeof *place);
  if (offset != nullptr) {
    std::memcpy(copy.offset, offset, unsigned(rank - 2) * sizeof *offset);
    machine.error = check_window(copy);
  }
  machine.bulk_copies.push_back(copy);
  if (machine.error == nullptr && lands_at_once()) {
    land_bulk(machine.bulk_copies.size() - 1);
  }
}

static bool is_over(const Thread &thread) { return thread.awaited->phase > thread.awaited_phase; }

/* Lets threads go on whose phase is over; if there is none, a copy lands.  Tells whether anything happened. */
static bool let_copies_land() {
  bool waiting = false, released = false;
  for (Thread &thread : machine.threads) {
    if (thread.state == State::AT_PHASE) {
      waiting = true;
      released |= is_over(thread);
      thread.state = is_over(thread) ? State::READY : State::AT_PHASE;
    }
  }
  if (!waiting || released) {
    return released;
  }
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < machine.bulk_copies.size(); i++) {
    const BulkCopy &copy = machine.bulk_copies[i];
    bool awaited = false;
    for (const Thread &thread : machine.threads) {
      awaited |= thread.state == State::AT_PHASE && thread.awaited == copy.barrier;
    }
    if (awaited || machine.order >= SHUFFLED) {
      wanted.push_back(i);
    }
  }
  if (wanted.empty()) {
    machine.error = "mbarrier: threads wait for a phase that never ends, as arrivals or bytes are missing";
    return false;
  }
  land_bulk(wanted[machine.order >= SHUFFLED ? next_random() % wanted.size() : 0]);
  return machine.error == nullptr;
}

/* Whether a block left its barriers as it should. */
static bool all_landed() {
  if (!machine.bulk_copies.empty()) {
    machine.error = "cp.async.bulk.tensor: a block ends before its copies have landed";
    return false;
  }
  for (const auto &known : machine.barriers) {
    if (known.second.bytes != 0 || known.second.pending != known.second.arrivals) {
      machine.error = "mbarrier: a block ends within a phase: more bytes are copied than were expected, or fewer";
    }
  }
  return machine.error == nullptr;
}

} // namespace cnnc_emulation

static inline void cnnc_tma_init(void *pointer, int arrivals) {
  using namespace cnnc_emulation;
  if (!is_shared(pointer, 8) || shared_address(pointer) % 8 != 0 || arrivals < 1 || arrivals > MOST_TRANSACTIONS) {
    machine.error = "mbarrier: lies in eight bytes of shared memory, at a multiple of them";
    return;
  }
  if (machine.barriers.count(pointer) != 0) {
    machine.error = "mbarrier: made twice";
  }
  std::memcpy(pointer, &BARRIER_MAGIC, sizeof BARRIER_MAGIC);
  PhaseBarrier made{};
  made.arrivals = made.pending = unsigned(arrivals);
  made.maker = machine.current;
  made.made_before = machine.block_barriers;
  machine.barriers[pointer] = made;
}

static inline void cnnc_tma_fence() {
  for (auto &known : cnnc_emulation::machine.barriers) {
    known.second.fenced |= known.second.maker == cnnc_emulation::machine.current;
  }
}

static inline void cnnc_tma_expect(void *pointer, int bytes) {
  using namespace cnnc_emulation;
  PhaseBarrier *barrier = find_barrier(pointer);
  if (barrier == nullptr) {
    return;
  }
  if (barrier->pending == 0) {
    machine.error = "mbarrier: more arrivals than a phase has";
    return;
  }
  barrier->bytes += bytes;
  barrier->pending--;
  if (barrier->bytes > MOST_TRANSACTIONS || barrier->bytes < -MOST_TRANSACTIONS) {
    machine.error = "mbarrier: so many bytes cannot be expected";
  }
  check_phase(*barrier);
}

static inline void cnnc_tma_wait(void *pointer, int parity) {
  using namespace cnnc_emulation;
  PhaseBarrier *barrier = find_barrier(pointer);
  Thread &thread = *machine.current;
  if (barrier == nullptr) {
    return;
  }
  unsigned &phase = thread.phases[pointer];
  if (int(phase % 2) != parity) {
    machine.error = "mbarrier: a thread waits for another phase than the next";
    return;
  }
  thread.awaited = barrier;
  thread.awaited_phase = phase++;
  while (machine.error == nullptr && !is_over(thread)) {
    cnnc_emulation::wait(State::AT_PHASE);
  }
}

static inline void cnnc_tma_tiled_2(void *to, const cnnc_tma_map *map, void *barrier, int x0, int x1) {
  const int place[] = {x0, x1};
  cnnc_emulation::start_bulk(to, map, barrier, 2, place, nullptr);
}

static inline void cnnc_tma_tiled_3(void *to, const cnnc_tma_map *map, void *barrier, int x0, int x1, int x2) {
  const int place[] = {x0, x1, x2};
  cnnc_emulation::start_bulk(to, map, barrier, 3, place, nullptr);
}

/* Kernels have no use for these, which the tests of the emulation have. */
static inline void cnnc_tma_tiled_4(void *to, const cnnc_tma_map *map, void *barrier, int x0, int x1, int x2, int x3) {
  const int place[] = {x0, x1, x2, x3};
  cnnc_emulation::start_bulk(to, map, barrier, 4, place, nullptr);
}

static inline void cnnc_tma_tiled_5(void *to, const cnnc_tma_map *map, void *barrier, int x0, int x1, int x2, int x3,
                                    int x4) {
  const int place[] = {x0, x1, x2, x3, x4};
  cnnc_emulation::start_bulk(to, map, barrier, 5, place, nullptr);
}

static inline void cnnc_tma_im2col_4(void *to, const cnnc_tma_map *map, void *barrier, int c, int w, int h, int n,
                                     int right, int down) {
  const int place[] = {c, w, h, n}, offset[] = {right, down};
  cnnc_emulation::start_bulk(to, map, barrier, 4, place, offset);
}

static inline void cnnc_tma_im2col_5(void *to, const cnnc_tma_map *map, void *barrier, int c, int w, int h, int d, int n,
                                     int right, int down, int back) {
  const int place[] = {c, w, h, d, n}, offset[] = {right, down, back};
  cnnc_emulation::start_bulk(to, map, barrier, 5, place, offset);
}

/* What the driver does, for who launches without one. */
extern "C" int cnnc_emulated_encode_tiled(void *to, int type, unsigned rank, const void *address,
                                          const std::uint64_t *shape, const std::uint64_t *strides,
                                          const std::uint32_t *box, const std::uint32_t *steps, int interleave,
                                          int swizzle, int promotion, int fill) {
  return map_encode_tiled(to, type, rank, address, shape, strides, box, steps, interleave, swizzle, promotion, fill);
}

extern "C" int cnnc_emulated_encode_im2col(void *to, int type, unsigned rank, const void *address,
                                           const std::uint64_t *shape, const std::uint64_t *strides, const int *lower,
                                           const int *upper, unsigned channels, unsigned pixels,
                                           const std::uint32_t *steps, int interleave, int swizzle, int promotion,
                                           int fill) {
  return map_encode_im2col(to, type, rank, address, shape, strides, lower, upper, channels, pixels, steps, interleave,
                           swizzle, promotion, fill);
}

#pragma GCC pop_options
