/* The device functions of cnnc/backends/cuda/wgmma.py: what their instructions do, by the PTX ISA.
 *
 * A product reads shared memory, and adds to its thread's sums, at any time between its start and the wait for its
 * group.  With threads in FORWARD order that is at once, while copies land as late as they may, so that what is read
 * too early is old; in BACKWARD order as late as it may be, while copies land at once, so that what is overwritten too
 * early, or used before the wait, shows; else by chance.  It sees of shared memory what threads have published.
 */
#pragma once

#include "tensor_cores.h"

#define CNNC_WGMMA

#pragma GCC push_options
#pragma GCC optimize("O2")

namespace cnnc_emulation {

enum { GROUP_ROWS = 64, PRODUCT_DEPTH = 16, NUMBERS = 8 /* in a chunk */ };

/* How an operand lies in shared memory; `chunks` side by side are a line, and change places within it. */
struct Layout {
  unsigned start, leading, stride, chunks;

  explicit Layout(std::uint64_t descriptor) {
    static const unsigned widths[] = {1, 8, 4, 2};
    start = unsigned(descriptor & 0x3fff) << 4;
    leading = unsigned(descriptor >> 16 & 0x3fff) << 4;
    stride = unsigned(descriptor >> 32 & 0x3fff) << 4;
    chunks = widths[descriptor >> 62];
    if ((descriptor >> 49 & 7) != 0) {
      machine.error = "wgmma: operands are to begin where the swizzle does, without a base offset";
    }
  }

  /* The number at a row (a column of the second operand) and a place in depth, by the canonical layouts. */
  unsigned bits(bool across, unsigned row, unsigned k) const {
    unsigned line = chunks * CHUNK, address = start;
    if (chunks == 1) {
      address += row / 8 * stride + k / 8 * leading + (across ? k % 8 * CHUNK + row % 8 * 2 : row % 8 * CHUNK + k % 8 * 2);
    } else if (across) {
      unsigned wide = chunks * NUMBERS;
      address += row / wide * leading + k / 8 * stride + k % 8 * line + row % wide * 2;
    } else {
      address += row / 8 * stride + row % 8 * line + k * 2;
    }
    address ^= (address >> 7 & (chunks - 1)) << 4;
    std::size_t offset = std::size_t(address) - machine.shared_start;
    if (offset + 2 > machine.published_shared.size()) {
      machine.error = "wgmma: an operand is not in shared memory";
      return 0;
    }
    std::uint16_t number;
    std::memcpy(&number, machine.published_shared.data() + offset, sizeof number);
    return number;
  }
};

/* A thread's part of a product: its two rows, and two of each eight columns. */
template <class T> void multiply_part(const Product &product) {
  Layout a(product.a), b(product.b);
  unsigned lane = machine.current->lane, warp = machine.current->index.x % GROUP / WARP;
  const float *decode = decoded<T>();
  float rows[2][PRODUCT_DEPTH];
  for (unsigned i = 0; i < 2 * PRODUCT_DEPTH; i++) {
    unsigned half = i / PRODUCT_DEPTH, k = i % PRODUCT_DEPTH;
    rows[half][k] = decode[a.bits(product.a_across, warp * MMA_ROWS + half * 8 + lane / 4, k)];
  }
  for (int j = 0; j < product.columns / 4; j++) {
    unsigned column = unsigned(j) / 2 * MMA_COLUMNS + lane % 4 * 2 + unsigned(j) % 2;
    double sums[2] = {0, 0};
    for (unsigned k = 0; k < PRODUCT_DEPTH; k++) {
      double number = decode[b.bits(product.b_across, column, k)];
      sums[0] += double(rows[0][k]) * number;
      sums[1] += double(rows[1][k]) * number;
    }
    for (int half = 0; half < 2; half++) {
      float &sum = product.sums[j / 2 * 4 + half * 2 + j % 2];
      sum = float(double(sum) + sums[half]);
    }
  }
}

/* Carries out the first products of the current thread that are under way. */
static void finish_products(std::size_t count) {
  Thread &thread = *machine.current;
  for (std::size_t i = 0; i < count; i++) {
    const Product &product = thread.products[i];
    product.multiply(product);
    thread.sums[product.sums].assign(product.sums, product.sums + product.columns / 2);
  }
  thread.products.erase(thread.products.begin(), thread.products.begin() + std::ptrdiff_t(count));
}

static const char *start_product(const Product &product) {
  Thread &thread = *machine.current;
  auto &operands = machine.operands[thread.index.x / GROUP];
  std::pair<std::uint64_t, std::uint64_t> both(product.a, product.b);
  if (machine.threads.size() % GROUP != 0 || product.columns % 8 != 0 || product.columns > 256) {
    return "wgmma: four whole warps multiply by up to 256 columns, in eights";
  }
  if (thread.products_started == operands.size()) {
    operands.push_back(both);
  }
  if (operands[thread.products_started++] != both) {
    return "wgmma: the warps of a group are to name the same operands";
  }
  auto known = thread.sums.find(product.sums);
  std::size_t bytes = std::size_t(product.columns) / 2 * sizeof(float);
  bool written = known != thread.sums.end() && std::memcmp(known->second.data(), product.sums, bytes) != 0;
  if (!thread.fenced || written) {
    return "wgmma: sums are written to without a fence before the next product";
  }
  thread.products.push_back(product);
  if (machine.order == FORWARD || (machine.order >= SHUFFLED && next_random() % 2 == 0)) {
    finish_products(thread.products.size());
  }
  return machine.error;
}

} // namespace cnnc_emulation

template <int COLUMNS, int A_ACROSS, int B_ACROSS> void cnnc_wgmma_f16(float *sums, std::uint64_t a, std::uint64_t b) {
  using namespace cnnc_emulation;
  unsigned group = machine.current->product_groups;
  machine.error = start_product({multiply_part<half>, sums, a, b, A_ACROSS != 0, B_ACROSS != 0, COLUMNS, group});
}

template <int COLUMNS, int A_ACROSS, int B_ACROSS> void cnnc_wgmma_bf16(float *sums, std::uint64_t a, std::uint64_t b) {
  using namespace cnnc_emulation;
  unsigned group = machine.current->product_groups;
  machine.error = start_product({multiply_part<nv_bfloat16>, sums, a, b, A_ACROSS != 0, B_ACROSS != 0, COLUMNS, group});
}

static inline void cnnc_wgmma_publish() {
  for (void *chunk : cnnc_emulation::machine.current->unpublished) {
    cnnc_emulation::publish(chunk);
  }
  cnnc_emulation::machine.current->unpublished.clear();
}

static inline void cnnc_wgmma_commit() { cnnc_emulation::machine.current->product_groups++; }

template <int SUMS> void cnnc_wgmma_fence(float *) {
  cnnc_emulation::machine.current->fenced = true;
  cnnc_emulation::machine.current->sums.clear();
}

template <int GROUPS, int SUMS> void cnnc_wgmma_wait(float *) {
  cnnc_emulation::Thread &thread = *cnnc_emulation::machine.current;
  std::size_t count = 0;
  while (count < thread.products.size() && thread.products[count].group + GROUPS < thread.product_groups) {
    count++;
  }
  cnnc_emulation::finish_products(count);
}

#pragma GCC pop_options
