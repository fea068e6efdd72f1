/* Contexts: create, run, destroy.  A context holds everything that is written to; weights are shared and read only. */
#define _GNU_SOURCE
#include "cnnc_rt.h"
#include "slots.h"

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

struct cnnc_rt_context {
  cnnc_rt_pool *pool;
  int threads;
  int profiled;
  pid_t pid;
  char *arena;
  char *scratch;
  void *mapping;
  size_t mapping_bytes;
  const void **inputs;
  void **outputs;
  void **input_copies; /* aligned memory for any batch size, made when a misaligned pointer first comes */
  void **output_copies;
  cnnc_rt_counter *counters; /* one for each step */
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

static int map_memory(cnnc_rt_context *context) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  size_t stride = round_up(model->scratch_bytes, PAGE);
  size_t arena = round_up(model->arena_bytes, PAGE);
  size_t size = arena + stride * (size_t)context->threads + PAGE;
  size_t alignment = size >= 2 * HUGE_PAGE ? HUGE_PAGE : PAGE;
  /* All of it in huge pages: the rest of the last one in small pages would be hundreds of page faults. */
  size = round_up(size, alignment);
  context->mapping_bytes = size + alignment;
  context->mapping = mmap(NULL, context->mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (context->mapping == MAP_FAILED) {
    context->mapping = NULL;
    return CNNC_RT_ERROR_MEMORY;
  }
  context->arena = (char *)round_up((size_t)context->mapping, alignment);
  context->scratch = context->arena + arena;
  if (alignment == HUGE_PAGE) {
    /* Advice only: without huge pages everything still works. */
    madvise(context->arena, size, MADV_HUGEPAGE);
  }
  return cnnc_rt_pool_create(context->threads, context->scratch, stride, &context->pool);
}

static void release(cnnc_rt_context *context, bool forked) {
  cnnc_rt_pool_destroy(context->pool, forked);
  for (int i = 0; context->input_copies != NULL && i < cnnc_rt_the_model.input_count; i++) {
    free(context->input_copies[i]);
  }
  for (int i = 0; context->output_copies != NULL && i < cnnc_rt_the_model.output_count; i++) {
    free(context->output_copies[i]);
  }
  if (context->mapping != NULL) {
    munmap(context->mapping, context->mapping_bytes);
  }
  free(context->inputs);
  free(context->outputs);
  free(context->input_copies);
  free(context->output_copies);
  free(context->counters);
  free(context);
}

static int fill(cnnc_rt_context *context) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  /* One more than needed: calloc may return NULL for nothing. */
  context->inputs = calloc((size_t)model->input_count + 1, sizeof *context->inputs);
  context->outputs = calloc((size_t)model->output_count + 1, sizeof *context->outputs);
  context->input_copies = calloc((size_t)model->input_count + 1, sizeof *context->input_copies);
  context->output_copies = calloc((size_t)model->output_count + 1, sizeof *context->output_copies);
  context->counters = calloc((size_t)model->step_count, sizeof *context->counters);
  if (!context->inputs || !context->outputs || !context->input_copies || !context->output_copies ||
      !context->counters) {
    return CNNC_RT_ERROR_MEMORY;
  }
  return map_memory(context);
}

int cnnc_rt_create(int threads, cnnc_rt_context **out) {
  if (out == NULL) {
    return CNNC_RT_ERROR_NULL;
  }
  *out = NULL;
  if (threads < 0 || threads > CNNC_RT_MAX_THREADS) {
    return CNNC_RT_ERROR_THREADS;
  }
  if (cnnc_rt_missing_feature(cnnc_rt_the_model.features, cnnc_rt_the_model.feature_count) != NULL) {
    return CNNC_RT_ERROR_CPU;
  }
  cnnc_rt_context *context = calloc(1, sizeof *context);
  if (context == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  context->threads = threads == 0 ? cnnc_rt_allowed_cpus() : threads;
  context->pid = getpid();
  int code = fill(context);
  map_weights();
  if (code == CNNC_RT_OK) {
    code = publish(context);
  }
  if (code != CNNC_RT_OK) {
    release(context, false);
    return code;
  }
  *out = context;
  return CNNC_RT_OK;
}

int cnnc_rt_destroy(cnnc_rt_context *context) {
  slot *entry;
  if (context == NULL) {
    return CNNC_RT_OK;
  }
  int code = enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  /* Nobody finds it any more, and whoever gets this entry next must find it free: so leave first, release then. */
  atomic_store(&entry->context, NULL);
  leave(entry);
  release(context, context->pid != getpid());
  return CNNC_RT_OK;
}

static bool overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
  uintptr_t x = (uintptr_t)a;
  uintptr_t y = (uintptr_t)b;
  return a_bytes != 0 && b_bytes != 0 && x < y + b_bytes && y < x + a_bytes;
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
static int bind_inputs(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs) {
  for (int i = 0; i < cnnc_rt_the_model.input_count; i++) {
    uint64_t bytes = variant->inputs[i].bytes;
    if (inputs[i] == NULL && bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
    context->inputs[i] = inputs[i];
    if (bytes == 0 || misaligned(inputs[i])) {
      int code = make_copy(&context->input_copies[i], true, i);
      if (code != CNNC_RT_OK) {
        return code;
      }
      context->inputs[i] = context->input_copies[i];
    }
  }
  return CNNC_RT_OK;
}

static int bind_outputs(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                        void *const *outputs) {
  for (int i = 0; i < cnnc_rt_the_model.output_count; i++) {
    uint64_t bytes = variant->outputs[i].bytes;
    if (outputs[i] == NULL && bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
    for (int j = 0; j < i; j++) {
      if (overlap(outputs[i], bytes, outputs[j], variant->outputs[j].bytes)) {
        return CNNC_RT_ERROR_OVERLAP;
      }
    }
    bool copied = bytes == 0 || misaligned(outputs[i]);
    for (int j = 0; j < cnnc_rt_the_model.input_count; j++) {
      copied = copied || overlap(outputs[i], bytes, inputs[j], variant->inputs[j].bytes);
    }
    context->outputs[i] = outputs[i];
    if (copied) {
      int code = make_copy(&context->output_copies[i], false, i);
      if (code != CNNC_RT_OK) {
        return code;
      }
      context->outputs[i] = context->output_copies[i];
    }
  }
  return CNNC_RT_OK;
}

static int run_bound(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                     void *const *outputs) {
  const cnnc_rt_model *model = &cnnc_rt_the_model;
  for (int i = 0; i < model->input_count; i++) {
    if (context->inputs[i] != inputs[i] && variant->inputs[i].bytes != 0) {
      memcpy(context->input_copies[i], inputs[i], variant->inputs[i].bytes);
    }
  }
  /* The caller may flush denormals or round otherwise; the model's numbers must not depend on it. */
  unsigned mode = _mm_getcsr();
  _mm_setcsr(CNNC_RT_MXCSR);
  const cnnc_rt_bases bases = {context->inputs, context->outputs, context->arena, model->weights};
  /* In the child of a fork there are no workers: the caller does their shares, with the same result. */
  bool alone = context->threads == 1 || variant->kernel_count == 0 || context->pid != getpid();
  cnnc_rt_counter *counters = context->profiled ? context->counters : NULL;
  int32_t status = cnnc_rt_pool_run(context->pool, variant, &bases, counters, alone);
  _mm_setcsr(mode);
  if (status != 0) {
    return status > 0 ? CNNC_RT_ERROR_VALUE : CNNC_RT_ERROR_KERNEL;
  }
  for (int i = 0; i < model->output_count; i++) {
    if (context->outputs[i] != outputs[i] && variant->outputs[i].bytes != 0) {
      memcpy(outputs[i], context->output_copies[i], variant->outputs[i].bytes);
    }
  }
  return CNNC_RT_OK;
}

static int run_variant(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                       void *const *outputs) {
  slot *entry;
  if ((inputs == NULL && cnnc_rt_the_model.input_count != 0) ||
      (outputs == NULL && cnnc_rt_the_model.output_count != 0)) {
    return CNNC_RT_ERROR_NULL;
  }
  int code = enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = bind_inputs(context, variant, inputs);
  if (code == CNNC_RT_OK) {
    code = bind_outputs(context, variant, inputs, outputs);
  }
  if (code == CNNC_RT_OK) {
    code = run_bound(context, variant, inputs, outputs);
  }
  leave(entry);
  return code;
}

int cnnc_rt_run(cnnc_rt_context *context, const void *const *inputs, void *const *outputs) {
  return run_variant(context, cnnc_rt_the_model.variants, inputs, outputs);
}

int cnnc_rt_run_batch(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs) {
  const cnnc_rt_variant *variant = cnnc_rt_find(batch);
  return variant != NULL ? run_variant(context, variant, inputs, outputs) : CNNC_RT_ERROR_BATCH;
}

int cnnc_rt_profile(cnnc_rt_context *context, int on) {
  slot *entry;
  int code = enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  context->profiled = on != 0;
  if (on) {
    memset(context->counters, 0, (size_t)cnnc_rt_the_model.step_count * sizeof *context->counters);
  }
  leave(entry);
  return CNNC_RT_OK;
}

static uint64_t variant_kernel_ns(cnnc_rt_context *context, const cnnc_rt_variant *variant, int index,
                                  uint64_t *calls) {
  slot *entry;
  cnnc_rt_counter read = {0, 0};
  bool known = variant != NULL && index >= 0 && index < variant->kernel_count;
  if (known && enter(context, &entry) == CNNC_RT_OK) {
    read = context->counters[variant->first_step + index];
    leave(entry);
  }
  if (calls != NULL) {
    *calls = read.calls;
  }
  return read.ns;
}

uint64_t cnnc_rt_kernel_ns(cnnc_rt_context *context, int index, uint64_t *calls) {
  return variant_kernel_ns(context, cnnc_rt_the_model.variants, index, calls);
}

uint64_t cnnc_rt_batch_kernel_ns(cnnc_rt_context *context, int batch, int index, uint64_t *calls) {
  return variant_kernel_ns(context, cnnc_rt_find(batch), index, calls);
}

int cnnc_rt_threads(cnnc_rt_context *context) {
  slot *entry;
  if (enter(context, &entry) != CNNC_RT_OK) {
    return 0;
  }
  int threads = context->threads;
  leave(entry);
  return threads;
}
