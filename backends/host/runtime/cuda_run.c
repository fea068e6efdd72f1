/* Runs on a GPU, waited for or put into a stream of the user's, and the clocks of kernels.
 *
 * Runs of a context follow one another, in whatever streams they are put. */
#define _GNU_SOURCE
#include "cuda_state.h"

#include <stdlib.h>
#include <unistd.h>

#define MODEL cnnc_rt_the_model

static int copy_all(const cnnc_rt_cuda *cuda, const cu_pointer *to, const cu_pointer *from, const cnnc_rt_tensor *ports,
                    int count, cu_stream stream) {
  for (int i = 0; i < count; i++) {
    if (ports[i].bytes != 0) {
      CNNC_RT_TRY(cuda->copy_async(to[i], from[i], ports[i].bytes, stream));
    }
  }
  return CNNC_RT_OK;
}

/* Puts a whole run into a stream.  A pointer of the caller's is one of the host or of a GPU: the driver can tell, as both
 * are of one address space.  Inputs are copied before outputs are written, so that they may overlap. */
static int put_run(cnnc_rt_state *state, const cnnc_rt_variant *variant, const void *const *inputs, void *const *outputs,
                   cu_stream stream, const cu_event *clocks) {
  _Static_assert(sizeof(void *) == sizeof(cu_pointer), "addresses of the host and of GPUs are alike");
  const cnnc_rt_cuda *cuda = state->cuda;
  int code;
  CNNC_RT_TRY(cuda->stream_wait_event(stream, state->done, 0));
  code = copy_all(cuda, state->inputs, (const cu_pointer *)inputs, variant->inputs, MODEL.input_count, stream);
  if (code == CNNC_RT_OK && clocks != NULL) {
    code = cnnc_rt_launch_all(state, variant, stream, clocks);
  } else if (code == CNNC_RT_OK) {
    code = cnnc_rt_cuda_error(cuda->graph_launch(state->graphs[variant - MODEL.variants], stream));
  }
  if (code == CNNC_RT_OK) {
    code = copy_all(cuda, (const cu_pointer *)outputs, state->outputs, variant->outputs, MODEL.output_count, stream);
  }
  /* Also after an error: some of the run may be in the stream. */
  int recorded = cnnc_rt_cuda_error(cuda->event_record(state->done, stream));
  return code == CNNC_RT_OK ? recorded : code;
}

/* Waits for all runs and tells whether values were out of range in one of them, once. */
static int finish(cnnc_rt_state *state) {
  const cnnc_rt_cuda *cuda = state->cuda;
  CNNC_RT_TRY(cuda->stream_wait_event(state->stream, state->done, 0));
  CNNC_RT_TRY(cuda->copy_to_host_async(&state->status_read, state->status, sizeof(int32_t), state->stream));
  CNNC_RT_TRY(cuda->stream_synchronize(state->stream));
  if (state->status_read == 0) {
    return CNNC_RT_OK;
  }
  CNNC_RT_TRY(cuda->set_words_async(state->status, 0, 1, state->stream));
  CNNC_RT_TRY(cuda->stream_synchronize(state->stream));
  return CNNC_RT_ERROR_VALUE;
}

static int read_clocks(cnnc_rt_context *context, const cnnc_rt_variant *variant) {
  const cu_event *clocks = context->state->clocks;
  const cnnc_rt_launches all = cnnc_rt_launches_of(variant);
  for (int i = 0; i < all.count; i++) {
    float milliseconds = 0;
    const int kernel = all.first[i].kernel;
    cnnc_rt_counter *counter = &context->counters[variant->first_step + kernel];
    CNNC_RT_TRY(context->state->cuda->event_elapsed_time(&milliseconds, clocks[i], clocks[i + 1]));
    counter->ns += (uint64_t)((double)milliseconds * 1e6);
    /* A kernel of several launches ran once. */
    counter->calls += i == 0 || all.first[i - 1].kernel != kernel;
  }
  return CNNC_RT_OK;
}

static int run_on_gpu(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                      void *const *outputs) {
  cnnc_rt_state *state = context->state;
  int code = put_run(state, variant, inputs, outputs, state->stream, context->profiled ? state->clocks : NULL);
  if (code == CNNC_RT_OK) {
    code = finish(state);
  }
  return code == CNNC_RT_OK && context->profiled ? read_clocks(context, variant) : code;
}

/* Whatever happens, nothing of the run is still writing to the caller's memory afterwards. */
int cnnc_rt_state_run(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                      void *const *outputs) {
  const cnnc_rt_cuda *cuda = context->state->cuda;
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  CNNC_RT_TRY(cuda->context_push(context->state->shared->context));
  int code = run_on_gpu(context, variant, inputs, outputs);
  if (code != CNNC_RT_OK) {
    cuda->stream_synchronize(context->state->stream);
  }
  cuda->context_pop(&none);
  return code;
}

static int put_variant(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                       void *const *outputs, void *stream) {
  const cnnc_rt_cuda *cuda = context->state->cuda;
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  CNNC_RT_TRY(cuda->context_push(context->state->shared->context));
  int code = put_run(context->state, variant, inputs, outputs, stream, NULL);
  cuda->context_pop(&none);
  return code;
}

static int run_variant_async(cnnc_rt_context *context, const cnnc_rt_variant *variant, const void *const *inputs,
                             void *const *outputs, void *stream) {
  cnnc_rt_slot *entry;
  int code = cnnc_rt_enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = cnnc_rt_check_pointers(variant, inputs, outputs);
  if (code == CNNC_RT_OK) {
    code = put_variant(context, variant, inputs, outputs, stream);
  }
  cnnc_rt_leave(entry);
  return code;
}

int cnnc_rt_run_async(cnnc_rt_context *context, const void *const *inputs, void *const *outputs, void *stream) {
  return run_variant_async(context, MODEL.variants, inputs, outputs, stream);
}

int cnnc_rt_run_batch_async(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs,
                            void *stream) {
  const cnnc_rt_variant *variant = cnnc_rt_find(batch);
  return variant != NULL ? run_variant_async(context, variant, inputs, outputs, stream) : CNNC_RT_ERROR_BATCH;
}

static int wait_for_runs(cnnc_rt_context *context) {
  cnnc_rt_state *state = context->state;
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  CNNC_RT_TRY(state->cuda->context_push(state->shared->context));
  int code = finish(state);
  state->cuda->context_pop(&none);
  return code;
}

int cnnc_rt_wait(cnnc_rt_context *context) {
  cnnc_rt_slot *entry;
  int code = cnnc_rt_enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = wait_for_runs(context);
  cnnc_rt_leave(entry);
  return code;
}

/* Clocks */

static int make_clocks(cnnc_rt_state *state) {
  const int count = cnnc_rt_most_launches() + 1;
  if (state->clocks != NULL) {
    return CNNC_RT_OK;
  }
  state->clocks = calloc((size_t)count, sizeof *state->clocks);
  if (state->clocks == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  for (int i = 0; i < count; i++) {
    int code = cnnc_rt_cuda_error(state->cuda->event_create(&state->clocks[i], 0));
    if (code != CNNC_RT_OK) {
      cnnc_rt_destroy_clocks(state);
      return code;
    }
  }
  return CNNC_RT_OK;
}

int cnnc_rt_state_profile(cnnc_rt_context *context, bool on) {
  const cnnc_rt_state *state = context->state;
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  if (!on) {
    return CNNC_RT_OK;
  }
  CNNC_RT_TRY(state->cuda->context_push(state->shared->context));
  int code = make_clocks(context->state);
  state->cuda->context_pop(&none);
  return code;
}
