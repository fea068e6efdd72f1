/* What a context keeps for kernels on a CPU: memory, worker threads, and copies for pointers that kernels cannot take. */
#define _GNU_SOURCE
#include "context.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xmmintrin.h>

#define PAGE ((size_t)4096)
#define HUGE_PAGE ((size_t)1 << 21)
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

struct cnnc_rt_state {
  cnnc_rt_pool *pool;
  char *arena;
  char *scratch;
  void *mapping;
  size_t mapping_bytes;
  const void **inputs;
  void **outputs;
  void **input_copies; /* aligned memory for any batch size, made when a misaligned pointer first comes */
  void **output_copies;
};

static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

/* Has all pages of the weights mapped in one call, once: a first run that did so page by page would take a fifth longer.
 * Advice only: before Linux 5.14 there is no such call, and the first run does it. */
static void map_weights(void) {
  static atomic_flag mapped = ATOMIC_FLAG_INIT;
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  if (model->weight_bytes != 0 && !atomic_flag_test_and_set(&mapped)) {
    uintptr_t start = (uintptr_t)model->weights / PAGE * PAGE;
    uintptr_t end = (uintptr_t)model->weights + model->weight_bytes;
    madvise((void *)start, round_up(end - start, PAGE), MADV_POPULATE_READ);
  }
}

static int map_memory(cnnc_rt_state *state, int threads) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  size_t stride = round_up(model->scratch_bytes, PAGE);
  size_t arena = round_up(model->arena_bytes, PAGE);
  size_t size = arena + stride * (size_t)threads + PAGE;
  size_t alignment = size >= 2 * HUGE_PAGE ? HUGE_PAGE : PAGE;
  /* All of it in huge pages: the rest of the last one in small pages would be hundreds of page faults. */
  size = round_up(size, alignment);
  state->mapping_bytes = size + alignment;
  state->mapping = mmap(NULL, state->mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (state->mapping == MAP_FAILED) {
    state->mapping = NULL;
    return CNNC_RT_ERROR_MEMORY;
  }
  state->arena = (char *)round_up((size_t)state->mapping, alignment);
  state->scratch = state->arena + arena;
  if (alignment == HUGE_PAGE) {
    /* Advice only: without huge pages everything still works. */
    madvise(state->arena, size, MADV_HUGEPAGE);
  }
  return cnnc_rt_pool_create(threads, state->scratch, stride, &state->pool);
}

int cnnc_rt_state_create(cnnc_rt_context *context) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  cnnc_rt_state *state = calloc(1, sizeof *state);
  if (state == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  context->state = state;
  context->threads = context->threads == 0 ? cnnc_rt_allowed_cpus() : context->threads;
  /* One more than needed: calloc may return NULL for nothing. */
  state->inputs = calloc((size_t)model->input_count + 1, sizeof *state->inputs);
  state->outputs = calloc((size_t)model->output_count + 1, sizeof *state->outputs);
  state->input_copies = calloc((size_t)model->input_count + 1, sizeof *state->input_copies);
  state->output_copies = calloc((size_t)model->output_count + 1, sizeof *state->output_copies);
  if (!state->inputs || !state->outputs || !state->input_copies || !state->output_copies) {
    return CNNC_RT_ERROR_MEMORY;
  }
  map_weights();
  return map_memory(state, context->threads);
}

void cnnc_rt_state_destroy(cnnc_rt_context *context) {
  cnnc_rt_state *state = context->state;
  if (state == NULL) {
    return;
  }
  cnnc_rt_pool_destroy(state->pool, context->pid != getpid());
  for (int i = 0; state->input_copies != NULL && i < cnnc_rt_the_model.input_count; i++) {
    free(state->input_copies[i]);
  }
  for (int i = 0; state->output_copies != NULL && i < cnnc_rt_the_model.output_count; i++) {
    free(state->output_copies[i]);
  }
  if (state->mapping != NULL) {
    munmap(state->mapping, state->mapping_bytes);
  }
  free(state->inputs);
  free(state->outputs);
  free(state->input_copies);
  free(state->output_copies);
  free(state);
}

int cnnc_rt_state_profile(cnnc_rt_context *context, bool on) {
  (void)context;
  (void)on;
  return CNNC_RT_OK;
}

static bool misaligned(const void *pointer) { return (uintptr_t)pointer % CNNC_RT_ALIGNMENT != 0; }

static int make_copy(void **copy, bool input, int index) {
  if (*copy == NULL) {
    uint64_t bytes = 0;
    for (int i = 0; i < cnnc_rt_the_model.variant_count; i++) {
      const cnnc_rt_variant *variant = &cnnc_rt_the_model.variants[i];
      const cnnc_rt_tensor *port = input ? &variant->inputs[index] : &variant->outputs[index];
      bytes = port->bytes > bytes ? port->bytes : bytes;
    }
    *copy = aligned_alloc(CNNC_RT_ALIGNMENT, round_up((size_t)bytes + 1, CNNC_RT_ALIGNMENT));
  }
  return *copy == NULL ? CNNC_RT_ERROR_MEMORY : CNNC_RT_OK;
}

/* Kernels get aligned pointers and outputs that overlap nothing; what does not fit goes through aligned copies. */
static int bind_inputs(cnnc_rt_state *state, const cnnc_rt_variant *variant, const void *const *inputs) {
  for (int i = 0; i < cnnc_rt_the_model.input_count; i++) {
    state->inputs[i] = inputs[i];
    if (variant->inputs[i].bytes == 0 || misaligned(inputs[i])) {
      int code = make_copy(&state->input_copies[i], true, i);
      if (code != CNNC_RT_OK) {
        return code;
      }
      state->inputs[i] = state->input_copies[i];
    }
  }
  return CNNC_RT_OK;
}

static int bind_outputs(cnnc_rt_state *state, const cnnc_rt_variant *variant, const void *const *inputs,
                        void *const *outputs) {
  for (int i = 0; i < cnnc_rt_the_model.output_count; i++) {
    uint64_t bytes = variant->outputs[i].bytes;
    bool copied = bytes == 0 || misaligned(outputs[i]);
    for (int j = 0; j < cnnc_rt_the_model.input_count; j++) {
      copied = copied || cnnc_rt_overlap(outputs[i], bytes, inputs[j], variant->inputs[j].bytes);
    }
    state->outputs[i] = outputs[i];
    if (copied) {
      int code = make_copy(&state->output_copies[i], false, i);
      if (code != CNNC_RT_OK) {
        return code;
      }
      state->outputs[i] = state->output_copies[i];
    }
  }
  return CNNC_RT_OK;
}

static int run_bound(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                     void *const *outputs) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  cnnc_rt_state *state = context->state;
  for (int i = 0; i < model->input_count; i++) {
    if (state->inputs[i] != inputs[i] && variant->inputs[i].bytes != 0) {
      memcpy(state->input_copies[i], inputs[i], variant->inputs[i].bytes);
    }
  }
  /* The caller may flush denormals or round otherwise; the model's numbers must not depend on it. */
  unsigned mode = _mm_getcsr();
  _mm_setcsr(CNNC_RT_MXCSR);
  const cnnc_rt_bases bases = {state->inputs, state->outputs, state->arena, model->weights};
  /* In the child of a fork there are no workers: the caller does their shares, with the same result. */
  bool alone = context->threads == 1 || variant->kernel_count == 0 || context->pid != getpid();
  cnnc_rt_counter *counters = context->profiled ? context->counters : NULL;
  int32_t status = cnnc_rt_pool_run(state->pool, variant, &bases, counters, alone);
  _mm_setcsr(mode);
  if (status != 0) {
    return status > 0 ? CNNC_RT_ERROR_VALUE : CNNC_RT_ERROR_KERNEL;
  }
  for (int i = 0; i < model->output_count; i++) {
    if (state->outputs[i] != outputs[i] && variant->outputs[i].bytes != 0) {
      memcpy(outputs[i], state->output_copies[i], variant->outputs[i].bytes);
    }
  }
  return CNNC_RT_OK;
}

int cnnc_rt_state_run(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                      void *const *outputs) {
  int code = bind_inputs(context->state, variant, inputs);
  if (code == CNNC_RT_OK) {
    code = bind_outputs(context->state, variant, inputs, outputs);
  }
  return code == CNNC_RT_OK ? run_bound(context, variant, inputs, outputs) : code;
}
