/* What a context keeps for kernels on a GPU: memory, and for each batch size the launches captured as a graph.
 *
 * A context has one allocation on the GPU, with everything that a run writes to; kernels and weights are shared
 * (cuda_device.c).  Nothing here ends the process: what the driver refuses becomes an error code. */
#define _GNU_SOURCE
#include "cuda_state.h"

#include <stdlib.h>
#include <unistd.h>

/* What the driver aligns allocations to. */
#define GPU_ALIGNMENT 256
#define MODEL cnnc_rt_the_model
#define DEVICE cnnc_rt_the_device

cnnc_rt_launches cnnc_rt_launches_of(const cnnc_rt_variant *variant) {
  const int number = (int)(variant - MODEL.variants);
  const int first = DEVICE.first_launches[number];
  const cnnc_rt_launches found = {&DEVICE.launches[first], DEVICE.first_launches[number + 1] - first};
  return found;
}

int cnnc_rt_most_launches(void) {
  int most = 0;
  for (int i = 0; i < MODEL.variant_count; i++) {
    const int count = cnnc_rt_launches_of(&MODEL.variants[i]).count;
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

/* Memory stays where it is, so that maps of it are made once, and captured with the launches. */
static int encode_maps(cnnc_rt_state *state) {
  const cnnc_rt_cuda *cuda = state->cuda;
  for (int i = 0; i < DEVICE.map_count; i++) {
    const cnnc_rt_map *m = &DEVICE.maps[i];
    const uint32_t rank = (uint32_t)m->rank;
    void *address = (void *)(uintptr_t)place_of(state, &m->tensor);
    if (m->is_im2col) {
      CNNC_RT_TRY(cuda->map_encode_im2col(&state->maps[i], m->type, rank, address, m->shape, m->strides, m->lower,
                                          m->upper, m->box[0], m->box[1], m->steps, CU_NOT_INTERLEAVED, m->swizzle,
                                          CU_L2_PROMOTION_128, CU_ZERO_FILL));
    } else {
      CNNC_RT_TRY(cuda->map_encode_tiled(&state->maps[i], m->type, rank, address, m->shape, m->strides, m->box,
                                         m->steps, CU_NOT_INTERLEAVED, m->swizzle, CU_L2_PROMOTION_128, CU_ZERO_FILL));
    }
  }
  return CNNC_RT_OK;
}

static void bind_arguments(cnnc_rt_state *state) {
  for (int i = 0; i < DEVICE.launch_count; i++) {
    const cnnc_rt_launch *launch = &DEVICE.launches[i];
    for (int j = 0; j < launch->argument_count; j++) {
      const int at = launch->first_argument + j;
      const cnnc_rt_argument *argument = &launch->arguments[j];
      if (argument->space == CNNC_RT_SPACE_MAP) {
        state->arguments[at] = &state->maps[argument->offset];
        continue;
      }
      state->values[at] = place_of(state, argument);
      state->arguments[at] = &state->values[at];
    }
  }
}

/* Graphs */

/* Puts the launches of a variant into a stream, in order; with events around each if asked to. */
int cnnc_rt_launch_all(cnnc_rt_state *state, const cnnc_rt_variant *variant, cu_stream stream, const cu_event *clocks) {
  const cnnc_rt_cuda *cuda = state->cuda;
  const cnnc_rt_launches all = cnnc_rt_launches_of(variant);
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
  int code = cnnc_rt_launch_all(state, variant, state->stream, NULL);
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
  code = encode_maps(state);
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
  state->maps = aligned_alloc(_Alignof(cu_tensor_map), ((size_t)DEVICE.map_count + 1) * sizeof *state->maps);
  if (!state->inputs || !state->outputs || !state->values || !state->arguments || !state->graphs || !state->maps) {
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

void cnnc_rt_destroy_clocks(cnnc_rt_state *state) {
  const int count = cnnc_rt_most_launches() + 1;
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
  cnnc_rt_destroy_clocks(state);
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
  free(state->maps);
  free(state->graphs);
  free(state->clocks);
  free(state);
  cnnc_rt_device_leave();
}
