/* CUDA's thread model on one CPU thread, so that CUDA source compiles with g++ and runs.
 *
 * Blocks run one after the other, their threads as fibers: each until it waits (__syncthreads, a shuffle) or ends.  The
 * order is the caller's: two threads that share memory without a barrier between them give other numbers in another
 * order.  Shared memory is poisoned before each block.  What CUDA leaves undefined (a barrier that some threads do not
 * reach, a shuffle that waits for a lane that ended) is reported, not guessed at.
 */
#pragma once

#include "tensor_map.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace cnnc_emulation {

enum { WARP = 32, GROUP = 4 * WARP, STACK_BYTES = 1 << 16, MOST_THREADS = 1024, POISON = 0xA5 };

enum Order : unsigned { FORWARD, BACKWARD, SHUFFLED /* and beyond: seeds */ };

struct Index {
  unsigned x, y, z;
};

enum class State { READY, AT_BARRIER, AT_SHUFFLE, AT_PHASE, DONE };

enum { MOST_EXCHANGED = 32 };

struct Warp {
  unsigned live = 0;     /* lanes that have not ended */
  unsigned arrived = 0;  /* lanes that wait in a shuffle */
  unsigned mask = 0;     /* lanes it waits for */
  char given[WARP][MOST_EXCHANGED];
  char taken[WARP][MOST_EXCHANGED];
};

/* A copy to shared memory that is on its way (see tensor_cores.h). */
struct Copy {
  void *to;
  const void *from;
  bool valid, landed;
  unsigned group;
  unsigned bytes;
};

/* A product of a group of four warps that is under way (see wgmma.h): a thread's part of it. */
struct Product {
  void (*multiply)(const Product &);
  float *sums;
  std::uint64_t a, b;
  bool a_across, b_across;
  int columns;
  unsigned group;
};

struct Thread;

/* A barrier in shared memory whose phases arrivals and bytes end (see tma.h). */
struct PhaseBarrier {
  unsigned arrivals, pending, phase;
  long bytes; /* that are still to come in this phase */
  const Thread *maker;
  unsigned made_before; /* so many barriers of the block */
  bool fenced;
};

/* A copy of a box that is on its way. */
struct BulkCopy {
  tensor_map map;
  char *to;
  PhaseBarrier *barrier;
  unsigned phase;
  int place[MOST_RANK], offset[MOST_RANK - 2];
};

struct Thread {
  void *stack; /* where it goes on, while others run */
  Index index;
  unsigned lane;
  Warp *warp;
  State state;
  std::vector<Copy> copies;
  unsigned groups; /* of copies, that are complete */
  std::vector<void *> unpublished; /* chunks it has in shared memory that products need not see */
  std::vector<Product> products;
  unsigned products_started, product_groups;
  std::map<float *, std::vector<float>> sums; /* what products left there, since the last fence */
  bool fenced;
  std::map<const void *, unsigned> phases; /* that it has waited for, by barrier */
  const PhaseBarrier *awaited;
  unsigned awaited_phase;
};

struct Machine {
  void *scheduler; /* the stack of who let the current thread run */
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> dynamic_shared;
  std::vector<char> published_shared; /* as products of groups of warps see it */
  unsigned shared_start = 0;          /* its address: no better aligned than the kernel asks for */
  std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>> operands; /* of each group's products */
  std::map<const void *, PhaseBarrier> barriers;
  std::vector<BulkCopy> bulk_copies;
  unsigned block_barriers = 0; /* that all threads have gone through */
  Thread *current = nullptr;
  Index grid, block, block_index;
  void (*body)(void *) = nullptr;
  void *argument = nullptr;
  const char *error = nullptr;
  unsigned order = FORWARD;
  unsigned long long random = 0;
};

static Machine machine;

static char *stacks() {
  static char *memory = static_cast<char *>(std::aligned_alloc(64, std::size_t(MOST_THREADS) * STACK_BYTES));
  return memory;
}

/* Saves what the System V ABI for x86-64 has a function keep, and goes on where another stack was left.  swapcontext
 * would do, with two calls of the kernel each time. */
__asm__(".text\n"
        ".type cnnc_switch, @function\n"
        "cnnc_switch:\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
        "  ret\n"
        ".size cnnc_switch, . - cnnc_switch\n");
extern "C" void cnnc_switch(void **leave, void *enter) __attribute__((visibility("hidden")));

static void wait(State state) {
  machine.current->state = state;
  cnnc_switch(&machine.current->stack, machine.scheduler);
}

static void enter_thread() {
  machine.body(machine.argument);
  machine.current->warp->live &= ~(1u << machine.current->lane);
  wait(State::DONE);
}

/* A stack that starts in `enter_thread`, aligned as after a call: six registers, where to go, no one to return to. */
static void *new_stack(unsigned number) {
  void **top = reinterpret_cast<void **>(stacks() + std::size_t(number + 1) * STACK_BYTES);
  std::memset(top - 8, 0, 8 * sizeof *top);
  top[-2] = reinterpret_cast<void *>(enter_thread);
  return top - 8;
}

static unsigned next_random() {
  machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned(machine.random >> 33);
}

static std::vector<unsigned> in_order(unsigned count, unsigned order) {
  std::vector<unsigned> result(count);
  for (unsigned i = 0; i < count; i++) {
    result[i] = order == BACKWARD ? count - 1 - i : i;
  }
  for (unsigned i = count; order >= SHUFFLED && i > 1; i--) {
    std::swap(result[i - 1], result[next_random() % i]);
  }
  return result;
}

/* Each binary's static shared memory, in one section. */
extern "C" char __start_cnnc_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cnnc_shared[] __attribute__((weak, visibility("hidden")));

static void poison_shared() {
  if (&__start_cnnc_shared[0] != nullptr) {
    std::memset(__start_cnnc_shared, POISON, std::size_t(__stop_cnnc_shared - __start_cnnc_shared));
  }
  if (!machine.dynamic_shared.empty()) {
    std::memset(machine.dynamic_shared.data(), POISON, machine.dynamic_shared.size());
    machine.published_shared = machine.dynamic_shared;
  }
}

/* Where a kernel finds its dynamic shared memory, aligned as it asks, or as CUDA does unasked. */
static void *dynamic_shared(unsigned alignment = 16) {
  machine.shared_start = alignment;
  return machine.dynamic_shared.data();
}

static void start_threads() {
  unsigned count = unsigned(machine.threads.size());
  machine.warps.assign((count + WARP - 1) / WARP, Warp());
  machine.operands.assign((count + GROUP - 1) / GROUP, {});
  machine.barriers.clear();
  machine.bulk_copies.clear();
  machine.block_barriers = 0;
  for (unsigned i = 0; i < count; i++) {
    Thread &thread = machine.threads[i];
    thread.index = {i % machine.block.x, i / machine.block.x % machine.block.y, i / machine.block.x / machine.block.y};
    thread.lane = i % WARP;
    thread.warp = &machine.warps[i / WARP];
    thread.warp->live |= 1u << thread.lane;
    thread.state = State::READY;
    thread.stack = new_stack(i);
    thread.copies.clear();
    thread.groups = 0;
    thread.unpublished.clear();
    thread.products.clear();
    thread.products_started = thread.product_groups = 0;
    thread.sums.clear();
    thread.fenced = false;
    thread.phases.clear();
  }
}

/* Lets a warp's threads that wait in a complete shuffle go on; tells whether there were any. */
static bool release_shuffle(unsigned number) {
  Warp &warp = machine.warps[number];
  if (warp.arrived == 0 || (warp.mask & ~warp.arrived) != 0) {
    return false;
  }
  std::memcpy(warp.taken, warp.given, sizeof warp.taken);
  for (unsigned i = number * WARP; i < machine.threads.size() && i < (number + 1) * WARP; i++) {
    if (machine.threads[i].state == State::AT_SHUFFLE) {
      machine.threads[i].state = State::READY;
    }
  }
  warp.arrived = 0;
  return true;
}

/* Runs some threads until they wait or end. */
static void run_threads(unsigned first, unsigned count, unsigned order) {
  for (unsigned i : in_order(count, order)) {
    Thread &thread = machine.threads[first + i];
    if (thread.state == State::READY) {
      machine.current = &thread;
      cnnc_switch(&machine.scheduler, thread.stack);
    }
  }
}

/* Lets every thread go on for a while.  In FORWARD and BACKWARD order each warp goes as far as it comes by itself, so
 * that warps are far apart where no barrier holds them together; else all keep step.  Tells whether any may go on. */
static bool run_round(unsigned order) {
  unsigned count = unsigned(machine.threads.size()), warps = unsigned(machine.warps.size());
  bool released = false;
  if (order >= SHUFFLED) {
    run_threads(0, count, order);
  }
  for (unsigned warp : in_order(warps, order)) {
    if (order >= SHUFFLED) {
      released |= release_shuffle(warp);
      continue;
    }
    do {
      unsigned first = warp * WARP;
      run_threads(first, count - first < WARP ? count - first : WARP, order);
    } while (machine.error == nullptr && release_shuffle(warp));
  }
  return released;
}

/* Whether all threads of each group of warps have started the same products. */
static bool all_multiplied() {
  for (unsigned i = 0; i < machine.threads.size(); i++) {
    if (machine.threads[i].products_started != machine.operands[i / GROUP].size()) {
      machine.error = "wgmma: some threads of a group of four warps never reach a product";
    }
  }
  return machine.error == nullptr;
}

/* See tma.h. */
static bool let_copies_land();
static bool all_landed();

static bool run_block(unsigned order) {
  poison_shared();
  start_threads();
  unsigned count = unsigned(machine.threads.size());
  for (;;) {
    bool released = run_round(order);
    if (machine.error != nullptr) {
      return false;
    }
    if (released || let_copies_land()) {
      continue;
    }
    if (machine.error != nullptr) {
      return false;
    }
    unsigned waiting = 0, done = 0;
    for (Thread &thread : machine.threads) {
      waiting += thread.state == State::AT_BARRIER;
      done += thread.state == State::DONE;
    }
    if (done == count) {
      return all_multiplied() && all_landed();
    }
    if (waiting != count) {
      machine.error = waiting != 0 ? "some threads wait in __syncthreads, others never reach it"
                                   : "a shuffle waits for lanes that never reach it";
      return false;
    }
    machine.block_barriers++;
    for (Thread &thread : machine.threads) {
      thread.state = State::READY;
    }
  }
}

template <class... A> struct Call {
  void (*function)(A...);
  void **arguments;

  template <std::size_t... I> void apply(std::index_sequence<I...>) {
    function(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
  }
  static void run(void *self) { static_cast<Call *>(self)->apply(std::index_sequence_for<A...>()); }
};

/* Runs a kernel; arguments are pointers to the arguments, as cuLaunchKernel takes them.  Gives an error's text. */
template <class... A>
const char *launch(void (*function)(A...), const unsigned *grid, const unsigned *block, unsigned shared_bytes,
                   void **arguments, unsigned order) {
  Call<A...> call{function, arguments};
  std::size_t threads = std::size_t(block[0]) * block[1] * block[2];
  if (threads == 0 || threads > MOST_THREADS || std::size_t(grid[0]) * grid[1] * grid[2] == 0) {
    return "no GPU can launch this many threads";
  }
  machine.grid = {grid[0], grid[1], grid[2]};
  machine.block = {block[0], block[1], block[2]};
  machine.threads.resize(threads);
  machine.dynamic_shared.assign(shared_bytes, 0);
  machine.body = Call<A...>::run;
  machine.argument = &call;
  machine.error = nullptr;
  machine.order = order;
  machine.random = order;
  for (unsigned i : in_order(grid[0] * grid[1] * grid[2], order)) {
    machine.block_index = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    if (!run_block(order)) {
      break;
    }
  }
  return machine.error;
}

template <class... A> constexpr unsigned count_arguments(void (*)(A...)) { return sizeof...(A); }

template <class... A> constexpr std::array<unsigned, sizeof...(A) + 1> argument_bytes(void (*)(A...)) {
  return {{unsigned(sizeof(A))..., 0}};
}

/* Waits until all lanes of the mask are here, each with a value. */
template <class T> void meet(unsigned mask, const T &value) {
  static_assert(sizeof(T) <= MOST_EXCHANGED, "lanes hand each other up to 32 bytes");
  Thread &thread = *machine.current;
  Warp &warp = *thread.warp;
  if (!(mask >> thread.lane & 1u) || (mask & ~warp.live) != 0 || (warp.arrived != 0 && warp.mask != mask)) {
    machine.error = "a shuffle's mask is not the lanes that are there";
  }
  std::memcpy(warp.given[thread.lane], &value, sizeof value);
  warp.arrived |= 1u << thread.lane;
  warp.mask = mask;
  wait(State::AT_SHUFFLE);
}

/* Gives what lane `source` brought. */
template <class T> T exchange(unsigned mask, T value, unsigned source) {
  meet(mask, value);
  std::memcpy(&value, machine.current->warp->taken[source], sizeof value);
  return value;
}

/* Gives what every lane brought; all of a warp take part. */
template <class T> void exchange_all(const T &value, T *all) {
  meet(0xffffffffu, value);
  for (unsigned lane = 0; lane < WARP; lane++) {
    std::memcpy(&all[lane], machine.current->warp->taken[lane], sizeof value);
  }
}

/* The lane a shuffle reads, its own where that lies outside of its group of `width` lanes. */
static unsigned source_lane(int target, int width) {
  int lane = int(machine.current->lane), first = lane / width * width;
  return unsigned(target < first || target >= first + width ? lane : target);
}

} // namespace cnnc_emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("cnnc_shared")))
/* g++ takes no alignas after `static`. */
#define alignas(bytes) __attribute__((aligned(bytes)))

#define threadIdx (cnnc_emulation::machine.current->index)
#define blockIdx (cnnc_emulation::machine.block_index)
#define blockDim (cnnc_emulation::machine.block)
#define gridDim (cnnc_emulation::machine.grid)

static inline void __syncthreads() { cnnc_emulation::wait(cnnc_emulation::State::AT_BARRIER); }

static inline unsigned __activemask() { return cnnc_emulation::machine.current->warp->live; }

static inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cnnc_emulation::exchange(mask & __activemask(), 0, cnnc_emulation::machine.current->lane);
}

template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  int first = int(cnnc_emulation::machine.current->lane) / width * width;
  return cnnc_emulation::exchange(mask, value, unsigned(first + lane % width));
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = int(cnnc_emulation::machine.current->lane + delta);
  return cnnc_emulation::exchange(mask, value, cnnc_emulation::source_lane(lane, width));
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = int(cnnc_emulation::machine.current->lane) - int(delta);
  return cnnc_emulation::exchange(mask, value, cnnc_emulation::source_lane(lane, width));
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int lane = int(cnnc_emulation::machine.current->lane) ^ bits;
  return cnnc_emulation::exchange(mask, value, cnnc_emulation::source_lane(lane, width));
}

/* Fibers change places only where they wait, so that every plain access is atomic. */
template <class T> T atomicAdd(T *address, T value) {
  T old = *address;
  *address = old + value;
  return old;
}

template <class T> T atomicMax(T *address, T value) {
  T old = *address;
  *address = old > value ? old : value;
  return old;
}

template <class T> T atomicCAS(T *address, T compare, T value) {
  T old = *address;
  *address = old == compare ? value : old;
  return old;
}

/* Of integers only: CUDA's for floats pass over NaN, and no kernel may use them. */
template <class A, class B, class T = std::common_type_t<A, B>>
std::enable_if_t<std::is_integral_v<T>, T> max(A a, B b) {
  return T(a) > T(b) ? T(a) : T(b);
}

template <class A, class B, class T = std::common_type_t<A, B>>
std::enable_if_t<std::is_integral_v<T>, T> min(A a, B b) {
  return T(a) < T(b) ? T(a) : T(b);
}

template <class T> struct Vector1 { T x; };
template <class T> struct __attribute__((aligned(2 * sizeof(T)))) Vector2 { T x, y; };
template <class T> struct __attribute__((aligned(4 * sizeof(T)))) Vector4 { T x, y, z, w; };
using float2 = Vector2<float>;
using float4 = Vector4<float>;
using int2 = Vector2<int>;
using int4 = Vector4<int>;
using uint2 = Vector2<unsigned>;
using uint4 = Vector4<unsigned>;
using ushort2 = Vector2<unsigned short>;
using ushort4 = Vector4<unsigned short>;
using double2 = Vector2<double>;
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

/* Makes a kernel callable: `const char *cnnc_emulated_NAME(grid, block, shared_bytes, arguments, order)`.
 * `cnnc_arguments_NAME` is how many arguments it takes, `cnnc_argument_bytes_NAME` how large each is. */
#define CNNC_EMULATED(name) \
  extern "C" const unsigned cnnc_arguments_##name; \
  const unsigned cnnc_arguments_##name = cnnc_emulation::count_arguments(name); \
  extern "C" const decltype(cnnc_emulation::argument_bytes(name)) cnnc_argument_bytes_##name; \
  const decltype(cnnc_emulation::argument_bytes(name)) cnnc_argument_bytes_##name = \
      cnnc_emulation::argument_bytes(name); \
  extern "C" const char *cnnc_emulated_##name(const unsigned *grid, const unsigned *block, unsigned shared_bytes, \
                                              void **arguments, unsigned order) { \
    return cnnc_emulation::launch(name, grid, block, shared_bytes, arguments, order); \
  }
