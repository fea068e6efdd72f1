/* Types shared by the runtime's files, by the generated driver (driver.py) and by the loader (library.py).
 * A change of any layout here is a change of CNNC_RT_ABI and of those two files. */
#ifndef CNNC_RT_H
#define CNNC_RT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CNNC_RT_ABI 2
#define CNNC_RT_MAGIC UINT64_C(0x31306c646d636e63) /* "cncmdl01" */
#define CNNC_RT_ALIGNMENT 64
#define CNNC_RT_MAX_THREADS 1024
#define CNNC_RT_MAX_CONTEXTS 1024
#define CNNC_RT_MXCSR 0x1f80 /* round to nearest, keep denormals, no traps */

/* code / 100 is the exit code cnnc's command line gives to the same kind of problem (7000: 70, our bug). */
enum cnnc_rt_error {
  CNNC_RT_OK = 0,
  CNNC_RT_ERROR_NULL = 201,
  CNNC_RT_ERROR_THREADS = 202,
  CNNC_RT_ERROR_CONTEXT = 203,
  CNNC_RT_ERROR_BUSY = 204,
  CNNC_RT_ERROR_OVERLAP = 205,
  CNNC_RT_ERROR_BATCH = 206,
  CNNC_RT_ERROR_VALUE = 301,
  CNNC_RT_ERROR_TOO_MANY = 501,
  CNNC_RT_ERROR_MEMORY = 601,
  CNNC_RT_ERROR_START_THREAD = 602,
  CNNC_RT_ERROR_DRIVER = 603,
  CNNC_RT_ERROR_NO_GPU = 604,
  CNNC_RT_ERROR_GPU_MEMORY = 605,
  CNNC_RT_ERROR_GPU = 606,
  CNNC_RT_ERROR_FORKED = 607,
  CNNC_RT_ERROR_CPU = 701,
  CNNC_RT_ERROR_GPU_ARCH = 702,
  CNNC_RT_ERROR_KERNEL = 7001
};

typedef struct cnnc_rt_tensor {
  const char *name;
  int32_t dtype;
  int32_t rank;
  const int64_t *dims;
  uint64_t bytes;
} cnnc_rt_tensor;

typedef struct cnnc_rt_kernel {
  const char *symbol;
  const char *const *layers;
  int32_t layer_count;
  int32_t slices;
  uint64_t flops;
  uint64_t bytes;
  const char *algorithm;
  const char *schedule;
} cnnc_rt_kernel;

typedef struct cnnc_rt_context cnnc_rt_context;

/* The memory of one run. */
typedef struct cnnc_rt_bases {
  const void *const *inputs;
  void *const *outputs;
  char *arena;
  const char *weights;
} cnnc_rt_bases;

/* Runs the slices [lo, hi) of one kernel call: knows where its arguments lie; made by driver.py.  `last` is the slice of
 * this call that left the scratch memory as it is, or -1: what it has there need not be made again. */
typedef int32_t cnnc_rt_thunk(const cnnc_rt_bases *bases, void *scratch, int32_t last, int32_t lo, int32_t hi);

typedef struct cnnc_rt_step {
  cnnc_rt_thunk *thunk;
  int32_t slices;
} cnnc_rt_step;

/* The model for one batch size; `batch` is 0 where none was asked for.  All sizes have the same number of ports. */
typedef struct cnnc_rt_variant {
  const cnnc_rt_tensor *inputs;
  const cnnc_rt_tensor *outputs;
  const cnnc_rt_kernel *kernels; /* of each kernel call, what is known of it */
  int32_t batch;
  int32_t kernel_count;
  int32_t first_step; /* the step of its first kernel call; the others follow */
} cnnc_rt_variant;

typedef struct cnnc_rt_model {
  const char *name;
  const char *prefix;
  const char *cpu;
  const char *meta;
  const char *const *features;
  const cnnc_rt_variant *variants;
  const cnnc_rt_step *steps; /* of all variants; after those of each comes an end: one slice, never run */
  const char *weights;
  uint64_t weight_bytes;
  uint64_t arena_bytes;
  uint64_t scratch_bytes;
  int32_t feature_count;
  int32_t input_count;
  int32_t output_count;
  int32_t variant_count;
  int32_t step_count;
} cnnc_rt_model;

/* The one description of the model in this binary; made by driver.py. */
extern const cnnc_rt_model cnnc_rt_the_model;

/* info.c: the variant for a batch size; NULL if there is none. */
const cnnc_rt_variant *cnnc_rt_find(int batch);

/* context.c; what takes no batch size is for the first. */
int cnnc_rt_create(int threads, cnnc_rt_context **out);
int cnnc_rt_run(cnnc_rt_context *context, const void *const *inputs, void *const *outputs);
int cnnc_rt_run_batch(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs);
int cnnc_rt_destroy(cnnc_rt_context *context);
int cnnc_rt_profile(cnnc_rt_context *context, int on);
uint64_t cnnc_rt_kernel_ns(cnnc_rt_context *context, int index, uint64_t *calls);
uint64_t cnnc_rt_batch_kernel_ns(cnnc_rt_context *context, int batch, int index, uint64_t *calls);
int cnnc_rt_threads(cnnc_rt_context *context);

/* info.c */
int cnnc_rt_input_count(void);
int cnnc_rt_output_count(void);
const cnnc_rt_tensor *cnnc_rt_input(int index);
const cnnc_rt_tensor *cnnc_rt_output(int index);
int cnnc_rt_kernel_count(void);
const cnnc_rt_kernel *cnnc_rt_kernel_at(int index);
int cnnc_rt_batch_count(void);
int cnnc_rt_batch_at(int index);
const cnnc_rt_tensor *cnnc_rt_batch_input(int batch, int index);
const cnnc_rt_tensor *cnnc_rt_batch_output(int batch, int index);
int cnnc_rt_batch_kernel_count(int batch);
const cnnc_rt_kernel *cnnc_rt_batch_kernel(int batch, int index);
const char *cnnc_rt_meta(void);
const char *cnnc_rt_error_text(int code);
int cnnc_rt_abi_version(void);
/* What the last error of a GPU was, for CNNC_RT_ERROR_GPU; NULL until there is one. */
extern _Atomic(const char *) cnnc_rt_gpu_text;

/* What `cnnc_model_v1` points to: enough to use any cnnc binary without knowing its prefix. */
typedef struct cnnc_rt_table {
  uint64_t magic;
  uint32_t abi;
  uint32_t table_bytes;
  const cnnc_rt_model *model;
  int (*create)(int threads, cnnc_rt_context **out);
  int (*run_batch)(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs);
  int (*destroy)(cnnc_rt_context *context);
  int (*profile)(cnnc_rt_context *context, int on);
  uint64_t (*batch_kernel_ns)(cnnc_rt_context *context, int batch, int index, uint64_t *calls);
  int (*threads)(cnnc_rt_context *context);
  const char *(*error_text)(int code);
} cnnc_rt_table;
extern const cnnc_rt_table cnnc_rt_the_table;

/* cpu.c: the first needed feature this CPU (or its operating system) lacks, as a whole sentence; NULL if none. */
const char *cnnc_rt_missing_feature(const char *const *features, int32_t count);

/* pool.c */
typedef struct cnnc_rt_pool cnnc_rt_pool;

typedef struct cnnc_rt_counter {
  uint64_t ns;
  uint64_t calls;
} cnnc_rt_counter;

int cnnc_rt_pool_create(int threads, char *scratch, size_t scratch_stride, cnnc_rt_pool **out);
void cnnc_rt_pool_destroy(cnnc_rt_pool *pool, bool forked);
/* Runs all kernels of a variant in order.  With counters, one for each step, each kernel is timed; alone, the caller does
 * all lanes' work. */
int32_t cnnc_rt_pool_run(cnnc_rt_pool *pool, const cnnc_rt_variant *variant, const cnnc_rt_bases *bases,
                         cnnc_rt_counter *counters, bool alone);
int cnnc_rt_allowed_cpus(void);
int64_t cnnc_rt_clock(void);

#endif
