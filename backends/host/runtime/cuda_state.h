/* A context on a GPU, for the files that make it (cuda_context.c) and run it (cuda_run.c). */
#ifndef CNNC_RT_CUDA_STATE_H
#define CNNC_RT_CUDA_STATE_H

#include "context.h"
#include "cuda.h"

struct cnnc_rt_state {
  const cnnc_rt_cuda *cuda;
  const cnnc_rt_shared *shared;
  cu_pointer memory; /* arena, scratch, inputs, outputs, status */
  cu_pointer *inputs;
  cu_pointer *outputs;
  cu_pointer status;     /* a word, not 0 where a value was out of range in a run since it was last read ... */
  int32_t status_read;   /* ... as it was then */
  cu_stream stream;      /* of runs that are waited for */
  cu_event done;         /* the end of the run that was put last, in whatever stream */
  cu_graph_exec *graphs; /* of each variant */
  cu_pointer *values;    /* the arguments of all launches, one after the other ... */
  void **arguments;      /* ... and where they are, as the driver wants it */
  cu_tensor_map *maps;   /* those that are arguments themselves */
  cu_event *clocks;      /* before the first launch and after each, made when profiling is first switched on */
};

/* The launches of a variant. */
typedef struct cnnc_rt_launches {
  const cnnc_rt_launch *first;
  int count;
} cnnc_rt_launches;

cnnc_rt_launches cnnc_rt_launches_of(const cnnc_rt_variant *variant);
int cnnc_rt_most_launches(void);

/* Puts the launches of a variant into a stream, in order; with events around each if asked to. */
int cnnc_rt_launch_all(cnnc_rt_state *state, const cnnc_rt_variant *variant, cu_stream stream, const cu_event *clocks);

void cnnc_rt_destroy_clocks(cnnc_rt_state *state);

#endif
