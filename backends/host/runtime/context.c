/* Contexts: create, run, profile, destroy.  A context holds everything that is written to; weights are shared and read
 * only. */
#define _GNU_SOURCE
#include "context.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODEL cnnc_rt_the_model

/* All live contexts.  A stale or foreign pointer is looked up here and never followed; `busy` guards the entry, so that
 * two threads that run, profile or destroy one context at once cannot meet inside. */
struct cnnc_rt_slot {
  _Alignas(64) _Atomic(cnnc_rt_context *) context;
  _Atomic uint32_t busy;
};

static cnnc_rt_slot slots[CNNC_RT_MAX_CONTEXTS];
static _Atomic int slots_used; /* no entry at or beyond this has ever been taken */

void cnnc_rt_leave(cnnc_rt_slot *entry) { atomic_store_explicit(&entry->busy, 0, memory_order_release); }

int cnnc_rt_enter(cnnc_rt_context *context, cnnc_rt_slot **out) {
  if (context == NULL) {
    return CNNC_RT_ERROR_NULL;
  }
  int used = atomic_load(&slots_used);
  for (int i = 0; i < used; i++) {
    if (atomic_load_explicit(&slots[i].context, memory_order_acquire) != context) {
      continue;
    }
    if (atomic_exchange(&slots[i].busy, 1) != 0) {
      return CNNC_RT_ERROR_BUSY;
    }
    /* It may have been destroyed in between. */
    if (atomic_load(&slots[i].context) != context) {
      cnnc_rt_leave(&slots[i]);
      return CNNC_RT_ERROR_CONTEXT;
    }
    *out = &slots[i];
    return CNNC_RT_OK;
  }
  return CNNC_RT_ERROR_CONTEXT;
}

static int publish(cnnc_rt_context *context) {
  for (int i = 0; i < CNNC_RT_MAX_CONTEXTS; i++) {
    cnnc_rt_context *none = NULL;
    if (atomic_compare_exchange_strong(&slots[i].context, &none, context)) {
      int used = atomic_load(&slots_used);
      while (used <= i && !atomic_compare_exchange_weak(&slots_used, &used, i + 1)) {
      }
      return CNNC_RT_OK;
    }
  }
  return CNNC_RT_ERROR_TOO_MANY;
}

/* Create and destroy */

static void release(cnnc_rt_context *context) {
  cnnc_rt_state_destroy(context);
  free(context->counters);
  free(context);
}

static int fill(cnnc_rt_context *context) {
  context->counters = calloc((size_t)MODEL.step_count, sizeof *context->counters);
  return context->counters == NULL ? CNNC_RT_ERROR_MEMORY : cnnc_rt_state_create(context);
}

int cnnc_rt_create(int threads, cnnc_rt_context **out) {
  if (out == NULL) {
    return CNNC_RT_ERROR_NULL;
  }
  *out = NULL;
  if (threads < 0 || threads > CNNC_RT_MAX_THREADS) {
    return CNNC_RT_ERROR_THREADS;
  }
  if (cnnc_rt_missing_feature(MODEL.features, MODEL.feature_count) != NULL) {
    return CNNC_RT_ERROR_CPU;
  }
  cnnc_rt_context *context = calloc(1, sizeof *context);
  if (context == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  context->threads = threads;
  context->pid = getpid();
  int code = fill(context);
  if (code == CNNC_RT_OK) {
    code = publish(context);
  }
  if (code != CNNC_RT_OK) {
    release(context);
    return code;
  }
  *out = context;
  return CNNC_RT_OK;
}

int cnnc_rt_destroy(cnnc_rt_context *context) {
  cnnc_rt_slot *entry;
  if (context == NULL) {
    return CNNC_RT_OK;
  }
  int code = cnnc_rt_enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  /* Nobody finds it any more, and whoever gets this entry next must find it free: so leave first, release then. */
  atomic_store(&entry->context, NULL);
  cnnc_rt_leave(entry);
  release(context);
  return CNNC_RT_OK;
}

/* Runs */

bool cnnc_rt_overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
  uintptr_t x = (uintptr_t)a;
  uintptr_t y = (uintptr_t)b;
  return a_bytes != 0 && b_bytes != 0 && x < y + b_bytes && y < x + a_bytes;
}

int cnnc_rt_check_pointers(const cnnc_rt_variant *variant, const void *const *inputs, void *const *outputs) {
  if ((inputs == NULL && MODEL.input_count != 0) || (outputs == NULL && MODEL.output_count != 0)) {
    return CNNC_RT_ERROR_NULL;
  }
  for (int i = 0; i < MODEL.input_count; i++) {
    if (inputs[i] == NULL && variant->inputs[i].bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    if (outputs[i] == NULL && variant->outputs[i].bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
    for (int j = 0; j < i; j++) {
      if (cnnc_rt_overlap(outputs[i], variant->outputs[i].bytes, outputs[j], variant->outputs[j].bytes)) {
        return CNNC_RT_ERROR_OVERLAP;
      }
    }
  }
  return CNNC_RT_OK;
}

static int run_variant(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                       void *const *outputs) {
  cnnc_rt_slot *entry;
  int code = cnnc_rt_enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = cnnc_rt_check_pointers(variant, inputs, outputs);
  if (code == CNNC_RT_OK) {
    code = cnnc_rt_state_run(context, variant, inputs, outputs);
  }
  cnnc_rt_leave(entry);
  return code;
}

int cnnc_rt_run(cnnc_rt_context *context, const void *const *inputs, void *const *outputs) {
  return run_variant(context, MODEL.variants, inputs, outputs);
}

int cnnc_rt_run_batch(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs) {
  const cnnc_rt_variant *variant = cnnc_rt_find(batch);
  return variant != NULL ? run_variant(context, variant, inputs, outputs) : CNNC_RT_ERROR_BATCH;
}

/* Clocks */

int cnnc_rt_profile(cnnc_rt_context *context, int on) {
  cnnc_rt_slot *entry;
  int code = cnnc_rt_enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = cnnc_rt_state_profile(context, on != 0);
  if (code == CNNC_RT_OK) {
    context->profiled = on != 0;
    if (on) {
      memset(context->counters, 0, (size_t)MODEL.step_count * sizeof *context->counters);
    }
  }
  cnnc_rt_leave(entry);
  return code;
}

static uint64_t variant_kernel_ns(cnnc_rt_context *context, const cnnc_rt_variant *variant, int index,
                                  uint64_t *calls) {
  cnnc_rt_slot *entry;
  cnnc_rt_counter read = {0, 0};
  bool known = variant != NULL && index >= 0 && index < variant->kernel_count;
  if (known && cnnc_rt_enter(context, &entry) == CNNC_RT_OK) {
    read = context->counters[variant->first_step + index];
    cnnc_rt_leave(entry);
  }
  if (calls != NULL) {
    *calls = read.calls;
  }
  return read.ns;
}

uint64_t cnnc_rt_kernel_ns(cnnc_rt_context *context, int index, uint64_t *calls) {
  return variant_kernel_ns(context, MODEL.variants, index, calls);
}

uint64_t cnnc_rt_batch_kernel_ns(cnnc_rt_context *context, int batch, int index, uint64_t *calls) {
  return variant_kernel_ns(context, cnnc_rt_find(batch), index, calls);
}

int cnnc_rt_threads(cnnc_rt_context *context) {
  cnnc_rt_slot *entry;
  if (cnnc_rt_enter(context, &entry) != CNNC_RT_OK) {
    return 0;
  }
  int threads = context->threads;
  cnnc_rt_leave(entry);
  return threads;
}
