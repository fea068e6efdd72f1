/* Contexts: what context.c does with them on any machine, and what a machine keeps for each (cpu_context.c for kernels on
 * a CPU, cuda_context.c and cuda_run.c on a GPU; one of them is in each binary). */
#ifndef CNNC_RT_CONTEXT_H
#define CNNC_RT_CONTEXT_H

#include "cnnc_rt.h"

#include <sys/types.h>

typedef struct cnnc_rt_state cnnc_rt_state;

struct cnnc_rt_context {
  int threads;
  bool profiled;
  pid_t pid;                 /* the process that made it */
  cnnc_rt_counter *counters; /* one for each step */
  cnnc_rt_state *state;      /* the machine's */
};

/* Fills in the state, and the threads where they are 0; what was made is freed by destroy, also after an error. */
int cnnc_rt_state_create(cnnc_rt_context *context);
void cnnc_rt_state_destroy(cnnc_rt_context *context);

/* Runs a variant and returns when its outputs are written; the pointers have been checked. */
int cnnc_rt_state_run(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                      void *const *outputs);

/* Makes ready for the clocks of kernels. */
int cnnc_rt_state_profile(cnnc_rt_context *context, bool on);

/* Whether a run could take these arrays: no null pointers, no outputs that overlap. */
int cnnc_rt_check_pointers(const cnnc_rt_variant *variant, const void *const *inputs, void *const *outputs);

bool cnnc_rt_overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes);

/* A context is entered before anything in it is touched, and then left; nobody else gets in meanwhile. */
typedef struct cnnc_rt_slot cnnc_rt_slot;
int cnnc_rt_enter(cnnc_rt_context *context, cnnc_rt_slot **out);
void cnnc_rt_leave(cnnc_rt_slot *entry);

#endif
