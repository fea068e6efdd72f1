/* Contexts of a model whose kernels run on a GPU: what context.c is for a CPU.
 *
 * A context has one allocation on the GPU, with everything that a run writes to, a stream, and the launches captured as
 * a graph; kernels and weights are shared (cuda_device.c).  Nothing here ends the process: what the driver refuses
 * becomes an error code. */
#define _GNU_SOURCE
#include "cuda.h"
#include "slots.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the driver aligns allocations to. */
#define GPU_ALIGNMENT 256
#define MODEL cnnc_rt_the_model
/* A binary for GPUs has one batch size. */
#define ONLY cnnc_rt_the_model.variants[0]
#define DEVICE cnnc_rt_the_device

struct cnnc_rt_context {
  const cnnc_rt_cuda *cuda;
  const cnnc_rt_shared *shared;
  int threads;
  bool profiled;
  pid_t pid;
  cu_pointer memory; /* arena, scratch, inputs, outputs, status */
  cu_pointer *inputs;
  cu_pointer *outputs;
  cu_pointer status;
  cu_stream stream;
  cu_graph_exec graph;
  cu_pointer *values; /* the arguments of all launches, one after the other ... */
  void **arguments;   /* ... and where they are, as the driver wants it */
  cu_event *events;   /* before the first launch and after each, made when profiling is first switched on */
  cnnc_rt_counter *counters;
};

static uint64_t round_up(uint64_t size) { return (size + GPU_ALIGNMENT - 1) / GPU_ALIGNMENT * GPU_ALIGNMENT; }

/* Contexts */

static int allocate(cnnc_rt_context *context) {
  uint64_t arena = round_up(MODEL.arena_bytes);
  uint64_t size = arena + round_up(MODEL.scratch_bytes);
  for (int i = 0; i < MODEL.input_count; i++) {
    context->inputs[i] = size;
    size += round_up(ONLY.inputs[i].bytes);
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    context->outputs[i] = size;
    size += round_up(ONLY.outputs[i].bytes);
  }
  context->status = size;
  CNNC_RT_TRY(context->cuda->mem_alloc(&context->memory, size + GPU_ALIGNMENT));
  for (int i = 0; i < MODEL.input_count; i++) {
    context->inputs[i] += context->memory;
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    context->outputs[i] += context->memory;
  }
  context->status += context->memory;
  return CNNC_RT_OK;
}

static cu_pointer place_of(const cnnc_rt_context *context, const cnnc_rt_argument *argument) {
  switch (argument->space) {
    case CNNC_RT_SPACE_INPUT:
      return context->inputs[argument->offset];
    case CNNC_RT_SPACE_OUTPUT:
      return context->outputs[argument->offset];
    case CNNC_RT_SPACE_WEIGHTS:
      return context->shared->weights + argument->offset;
    case CNNC_RT_SPACE_ARENA:
      return context->memory + argument->offset;
    case CNNC_RT_SPACE_SCRATCH:
      return context->memory + round_up(MODEL.arena_bytes) + argument->offset;
    default:
      return context->status;
  }
}

static void bind_arguments(cnnc_rt_context *context) {
  int next = 0;
  for (int i = 0; i < DEVICE.launch_count; i++) {
    for (int j = 0; j < DEVICE.launches[i].argument_count; j++, next++) {
      context->values[next] = place_of(context, &DEVICE.launches[i].arguments[j]);
      context->arguments[next] = &context->values[next];
    }
  }
}

/* Puts all launches into the stream, in order; with events around each if asked to. */
static int launch_all(cnnc_rt_context *context, const cu_event *events) {
  const cnnc_rt_cuda *cuda = context->cuda;
  void **arguments = context->arguments;
  CNNC_RT_TRY(cuda->set_words_async(context->status, 0, 1, context->stream));
  if (events != NULL) {
    CNNC_RT_TRY(cuda->event_record(events[0], context->stream));
  }
  for (int i = 0; i < DEVICE.launch_count; i++) {
    const cnnc_rt_launch *l = &DEVICE.launches[i];
    CNNC_RT_TRY(cuda->launch_kernel(context->shared->functions[i], l->grid[0], l->grid[1], l->grid[2], l->block[0],
                                    l->block[1], l->block[2], l->shared_bytes, context->stream, arguments, NULL));
    arguments += l->argument_count;
    if (events != NULL) {
      CNNC_RT_TRY(cuda->event_record(events[i + 1], context->stream));
    }
  }
  return CNNC_RT_OK;
}

static int capture(cnnc_rt_context *context) {
  const cnnc_rt_cuda *cuda = context->cuda;
  cu_graph graph = NULL;
  CNNC_RT_TRY(cuda->stream_begin_capture(context->stream, CU_CAPTURE_RELAXED));
  int code = launch_all(context, NULL);
  int ended = cnnc_rt_cuda_error(cuda->stream_end_capture(context->stream, &graph));
  code = code == CNNC_RT_OK ? ended : code;
  if (code == CNNC_RT_OK) {
    code = cnnc_rt_cuda_error(cuda->graph_instantiate(&context->graph, graph, 0));
  }
  if (graph != NULL) {
    cuda->graph_destroy(graph);
  }
  return code;
}

static int fill_on_gpu(cnnc_rt_context *context) {
  int code = allocate(context);
  if (code != CNNC_RT_OK) {
    return code;
  }
  bind_arguments(context);
  CNNC_RT_TRY(context->cuda->stream_create(&context->stream, CU_STREAM_NON_BLOCKING));
  return capture(context);
}

static int fill(cnnc_rt_context *context) {
  /* One more than needed: calloc may return NULL for nothing. */
  context->inputs = calloc((size_t)MODEL.input_count + 1, sizeof *context->inputs);
  context->outputs = calloc((size_t)MODEL.output_count + 1, sizeof *context->outputs);
  context->values = calloc((size_t)DEVICE.argument_count + 1, sizeof *context->values);
  context->arguments = calloc((size_t)DEVICE.argument_count + 1, sizeof *context->arguments);
  context->counters = calloc((size_t)ONLY.kernel_count + 1, sizeof *context->counters);
  if (!context->inputs || !context->outputs || !context->values || !context->arguments || !context->counters) {
    return CNNC_RT_ERROR_MEMORY;
  }
  cu_context none;
  CNNC_RT_TRY(context->cuda->context_push(context->shared->context));
  int code = fill_on_gpu(context);
  context->cuda->context_pop(&none);
  return code;
}

static void destroy_events(cnnc_rt_context *context) {
  for (int i = 0; context->events != NULL && i <= DEVICE.launch_count; i++) {
    if (context->events[i] != NULL) {
      context->cuda->event_destroy(context->events[i]);
    }
  }
}

static void release(cnnc_rt_context *context) {
  cu_context none;
  if (context->pid == getpid() && context->cuda->context_push(context->shared->context) == CU_SUCCESS) {
    if (context->graph != NULL) {
      context->cuda->graph_exec_destroy(context->graph);
    }
    destroy_events(context);
    if (context->stream != NULL) {
      context->cuda->stream_destroy(context->stream);
    }
    if (context->memory != 0) {
      context->cuda->mem_free(context->memory);
    }
    context->cuda->context_pop(&none);
  }
  free(context->inputs);
  free(context->outputs);
  free(context->values);
  free(context->arguments);
  free(context->events);
  free(context->counters);
  free(context);
  cnnc_rt_device_leave();
}

int cnnc_rt_create(int threads, cnnc_rt_context **out) {
  if (out == NULL) {
    return CNNC_RT_ERROR_NULL;
  }
  *out = NULL;
  if (threads < 0 || threads > CNNC_RT_MAX_THREADS) {
    return CNNC_RT_ERROR_THREADS;
  }
  const cnnc_rt_shared *shared;
  int code = cnnc_rt_device_join(&shared);
  if (code != CNNC_RT_OK) {
    return code;
  }
  cnnc_rt_context *context = calloc(1, sizeof *context);
  if (context == NULL) {
    cnnc_rt_device_leave();
    return CNNC_RT_ERROR_MEMORY;
  }
  context->shared = shared;
  context->cuda = shared->cuda;
  context->threads = threads == 0 ? 1 : threads;
  context->pid = getpid();
  code = fill(context);
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
  release(context);
  return CNNC_RT_OK;
}

/* Runs */

static bool overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
  uintptr_t x = (uintptr_t)a;
  uintptr_t y = (uintptr_t)b;
  return a_bytes != 0 && b_bytes != 0 && x < y + b_bytes && y < x + a_bytes;
}

static int check_pointers(const void *const *inputs, void *const *outputs) {
  for (int i = 0; i < MODEL.input_count; i++) {
    if (inputs[i] == NULL && ONLY.inputs[i].bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
  }
  for (int i = 0; i < MODEL.output_count; i++) {
    if (outputs[i] == NULL && ONLY.outputs[i].bytes != 0) {
      return CNNC_RT_ERROR_NULL;
    }
    for (int j = 0; j < i; j++) {
      if (overlap(outputs[i], ONLY.outputs[i].bytes, outputs[j], ONLY.outputs[j].bytes)) {
        return CNNC_RT_ERROR_OVERLAP;
      }
    }
  }
  return CNNC_RT_OK;
}

static int read_clocks(cnnc_rt_context *context) {
  for (int i = 0; i < DEVICE.launch_count; i++) {
    float milliseconds = 0;
    const int kernel = DEVICE.launches[i].kernel;
    CNNC_RT_TRY(context->cuda->event_elapsed_time(&milliseconds, context->events[i], context->events[i + 1]));
    context->counters[kernel].ns += (uint64_t)((double)milliseconds * 1e6);
    /* A kernel of several launches ran once. */
    context->counters[kernel].calls += i == 0 || DEVICE.launches[i - 1].kernel != kernel;
  }
  return CNNC_RT_OK;
}

/* Inputs are on the GPU before outputs are written, so that they may overlap in the caller's memory. */
static int run_on_gpu(cnnc_rt_context *context, const void *const *inputs, void *const *outputs) {
  const cnnc_rt_cuda *cuda = context->cuda;
  int32_t status = 0;
  for (int i = 0; i < MODEL.input_count; i++) {
    if (ONLY.inputs[i].bytes != 0) {
      CNNC_RT_TRY(cuda->copy_to_device_async(context->inputs[i], inputs[i], ONLY.inputs[i].bytes, context->stream));
    }
  }
  if (context->profiled) {
    int code = launch_all(context, context->events);
    if (code != CNNC_RT_OK) {
      return code;
    }
  } else {
    CNNC_RT_TRY(cuda->graph_launch(context->graph, context->stream));
  }
  CNNC_RT_TRY(cuda->copy_to_host_async(&status, context->status, sizeof status, context->stream));
  for (int i = 0; i < MODEL.output_count; i++) {
    if (ONLY.outputs[i].bytes != 0) {
      CNNC_RT_TRY(cuda->copy_to_host_async(outputs[i], context->outputs[i], ONLY.outputs[i].bytes, context->stream));
    }
  }
  CNNC_RT_TRY(cuda->stream_synchronize(context->stream));
  if (status != 0) {
    return CNNC_RT_ERROR_VALUE;
  }
  return context->profiled ? read_clocks(context) : CNNC_RT_OK;
}

/* Whatever happens, nothing of the run is still writing to the caller's memory afterwards. */
static int run_entered(cnnc_rt_context *context, const void *const *inputs, void *const *outputs) {
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  int code = check_pointers(inputs, outputs);
  if (code != CNNC_RT_OK) {
    return code;
  }
  CNNC_RT_TRY(context->cuda->context_push(context->shared->context));
  code = run_on_gpu(context, inputs, outputs);
  if (code != CNNC_RT_OK) {
    context->cuda->stream_synchronize(context->stream);
  }
  context->cuda->context_pop(&none);
  return code;
}

int cnnc_rt_run(cnnc_rt_context *context, const void *const *inputs, void *const *outputs) {
  slot *entry;
  if ((inputs == NULL && MODEL.input_count != 0) || (outputs == NULL && MODEL.output_count != 0)) {
    return CNNC_RT_ERROR_NULL;
  }
  int code = enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = run_entered(context, inputs, outputs);
  leave(entry);
  return code;
}

int cnnc_rt_run_batch(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs) {
  return cnnc_rt_find(batch) == NULL ? CNNC_RT_ERROR_BATCH : cnnc_rt_run(context, inputs, outputs);
}

/* Profiling */

static int make_events(cnnc_rt_context *context) {
  if (context->events != NULL) {
    return CNNC_RT_OK;
  }
  context->events = calloc((size_t)DEVICE.launch_count + 1, sizeof *context->events);
  if (context->events == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  for (int i = 0; i <= DEVICE.launch_count; i++) {
    int code = cnnc_rt_cuda_error(context->cuda->event_create(&context->events[i], 0));
    if (code != CNNC_RT_OK) {
      destroy_events(context);
      free(context->events);
      context->events = NULL;
      return code;
    }
  }
  return CNNC_RT_OK;
}

static int switch_clocks(cnnc_rt_context *context, int on) {
  cu_context none;
  if (context->pid != getpid()) {
    return CNNC_RT_ERROR_FORKED;
  }
  if (on) {
    CNNC_RT_TRY(context->cuda->context_push(context->shared->context));
    int code = make_events(context);
    context->cuda->context_pop(&none);
    if (code != CNNC_RT_OK) {
      return code;
    }
    memset(context->counters, 0, (size_t)ONLY.kernel_count * sizeof *context->counters);
  }
  context->profiled = on != 0;
  return CNNC_RT_OK;
}

int cnnc_rt_profile(cnnc_rt_context *context, int on) {
  slot *entry;
  int code = enter(context, &entry);
  if (code != CNNC_RT_OK) {
    return code;
  }
  code = switch_clocks(context, on);
  leave(entry);
  return code;
}

uint64_t cnnc_rt_kernel_ns(cnnc_rt_context *context, int index, uint64_t *calls) {
  slot *entry;
  cnnc_rt_counter read = {0, 0};
  if (index >= 0 && index < ONLY.kernel_count && enter(context, &entry) == CNNC_RT_OK) {
    read = context->counters[index];
    leave(entry);
  }
  if (calls != NULL) {
    *calls = read.calls;
  }
  return read.ns;
}

uint64_t cnnc_rt_batch_kernel_ns(cnnc_rt_context *context, int batch, int index, uint64_t *calls) {
  return cnnc_rt_kernel_ns(context, cnnc_rt_find(batch) == NULL ? -1 : index, calls);
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
