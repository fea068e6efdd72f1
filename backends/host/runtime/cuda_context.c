/* What a context keeps for kernels on a GPU, and its runs.
 *
 * A context has one allocation on the GPU, with everything that a run writes to, and for each batch size the launches
 * captured as a graph; kernels and weights are shared (cuda_device.c).  Runs of a context follow one another, in whatever
 * streams they are put.  Nothing here ends the process: what the driver refuses becomes an error code. */
#define _GNU_SOURCE
#include "context.h"
#include "cuda.h"

#include <stdlib.h>
#include <unistd.h>

/* What the driver aligns allocations to. */
#define GPU_ALIGNMENT 256
#define MODEL cnnc_rt_the_model
#define DEVICE cnnc_rt_the_device

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
  cu_event *clocks;      /* before the first launch and after each, made when profiling is first switched on */
};

/* The launches of a variant. */
typedef struct launches {
  const cnnc_rt_launch *first;
  int count;
} launches;

static launches launches_of(const cnnc_rt_variant *variant) {
  const int number = (int)(variant - MODEL.variants);
  const int first = DEVICE.first_launches[number];
  const launches found = {&DEVICE.launches[first], DEVICE.first_launches[number + 1] - first};
  return found;
}

static int most_launches(void) {
  int most = 0;
  for (int i = 0; i < MODEL.variant_count; i++) {
    const int count = launches_of(&MODEL.variants[i]).count;
    most = count > most ? count : most;
  }
  return most;
}

/* Memory */

static uint64_t round_up(uint64_t size) { return (size + GPU_ALIGNMENT - 1) / GPU_ALIGNMENT * GPU_ALIGNMENT; }

/* The bytes of a port in whichever variant it is largest. */
static uint64_t most_bytes(bool input, int index) {
  uint64_t most = 0;
  for (int i = 0; i < MODEL.variant_count; i++) {
    const cnnc_rt_variant *variant = &MODEL.variants[i];
    const uint64_t bytes = input ? variant->inputs[index].bytes : variant->outputs[index].bytes;
    most = bytes > most ? bytes : most;
  }
  return round_up(most);
}

static int allocate(cnnc_rt_state *state) {
  uint64_t size = round_up(MODEL.arena_bytes) + round_up(MODEL.scratch_bytes);
  for (int i = 0; i < MODEL.input_count; i++) {
    state->inputs[i] = size;
    size += most_bytes(true, i);
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    state->outputs[i] = size;
    size += most_bytes(false, i);
  }
  state->status = size;
  CNNC_RT_TRY(state->cuda->mem_alloc(&state->memory, size + GPU_ALIGNMENT));
  for (int i = 0; i < MODEL.input_count; i++) {
    state->inputs[i] += state->memory;
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    state->outputs[i] += state->memory;
  }
  state->status += state->memory;
  return CNNC_RT_OK;
}

static cu_pointer place_of(const cnnc_rt_state *state, const cnnc_rt_argument *argument) {
  switch (argument->space) {
    case CNNC_RT_SPACE_INPUT:
      return state->inputs[argument->offset];
    case CNNC_RT_SPACE_OUTPUT:
      return state->outputs[argument->offset];
    case CNNC_RT_SPACE_WEIGHTS:
      return state->shared->weights + argument->offset;
    case CNNC_RT_SPACE_ARENA:
      return state->memory + argument->offset;
    case CNNC_RT_SPACE_SCRATCH:
      return state->memory + round_up(MODEL.arena_bytes) + argument->offset;
    default:
      return state->status;
  }
}

static void bind_arguments(cnnc_rt_state *state) {
  for (int i = 0; i < DEVICE.launch_count; i++) {
    const cnnc_rt_launch *launch = &DEVICE.launches[i];
    for (int j = 0; j < launch->argument_count; j++) {
      const int at = launch->first_argument + j;
      state->values[at] = place_of(state, &launch->arguments[j]);
      state->arguments[at] = &state->values[at];
    }
  }
}

/* Graphs */

/* Puts the launches of a variant into a stream, in order; with events around each if asked to. */
static int launch_all(cnnc_rt_state *state, const cnnc_rt_variant *variant, cu_stream stream, const cu_event *clocks) {
  const cnnc_rt_cuda *cuda = state->cuda;
  const launches all = launches_of(variant);
  if (clocks != NULL) {
    CNNC_RT_TRY(cuda->event_record(clocks[0], stream));
  }
  for (int i = 0; i < all.count; i++) {
    const cnnc_rt_launch *l = &all.first[i];
    const cu_function function = state->shared->functions[l - DEVICE.launches];
    CNNC_RT_TRY(cuda->launch_kernel(function, l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1], l->block[2],
                                    l->shared_bytes, stream, state->arguments + l->first_argument, NULL));
    if (clocks != NULL) {
      CNNC_RT_TRY(cuda->event_record(clocks[i + 1], stream));
    }
  }
  return CNNC_RT_OK;
}

static int capture(cnnc_rt_state *state, const cnnc_rt_variant *variant, cu_graph_exec *out) {
  const cnnc_rt_cuda *cuda = state->cuda;
  cu_graph graph = NULL;
  CNNC_RT_TRY(cuda->stream_begin_capture(state->stream, CU_CAPTURE_RELAXED));
  int code = launch_all(state, variant, state->stream, NULL);
  int ended = cnnc_rt_cuda_error(cuda->stream_end_capture(state->stream, &graph));
  code = code == CNNC_RT_OK ? ended : code;
  if (code == CNNC_RT_OK) {
    code = cnnc_rt_cuda_error(cuda->graph_instantiate(out, graph, 0));
  }
  if (graph != NULL) {
    cuda->graph_destroy(graph);
  }
  return code;
}

/* Create and destroy */

static int fill_on_gpu(cnnc_rt_state *state) {
  const cnnc_rt_cuda *cuda = state->cuda;
  int code = allocate(state);
  if (code != CNNC_RT_OK) {
    return code;
  }
  bind_arguments(state);
  CNNC_RT_TRY(cuda->stream_create(&state->stream, CU_STREAM_NON_BLOCKING));
  CNNC_RT_TRY(cuda->event_create(&state->done, CU_EVENT_DISABLE_TIMING));
  for (int i = 0; code == CNNC_RT_OK && i < MODEL.variant_count; i++) {
    code = capture(state, &MODEL.variants[i], &state->graphs[i]);
  }
  if (code != CNNC_RT_OK) {
    return code;
  }
  CNNC_RT_TRY(cuda->set_words_async(state->status, 0, 1, state->stream));
  CNNC_RT_TRY(cuda->event_record(state->done, state->stream));
  return CNNC_RT_OK;
}

static int fill(cnnc_rt_state *state) {
  cu_context none;
  /* One more than needed: calloc may return NULL for nothing. */
  state->inputs = calloc((size_t)MODEL.input_count + 1, sizeof *state->inputs);
  state->outputs = calloc((size_t)MODEL.output_count + 1, sizeof *state->outputs);
  state->values = calloc((size_t)DEVICE.argument_count + 1, sizeof *state->values);
  state->arguments = calloc((size_t)DEVICE.argument_count + 1, sizeof *state->arguments);
  state->graphs = calloc((size_t)MODEL.variant_count, sizeof *state->graphs);
  if (!state->inputs || !state->outputs || !state->values || !state->arguments || !state->graphs) {
    return CNNC_RT_ERROR_MEMORY;
  }
  CNNC_RT_TRY(state->cuda->context_push(state->shared->context));
  int code = fill_on_gpu(state);
  state->cuda->context_pop(&none);
  return code;
}

int cnnc_rt_state_create(cnnc_rt_context *context) {
  const cnnc_rt_shared *shared;
  int code = cnnc_rt_device_join(&shared);
  if (code != CNNC_RT_OK) {
    return code;
  }
  cnnc_rt_state *state = calloc(1, sizeof *state);
  if (state == NULL) {
    cnnc_rt_device_leave();
    return CNNC_RT_ERROR_MEMORY;
  }
  state->shared = shared;
  state->cuda = shared->cuda;
  context->state = state;
  context->threads = context->threads == 0 ? 1 : context->threads;
  return fill(state);
}

static void destroy_clocks(cnnc_rt_state *state) {
  const int count = most_launches() + 1;
  for (int i = 0; state->clocks != NULL && i < count; i++) {
    if (state->clocks[i] != NULL) {
      state->cuda->event_destroy(state->clocks[i]);
    }
  }
  free(state->clocks);
  state->clocks = NULL;
}

static void release_on_gpu(cnnc_rt_state *state) {
  const cnnc_rt_cuda *cuda = state->cuda;
  if (state->done != NULL) {
    /* A run may still be under way in a stream of the user's. */
    cuda->event_synchronize(state->done);
  }
  if (state->stream != NULL) {
    cuda->stream_destroy(state->stream);
  }
  for (int i = 0; state->graphs != NULL && i < MODEL.variant_count; i++) {
    if (state->graphs[i] != NULL) {
      cuda->graph_exec_destroy(state->graphs[i]);
    }
  }
  destroy_clocks(state);
  if (state->done != NULL) {
    cuda->event_destroy(state->done);
  }
  if (state->memory != 0) {
    cuda->mem_free(state->memory);
  }
}

void cnnc_rt_state_destroy(cnnc_rt_context *context) {
  cnnc_rt_state *state = context->state;
  cu_context none;
  if (state == NULL) {
    return;
  }
  if (context->pid == getpid() && state->cuda->context_push(state->shared->context) == CU_SUCCESS) {
    release_on_gpu(state);
    state->cuda->context_pop(&none);
  }
  free(state->inputs);
  free(state->outputs);
  free(state->values);
  free(state->arguments);
  free(state->graphs);
  free(state->clocks);
  free(state);
  cnnc_rt_device_leave();
}

/* Runs */

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
    code = launch_all(state, variant, stream, clocks);
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
  const launches all = launches_of(variant);
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
  const int count = most_launches() + 1;
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
      destroy_clocks(state);
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
