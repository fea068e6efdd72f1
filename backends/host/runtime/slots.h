/* The contexts that are alive: a part of context.c and of cuda.c, one of which is in each binary. */
#ifndef CNNC_RT_SLOTS_H
#define CNNC_RT_SLOTS_H

#include "cnnc_rt.h"

/* All live contexts.  A stale or foreign pointer is looked up here and never followed; `busy` guards the entry, so that
 * two threads that run, profile or destroy one context at once cannot meet inside. */
typedef struct slot {
  _Alignas(64) _Atomic(cnnc_rt_context *) context;
  _Atomic uint32_t busy;
} slot;

static slot slots[CNNC_RT_MAX_CONTEXTS];
static _Atomic int slots_used; /* no entry at or beyond this has ever been taken */

static void leave(slot *entry) { atomic_store_explicit(&entry->busy, 0, memory_order_release); }

static int enter(cnnc_rt_context *context, slot **out) {
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
      leave(&slots[i]);
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

#endif
