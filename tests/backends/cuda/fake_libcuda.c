/* A stand-in for libcuda.so.1: the functions a cnnc artifact uses, on host memory, its modules being libraries that
 * fake_nvcc.py made.
 *
 * It does nothing before it must: what is put into a stream runs when the stream is synchronised, or another waits for an
 * event in it, so that a result read too early is wrong.  New memory is poisoned.  Calls without a current context, copies and arguments outside of
 * allocations, and launches that no GPU takes are refused with the driver's codes.
 *
 * CNNC_FAKE_CUDA steers it: "devices=0", "capability=86", "memory=BYTES", "order=N" (of threads), "fail=cuMemAlloc_v2:2:1"
 * (the function's calls end in error 2 after 1 that succeed).  With "report=1" it tells, when the process ends, how many
 * launches ran and what was never freed. */
#define _GNU_SOURCE
#include "emulation/tensor_map.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURING = 900 };

typedef const char *emulated(const unsigned *grid, const unsigned *block, unsigned shared, void **arguments,
                             unsigned order);

typedef struct function {
  emulated *run;
  unsigned argument_count;
  const unsigned *argument_bytes;
  struct function *next;
} function;

typedef struct module {
  void *library;
  function *functions;
} module;

enum { MOST_ARGUMENTS = 64 };

typedef struct argument {
  _Alignas(MAP_ALIGNMENT) char bytes[MAP_BYTES];
} argument;

enum kind { LAUNCH, SET_WORDS, COPY, RECORD, WAIT, GRAPH };

typedef struct operation {
  enum kind kind;
  function *what;
  unsigned grid[3], block[3], shared;
  argument *values;
  void *to;
  const void *from;
  size_t bytes;
  unsigned word;
  struct list *graph;
  struct event *event;
  struct list *stream; /* that a waited for record is in, ... */
  int ticket;          /* ... and which record of the event it is */
  struct operation *next;
} operation;

typedef struct list {
  operation *first, **last;
  int capturing;
} list;

/* Records are numbered: a wait is for the last one put before it. */
typedef struct event {
  int timed, issued, done, launches;
  list *stream;
} event;

typedef struct allocation {
  uint64_t start, bytes;
  struct allocation *next;
} allocation;

static allocation *allocations;
static uint64_t allocated;
static int retained, current, live, launches;
static list default_stream = {.last = &default_stream.first};
static char context_object;

static long option(const char *name, long otherwise) {
  const char *options = getenv("CNNC_FAKE_CUDA");
  const char *found = options != NULL ? strstr(options, name) : NULL;
  return found != NULL ? strtol(found + strlen(name), NULL, 10) : otherwise;
}

/* Tells whether this call is to fail, and how. */
static int planned(const char *name) {
  static int calls;
  const char *options = getenv("CNNC_FAKE_CUDA");
  const char *found = options != NULL ? strstr(options, "fail=") : NULL;
  size_t length = strlen(name);
  if (found == NULL || strncmp(found + 5, name, length) != 0 || found[5 + length] != ':') {
    return OK;
  }
  char *end;
  int error = (int)strtol(found + 5 + length + 1, &end, 10);
  return calls++ >= strtol(end + 1, NULL, 10) ? error : OK;
}

#define BEGIN() \
  do { \
    int error = planned(__func__); \
    if (error != OK) { \
      return error; \
    } \
  } while (0)

#define BEGIN_IN_CONTEXT() \
  BEGIN(); \
  if (!current) { \
    return INVALID_CONTEXT; \
  }

static int inside(uint64_t start, uint64_t bytes) {
  for (allocation *a = allocations; a != NULL; a = a->next) {
    if (start >= a->start && start + bytes <= a->start + a->bytes) {
      return 1;
    }
  }
  return 0;
}

int cuInit(unsigned flags) {
  BEGIN();
  return flags == 0 ? OK : INVALID_VALUE;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return OK;
}

int cuDeviceGetName(char *name, int bytes, int device) {
  snprintf(name, (size_t)bytes, "stand-in %d", device);
  return OK;
}

int cuGetErrorString(int error, const char **text) {
  *text = error == LAUNCH_FAILED ? "unspecified launch failure" : error == 700 ? "an illegal memory access was encountered" : NULL;
  return *text == NULL ? INVALID_VALUE : OK;
}

int cuDeviceGetCount(int *count) {
  BEGIN();
  *count = (int)option("devices=", 1);
  return OK;
}

int cuDeviceGet(int *device, int index) {
  BEGIN();
  *device = 7;
  return index < option("devices=", 1) ? OK : 101;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  BEGIN();
  long capability = option("capability=", 90);
  *value = (int)(attribute == 75 ? capability / 10 : capability % 10);
  return device == 7 && (attribute == 75 || attribute == 76) ? OK : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  BEGIN();
  *context = &context_object;
  retained++;
  return device == 7 ? OK : 101;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  retained--;
  return device == 7 ? OK : 101;
}

int cuCtxPushCurrent_v2(void *context) {
  BEGIN();
  if (context != &context_object || retained < 1) {
    return INVALID_CONTEXT;
  }
  current++;
  return OK;
}

int cuCtxPopCurrent_v2(void **context) {
  *context = &context_object;
  return current-- > 0 ? OK : INVALID_CONTEXT;
}

/* An image has no size of its own; this one is an ELF file, which ends with its section headers. */
static size_t image_bytes(const unsigned char *image) {
  uint64_t sections;
  uint16_t size, count;
  memcpy(&sections, image + 0x28, sizeof sections);
  memcpy(&size, image + 0x3a, sizeof size);
  memcpy(&count, image + 0x3c, sizeof count);
  return sections + (size_t)size * count;
}

/* Tells whether a module has machine code for this GPU, or PTX that can be compiled for it. */
static int runs_here(void *library) {
  const int capability = (int)option("capability=", 90);
  const int *machine = dlsym(library, "cnnc_machine_code"), *ptx = dlsym(library, "cnnc_ptx");
  const int same = machine != NULL && *machine / 10 == capability / 10 && *machine <= capability;
  return same || (ptx != NULL && *ptx != 0 && *ptx <= capability);
}

int cuModuleLoadData(module **out, const void *image) {
  BEGIN_IN_CONTEXT();
  char path[64];
  if (memcmp(image, "\177ELF", 4) != 0) {
    return INVALID_IMAGE;
  }
  int file = memfd_create("module", 0);
  size_t bytes = image_bytes(image);
  if (file < 0 || write(file, image, bytes) != (ssize_t)bytes) {
    return INVALID_IMAGE;
  }
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  module *made = calloc(1, sizeof *made);
  made->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (made->library == NULL) {
    fprintf(stderr, "fake CUDA: %s\n", dlerror());
    return INVALID_IMAGE;
  }
  if (!runs_here(made->library)) {
    dlclose(made->library);
    free(made);
    return NO_BINARY_FOR_GPU;
  }
  live++;
  *out = made;
  return OK;
}

int cuModuleUnload(module *module) {
  BEGIN_IN_CONTEXT();
  while (module->functions != NULL) {
    function *next = module->functions->next;
    free(module->functions);
    module->functions = next;
  }
  dlclose(module->library);
  free(module);
  live--;
  return OK;
}

int cuModuleGetFunction(function **out, module *module, const char *name) {
  BEGIN_IN_CONTEXT();
  char symbol[512];
  function *made = calloc(1, sizeof *made);
  snprintf(symbol, sizeof symbol, "cnnc_emulated_%s", name);
  *(void **)(&made->run) = dlsym(module->library, symbol);
  snprintf(symbol, sizeof symbol, "cnnc_arguments_%s", name);
  const unsigned *count = dlsym(module->library, symbol);
  snprintf(symbol, sizeof symbol, "cnnc_argument_bytes_%s", name);
  made->argument_bytes = dlsym(module->library, symbol);
  if (made->run == NULL || count == NULL || made->argument_bytes == NULL) {
    free(made);
    return NOT_FOUND;
  }
  made->argument_count = *count;
  made->next = module->functions;
  module->functions = made;
  *out = made;
  return OK;
}

int cuFuncSetAttribute(function *function, int attribute, int value) {
  BEGIN_IN_CONTEXT();
  return function != NULL && attribute == 8 && value > 0 && value <= 232448 ? OK : INVALID_VALUE;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) {
  BEGIN_IN_CONTEXT();
  if (bytes == 0) {
    return INVALID_VALUE;
  }
  if (allocated + bytes > (uint64_t)option("memory=", 1L << 33)) {
    return OUT_OF_MEMORY;
  }
  allocation *made = calloc(1, sizeof *made);
  made->bytes = bytes;
  made->start = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset((void *)(uintptr_t)made->start, 0xA5, bytes);
  made->next = allocations;
  allocations = made;
  allocated += bytes;
  live++;
  *pointer = made->start;
  return OK;
}

int cuMemFree_v2(uint64_t pointer) {
  BEGIN_IN_CONTEXT();
  for (allocation **at = &allocations; *at != NULL; at = &(*at)->next) {
    if ((*at)->start == pointer) {
      allocation *gone = *at;
      *at = gone->next;
      allocated -= gone->bytes;
      free((void *)(uintptr_t)gone->start);
      free(gone);
      live--;
      return OK;
    }
  }
  return INVALID_VALUE;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
  BEGIN_IN_CONTEXT();
  if (!inside(to, bytes)) {
    return INVALID_VALUE;
  }
  memcpy((void *)(uintptr_t)to, from, bytes);
  return OK;
}

/* Streams and graphs: lists of operations */

static int append(list *to, const operation *what) {
  operation *copy = malloc(sizeof *copy);
  *copy = *what;
  copy->next = NULL;
  *to->last = copy;
  to->last = &copy->next;
  return OK;
}

static list *make_list(void) {
  list *made = calloc(1, sizeof *made);
  made->last = &made->first;
  live++;
  return made;
}

static void empty(list *of) {
  while (of->first != NULL) {
    operation *next = of->first->next;
    free(of->first);
    of->first = next;
  }
  of->last = &of->first;
}

static int run_list(list *of);
static int run_until(list *stream, event *event, int ticket);

/* Whether an argument is a pointer into an allocation, or a map of what is inside one. */
static int is_valid(const argument *value, unsigned bytes) {
  uint64_t pointer;
  tensor_map map;
  if (bytes == sizeof pointer) {
    memcpy(&pointer, value, sizeof pointer);
    return inside(pointer, 0);
  }
  memcpy(&map, value, sizeof map);
  return bytes == MAP_BYTES && map.magic == MAP_MAGIC && inside(map.address, map_extent(&map));
}

static int run_launch(operation *o) {
  void *arguments[MOST_ARGUMENTS];
  for (unsigned i = 0; i < o->what->argument_count; i++) {
    if (!is_valid(&o->values[i], o->what->argument_bytes[i])) {
      fprintf(stderr, "fake CUDA: argument %u of a launch is in no allocation\n", i);
      return 700;
    }
    arguments[i] = &o->values[i];
  }
  const char *error = o->what->run(o->grid, o->block, o->shared, arguments, (unsigned)option("order=", 0));
  if (error != NULL) {
    fprintf(stderr, "fake CUDA: %s\n", error);
    return LAUNCH_FAILED;
  }
  launches++;
  return OK;
}

static int run_operation(operation *o) {
  switch (o->kind) {
    case LAUNCH:
      return run_launch(o);
    case SET_WORDS:
      for (size_t i = 0; i < o->bytes / 4; i++) {
        ((unsigned *)o->to)[i] = o->word;
      }
      return OK;
    case COPY:
      memcpy(o->to, o->from, o->bytes);
      return OK;
    case RECORD:
      o->event->done = o->ticket;
      o->event->launches = launches;
      return OK;
    case WAIT:
      return run_until(o->stream, o->event, o->ticket);
    default:
      return run_list(o->graph);
  }
}

static int run_list(list *of) {
  for (operation *o = of->first; o != NULL; o = o->next) {
    int error = run_operation(o);
    if (error != OK) {
      return error;
    }
  }
  return OK;
}

static void drop_first(list *of) {
  operation *gone = of->first;
  of->first = gone->next;
  of->last = of->first == NULL ? &of->first : of->last;
  free(gone);
}

/* Does what is in a stream up to a record of an event. */
static int run_until(list *stream, event *event, int ticket) {
  while (event->done < ticket) {
    /* Out of the list first: what runs may wait for the same stream. */
    operation next = *stream->first;
    drop_first(stream);
    int error = run_operation(&next);
    if (error != OK) {
      return error;
    }
  }
  return OK;
}

static list *real(list *stream) { return stream != NULL ? stream : &default_stream; }

int cuStreamCreate(list **stream, unsigned flags) {
  BEGIN_IN_CONTEXT();
  *stream = make_list();
  return flags <= 1 ? OK : INVALID_VALUE;
}

/* What is in a stream that is destroyed is still done. */
int cuStreamDestroy_v2(list *stream) {
  BEGIN_IN_CONTEXT();
  int error = run_list(stream);
  empty(stream);
  free(stream);
  live--;
  return error;
}

static int destroy_list(list *gone) {
  BEGIN_IN_CONTEXT();
  empty(gone);
  free(gone);
  live--;
  return OK;
}

int cuStreamSynchronize(list *stream) {
  BEGIN_IN_CONTEXT();
  stream = real(stream);
  if (stream->capturing) {
    return CAPTURING;
  }
  int error = run_list(stream);
  empty(stream);
  return error;
}

int cuStreamBeginCapture_v2(list *stream, int mode) {
  BEGIN_IN_CONTEXT();
  if (stream->capturing || stream->first != NULL || mode < 0 || mode > 2) {
    return INVALID_VALUE;
  }
  stream->capturing = 1;
  return OK;
}

int cuStreamEndCapture(list *stream, list **graph) {
  BEGIN_IN_CONTEXT();
  list *made = make_list();
  for (operation *o = stream->first; o != NULL; o = o->next) {
    append(made, o);
  }
  empty(stream);
  stream->capturing = 0;
  *graph = made;
  return OK;
}

int cuGraphInstantiateWithFlags(list **exec, list *graph, unsigned long long flags) {
  BEGIN_IN_CONTEXT();
  list *made = make_list();
  for (operation *o = graph->first; o != NULL; o = o->next) {
    append(made, o);
  }
  *exec = made;
  return flags == 0 ? OK : INVALID_VALUE;
}

int cuGraphDestroy(list *graph) { return destroy_list(graph); }

int cuGraphExecDestroy(list *exec) { return destroy_list(exec); }

int cuGraphLaunch(list *exec, list *stream) {
  BEGIN_IN_CONTEXT();
  const operation what = {.kind = GRAPH, .graph = exec};
  return append(real(stream), &what);
}

int cuLaunchKernel(function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, list *stream, void **arguments, void **extra) {
  BEGIN_IN_CONTEXT();
  operation what = {.kind = LAUNCH, .what = function, .shared = shared};
  const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  memcpy(what.grid, grid, sizeof grid);
  memcpy(what.block, block, sizeof block);
  if (extra != NULL || function->argument_count > MOST_ARGUMENTS || grid_y > 65535 || grid_z > 65535) {
    return INVALID_VALUE;
  }
  /* Kept until the process ends, as graphs share them with the streams they were captured in. */
  what.values = aligned_alloc(MAP_ALIGNMENT, (function->argument_count + 1) * sizeof *what.values);
  for (unsigned i = 0; i < function->argument_count; i++) {
    memcpy(&what.values[i], arguments[i], function->argument_bytes[i]);
  }
  return append(stream, &what);
}

int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, list *stream) {
  BEGIN_IN_CONTEXT();
  const operation what = {.kind = SET_WORDS, .to = (void *)(uintptr_t)to, .bytes = count * 4, .word = value};
  return inside(to, count * 4) ? append(stream, &what) : INVALID_VALUE;
}

/* From anywhere to anywhere: what begins in an allocation must end there, all else is memory of the host. */
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, list *stream) {
  BEGIN_IN_CONTEXT();
  const operation what = {
      .kind = COPY, .to = (void *)(uintptr_t)to, .from = (const void *)(uintptr_t)from, .bytes = bytes};
  if ((inside(to, 0) && !inside(to, bytes)) || (inside(from, 0) && !inside(from, bytes))) {
    return INVALID_VALUE;
  }
  return append(real(stream), &what);
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, list *stream) {
  BEGIN_IN_CONTEXT();
  const operation what = {.kind = COPY, .to = to, .from = (const void *)(uintptr_t)from, .bytes = bytes};
  return inside(from, bytes) ? append(stream, &what) : INVALID_VALUE;
}

int cuEventCreate(event **out, unsigned flags) {
  BEGIN_IN_CONTEXT();
  *out = calloc(1, sizeof **out);
  (*out)->timed = flags == 0;
  live++;
  return flags == 0 || flags == 2 ? OK : INVALID_VALUE;
}

int cuEventDestroy_v2(event *event) {
  BEGIN_IN_CONTEXT();
  free(event);
  live--;
  return OK;
}

int cuEventRecord(event *event, list *stream) {
  BEGIN_IN_CONTEXT();
  event->stream = real(stream);
  const operation what = {.kind = RECORD, .event = event, .ticket = ++event->issued};
  return append(real(stream), &what);
}

int cuStreamWaitEvent(list *stream, event *event, unsigned flags) {
  BEGIN_IN_CONTEXT();
  const operation what = {.kind = WAIT, .event = event, .stream = event->stream, .ticket = event->issued};
  return flags == 0 ? append(real(stream), &what) : INVALID_VALUE;
}

int cuEventSynchronize(event *event) {
  BEGIN_IN_CONTEXT();
  return run_until(event->stream, event, event->issued);
}

/* A launch takes a millisecond here. */
int cuEventElapsedTime(float *milliseconds, event *start, event *end) {
  BEGIN_IN_CONTEXT();
  if (!start->timed || !end->timed || start->done == 0 || end->done == 0) {
    return INVALID_HANDLE;
  }
  *milliseconds = (float)(end->launches - start->launches);
  return OK;
}

int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *shape,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  BEGIN_IN_CONTEXT();
  return map_encode_tiled(map, type, rank, address, shape, strides, box, steps, interleave, swizzle, promotion, fill);
}

int cuTensorMapEncodeIm2col(void *map, int type, unsigned rank, void *address, const uint64_t *shape,
                            const uint64_t *strides, const int *lower, const int *upper, unsigned channels,
                            unsigned pixels, const uint32_t *steps, int interleave, int swizzle, int promotion,
                            int fill) {
  BEGIN_IN_CONTEXT();
  return map_encode_im2col(map, type, rank, address, shape, strides, lower, upper, channels, pixels, steps, interleave,
                           swizzle, promotion, fill);
}

__attribute__((destructor)) static void report(void) {
  if (option("report=", 0)) {
    fprintf(stderr, "fake CUDA: %d launches, %d objects alive, context retained %d times, current %d times\n", launches,
            live, retained, current);
  }
}
