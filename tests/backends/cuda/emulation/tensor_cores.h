/* The device functions of cnnc/backends/cuda/tensor_cores.py: what their instructions do, by the PTX ISA.
 *
 * A copy lands at any time between its start and the wait for its group.  With threads in FORWARD order it lands as
 * late as it may, so that what is read without a wait is old; in BACKWARD order at once, so that what is still being
 * read is overwritten; else by chance.
 */
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulation.h"

#define CNNC_TENSOR_CORES

/* The rest of a file is compiled quickly rather than well; most of the time goes here. */
#pragma GCC push_options
#pragma GCC optimize("O2")

namespace cnnc_emulation {

enum { CHUNK = 16, MMA_ROWS = 16, MMA_COLUMNS = 8 };

static void publish(void *chunk) {
  std::size_t offset = std::size_t(static_cast<char *>(chunk) - machine.dynamic_shared.data());
  std::memcpy(machine.published_shared.data() + offset, chunk, CHUNK);
}

static void land(Copy &copy, bool at_once) {
  if (copy.landed) {
    return;
  }
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
  copy.landed = true;
  if (copy.bytes < CHUNK) {
    return; /* No product of a group of warps reads those. */
  }
  if (at_once) {
    publish(copy.to);
  } else {
    machine.current->unpublished.push_back(copy.to);
  }
}

static bool lands_at_once() {
  return machine.order == BACKWARD || (machine.order >= SHUFFLED && next_random() % 2 == 0);
}

static bool is_aligned(const void *pointer, unsigned bytes = CHUNK) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

static bool is_shared(const void *pointer, unsigned bytes = CHUNK) {
  const char *byte = static_cast<const char *>(pointer), *start = machine.dynamic_shared.data();
  return byte >= start && byte + bytes <= start + machine.dynamic_shared.size();
}

static void start_copy(void *to, const void *from, bool valid, unsigned bytes) {
  if (!is_shared(to, bytes) || !is_aligned(to, bytes) || (valid && !is_aligned(from, bytes))) {
    machine.error = "cp.async copies to shared memory, from and to addresses that are multiples of what it copies";
    return;
  }
  machine.current->copies.push_back({to, from, valid, false, machine.current->groups, bytes});
  if (lands_at_once()) {
    land(machine.current->copies.back(), true);
  }
}

/* Four registers of the first operand of a product, two of the second. */
struct Fragments {
  unsigned a[4], b[2];
};

/* Every number of 16 bits as a float. */
template <class T> const float *decoded() {
  static std::vector<float> numbers;
  for (unsigned bits = unsigned(numbers.size()); bits < 1u << 16; bits++) {
    T value;
    value.bits = std::uint16_t(bits);
    numbers.push_back(float(value));
  }
  return numbers.data();
}

/* The number of the first operand, or the second, at a place, as the PTX ISA draws the fragments of m16n8k16. */
template <class T> float a_of(const Fragments *lanes, int row, int k) {
  unsigned bits = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
  return decoded<T>()[bits >> k % 2 * 16 & 0xffffu];
}

template <class T> float b_of(const Fragments *lanes, int k, int column) {
  unsigned bits = lanes[column * 4 + k % 8 / 2].b[k / 8];
  return decoded<T>()[bits >> k % 2 * 16 & 0xffffu];
}

/* Those of m16n8k8 for tf32, which takes no notice of the last 13 bits. */
struct Tf32 {};

static inline float tf32_of(unsigned bits) {
  bits &= ~0x1fffu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <> float a_of<Tf32>(const Fragments *lanes, int row, int k) {
  return tf32_of(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
}

template <> float b_of<Tf32>(const Fragments *lanes, int k, int column) {
  return tf32_of(lanes[column * 4 + k % 4].b[k / 4]);
}

template <class T, int DEPTH> void multiply(float *sums, const unsigned *a, const unsigned *b) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  Fragments lanes[WARP];
  exchange_all(mine, lanes);
  int lane = int(machine.current->lane);
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < DEPTH; k++) {
      sum += double(a_of<T>(lanes, row, k)) * double(b_of<T>(lanes, k, column));
    }
    sums[i] = float(double(sums[i]) + sum);
  }
}

} // namespace cnnc_emulation

static inline unsigned cnnc_tc_shared(const void *pointer) {
  using namespace cnnc_emulation;
  return machine.shared_start + unsigned(static_cast<const char *>(pointer) - machine.dynamic_shared.data());
}

static inline void cnnc_tc_copy(void *to, const void *from, bool valid) {
  cnnc_emulation::start_copy(to, from, valid, cnnc_emulation::CHUNK);
}

template <int BYTES> void cnnc_tc_copy_piece(void *to, int number, const void *from, bool valid) {
  cnnc_emulation::start_copy(static_cast<char *>(to) + number * BYTES, from, valid, BYTES);
}

static inline void cnnc_tc_commit() { cnnc_emulation::machine.current->groups++; }

template <int GROUPS> void cnnc_tc_wait() {
  cnnc_emulation::Thread &thread = *cnnc_emulation::machine.current;
  std::vector<cnnc_emulation::Copy> left;
  for (cnnc_emulation::Copy &copy : thread.copies) {
    if (copy.group + GROUPS < thread.groups) {
      cnnc_emulation::land(copy, false);
    } else {
      left.push_back(copy);
    }
  }
  thread.copies.swap(left);
}

namespace cnnc_emulation {

/* Gives the rows of four matrices that the lanes point at, eight each. */
static inline bool point_at_rows(const void *from, const char **rows) {
  if (!is_shared(from) || !is_aligned(from)) {
    machine.error = "ldmatrix loads rows of 16 bytes from shared memory, at addresses that are multiples of 16";
    return false;
  }
  exchange_all(static_cast<const char *>(from), rows);
  return true;
}

} // namespace cnnc_emulation

static inline void cnnc_tc_load(unsigned *to, const void *from) {
  const char *rows[cnnc_emulation::WARP];
  int lane = int(cnnc_emulation::machine.current->lane);
  bool known = cnnc_emulation::point_at_rows(from, rows);
  for (int matrix = 0; known && matrix < 4; matrix++) {
    std::memcpy(&to[matrix], rows[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
  }
}

static inline void cnnc_tc_load_transposed(unsigned *to, const void *from) {
  const char *rows[cnnc_emulation::WARP];
  int lane = int(cnnc_emulation::machine.current->lane);
  bool known = cnnc_emulation::point_at_rows(from, rows);
  for (int matrix = 0; known && matrix < 4; matrix++) {
    for (int half = 0; half < 2; half++) {
      const char *row = rows[matrix * 8 + lane % 4 * 2 + half];
      std::memcpy(reinterpret_cast<char *>(&to[matrix]) + half * 2, row + lane / 4 * 2, 2);
    }
  }
}

/* Halves away from zero, as cvt.rna does. */
template <int COUNT> void cnnc_tc_round(unsigned *registers) {
  for (int i = 0; i < COUNT; i++) {
    bool is_nan = (registers[i] & 0x7fffffffu) > 0x7f800000u;
    registers[i] = is_nan ? 0x7fffffffu : (registers[i] + 0x1000u) & ~0x1fffu;
  }
}

static inline void cnnc_tc_mma_f16(float *sums, const unsigned *a, const unsigned *b) {
  cnnc_emulation::multiply<half, 16>(sums, a, b);
}

static inline void cnnc_tc_mma_bf16(float *sums, const unsigned *a, const unsigned *b) {
  cnnc_emulation::multiply<nv_bfloat16, 16>(sums, a, b);
}

static inline void cnnc_tc_mma_tf32(float *sums, const unsigned *a, const unsigned *b) {
  cnnc_emulation::multiply<cnnc_emulation::Tf32, 8>(sums, a, b);
}

/* Of the two numbers in a register the first has the lower bits. */
template <class T> unsigned cnnc_tc_pack(float first, float second) { return T(second).bits * 0x10000u + T(first).bits; }

static inline unsigned cnnc_tc_pack_f16(float first, float second) { return cnnc_tc_pack<half>(first, second); }

static inline unsigned cnnc_tc_pack_bf16(float first, float second) { return cnnc_tc_pack<nv_bfloat16>(first, second); }

/* Flushes to 0 what is no normal number, before and after. */
static inline float cnnc_tc_exp2(float x) {
  float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

#pragma GCC pop_options
