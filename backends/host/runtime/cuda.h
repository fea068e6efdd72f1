/* What the generated driver of a model for GPUs holds (device_driver.py), and what of CUDA's driver API runs it.
 *
 * The declarations are the runtime's own, from the CUDA Driver API reference: a binary is built where no toolkit is. */
#ifndef CNNC_RT_CUDA_H
#define CNNC_RT_CUDA_H

#include "cnnc_rt.h"

/* Where a pointer argument of a launch points; the order is that of SPACES in device_driver.py. */
enum cnnc_rt_space {
  CNNC_RT_SPACE_INPUT,
  CNNC_RT_SPACE_OUTPUT,
  CNNC_RT_SPACE_WEIGHTS,
  CNNC_RT_SPACE_ARENA,
  CNNC_RT_SPACE_SCRATCH,
  CNNC_RT_SPACE_STATUS,
  CNNC_RT_SPACE_MAP
};

/* `offset` is the index for inputs and outputs, the number of a tensor map, else bytes from the start of that memory. */
typedef struct cnnc_rt_argument {
  uint64_t offset;
  int32_t space;
} cnnc_rt_argument;

/* A tensor that copies of boxes find their way in (`TensorMap` in device.py); axes from the innermost. */
typedef struct cnnc_rt_map {
  cnnc_rt_argument tensor;
  uint64_t shape[5];
  uint64_t strides[4];
  uint32_t box[5]; /* channels and pixels with `is_im2col` */
  uint32_t steps[5];
  int32_t lower[3];
  int32_t upper[3];
  int32_t type;    /* CUtensorMapDataType */
  int32_t rank;
  int32_t swizzle; /* CUtensorMapSwizzle */
  int32_t is_im2col;
} cnnc_rt_map;

typedef struct cnnc_rt_launch {
  const char *function;
  const cnnc_rt_argument *arguments;
  int32_t argument_count;
  int32_t module;
  int32_t kernel;         /* the row of its variant's kernels it is a part of */
  int32_t first_argument; /* of its arguments, among those of all launches */
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
} cnnc_rt_launch;

typedef struct cnnc_rt_device {
  const char *const *modules;     /* fat binaries */
  const cnnc_rt_launch *launches; /* of all variants, one after the other */
  const int32_t *first_launches;  /* of each variant, and the end */
  const cnnc_rt_map *maps;        /* of all launches */
  int32_t module_count;
  int32_t launch_count;
  int32_t argument_count; /* of all launches together */
  int32_t map_count;
  int32_t major;          /* the compute capability the machine code is for: 9 and 0 for sm_90 */
  int32_t minor;
  int32_t portable;       /* not 0 if there is PTX too, which the driver compiles for GPUs of higher capabilities;
                             0 if the code is for this one alone */
} cnnc_rt_device;

extern const cnnc_rt_device cnnc_rt_the_device;

typedef uint64_t cu_pointer;
typedef struct cu_tensor_map {
  _Alignas(64) uint64_t opaque[16];
} cu_tensor_map;
typedef struct cu_context *cu_context;
typedef struct cu_module *cu_module;
typedef struct cu_function *cu_function;
typedef struct cu_stream *cu_stream;
typedef struct cu_event *cu_event;
typedef struct cu_graph *cu_graph;
typedef struct cu_graph_exec *cu_graph_exec;

/* CUresult */
enum {
  CU_SUCCESS = 0,
  CU_OUT_OF_MEMORY = 2,
  CU_STUB_LIBRARY = 34,
  CU_NO_DEVICE = 100,
  CU_NO_BINARY_FOR_GPU = 209,
  CU_SYSTEM_DRIVER_MISMATCH = 803
};

enum {
  CU_COMPUTE_CAPABILITY_MAJOR = 75, /* CUdevice_attribute */
  CU_COMPUTE_CAPABILITY_MINOR = 76,
  CU_MAX_DYNAMIC_SHARED_BYTES = 8, /* CUfunction_attribute */
  CU_STREAM_NON_BLOCKING = 1,
  CU_EVENT_DISABLE_TIMING = 2,
  CU_CAPTURE_RELAXED = 2, /* CUstreamCaptureMode: what the driver does by itself meanwhile is no mistake */
  CU_NOT_INTERLEAVED = 0,  /* CUtensorMapInterleave */
  CU_L2_PROMOTION_128 = 2, /* CUtensorMapL2promotion: whole lines of the cache */
  CU_ZERO_FILL = 0         /* CUtensorMapFloatOOBfill */
};

/* name of the field, symbol in libcuda.so.1, parameters */
#define CNNC_RT_CUDA_FUNCTIONS(F) \
  F(init, "cuInit", (unsigned flags)) \
  F(get_error_string, "cuGetErrorString", (int result, const char **text)) \
  F(device_get_count, "cuDeviceGetCount", (int *count)) \
  F(device_get, "cuDeviceGet", (int *device, int index)) \
  F(device_get_attribute, "cuDeviceGetAttribute", (int *value, int attribute, int device)) \
  F(primary_context_retain, "cuDevicePrimaryCtxRetain", (cu_context *context, int device)) \
  F(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (int device)) \
  F(context_push, "cuCtxPushCurrent_v2", (cu_context context)) \
  F(context_pop, "cuCtxPopCurrent_v2", (cu_context *context)) \
  F(module_load_data, "cuModuleLoadData", (cu_module *module, const void *image)) \
  F(module_unload, "cuModuleUnload", (cu_module module)) \
  F(module_get_function, "cuModuleGetFunction", (cu_function *function, cu_module module, const char *name)) \
  F(function_set_attribute, "cuFuncSetAttribute", (cu_function function, int attribute, int value)) \
  F(mem_alloc, "cuMemAlloc_v2", (cu_pointer *pointer, size_t bytes)) \
  F(mem_free, "cuMemFree_v2", (cu_pointer pointer)) \
  F(copy_to_device, "cuMemcpyHtoD_v2", (cu_pointer to, const void *from, size_t bytes)) \
  F(copy_async, "cuMemcpyAsync", (cu_pointer to, cu_pointer from, size_t bytes, cu_stream stream)) \
  F(copy_to_host_async, "cuMemcpyDtoHAsync_v2", (void *to, cu_pointer from, size_t bytes, cu_stream stream)) \
  F(set_words_async, "cuMemsetD32Async", (cu_pointer to, unsigned value, size_t count, cu_stream stream)) \
  F(stream_create, "cuStreamCreate", (cu_stream *stream, unsigned flags)) \
  F(stream_destroy, "cuStreamDestroy_v2", (cu_stream stream)) \
  F(stream_synchronize, "cuStreamSynchronize", (cu_stream stream)) \
  F(stream_wait_event, "cuStreamWaitEvent", (cu_stream stream, cu_event event, unsigned flags)) \
  F(stream_begin_capture, "cuStreamBeginCapture_v2", (cu_stream stream, int mode)) \
  F(stream_end_capture, "cuStreamEndCapture", (cu_stream stream, cu_graph *graph)) \
  F(graph_instantiate, "cuGraphInstantiateWithFlags", (cu_graph_exec *exec, cu_graph graph, unsigned long long flags)) \
  F(graph_launch, "cuGraphLaunch", (cu_graph_exec exec, cu_stream stream)) \
  F(graph_exec_destroy, "cuGraphExecDestroy", (cu_graph_exec exec)) \
  F(graph_destroy, "cuGraphDestroy", (cu_graph graph)) \
  F(event_create, "cuEventCreate", (cu_event *event, unsigned flags)) \
  F(event_destroy, "cuEventDestroy_v2", (cu_event event)) \
  F(event_record, "cuEventRecord", (cu_event event, cu_stream stream)) \
  F(event_synchronize, "cuEventSynchronize", (cu_event event)) \
  F(event_elapsed_time, "cuEventElapsedTime", (float *milliseconds, cu_event start, cu_event end)) \
  F(launch_kernel, "cuLaunchKernel", \
    (cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
     unsigned block_z, unsigned shared_bytes, cu_stream stream, void **arguments, void **extra))

/* What only models with tensor maps need, since CUDA 12.0. */
#define CNNC_RT_CUDA_MAP_FUNCTIONS(F) \
  F(map_encode_tiled, "cuTensorMapEncodeTiled", \
    (cu_tensor_map *map, int type, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides, \
     const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill)) \
  F(map_encode_im2col, "cuTensorMapEncodeIm2col", \
    (cu_tensor_map *map, int type, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides, \
     const int *lower, const int *upper, uint32_t channels, uint32_t pixels, const uint32_t *steps, int interleave, \
     int swizzle, int promotion, int fill))

typedef struct cnnc_rt_cuda {
#define FIELD(name, symbol, parameters) int(*name) parameters;
  CNNC_RT_CUDA_FUNCTIONS(FIELD)
  CNNC_RT_CUDA_MAP_FUNCTIONS(FIELD)
#undef FIELD
} cnnc_rt_cuda;

/* Ends the function with this runtime's error unless a call of the driver succeeds. */
#define CNNC_RT_TRY(call) \
  do { \
    int tried = cnnc_rt_cuda_error(call); \
    if (tried != CNNC_RT_OK) { \
      return tried; \
    } \
  } while (0)

/* cuda_run.c: puts a run into a stream (CUstream), and waits for all that were put. */
int cnnc_rt_run_async(cnnc_rt_context *context, const void *const *inputs, void *const *outputs, void *stream);
int cnnc_rt_run_batch_async(cnnc_rt_context *context, int batch, const void *const *inputs, void *const *outputs,
                            void *stream);
int cnnc_rt_wait(cnnc_rt_context *context);

/* cuda_library.c: loads CUDA's driver, once; an error of this runtime. */
int cnnc_rt_cuda_load(const cnnc_rt_cuda **out);

/* The error of this runtime for a result of the driver, whose text it keeps for cnnc_rt_error_text. */
int cnnc_rt_cuda_error(int result);

/* cuda_device.c */
typedef struct cnnc_rt_shared {
  const cnnc_rt_cuda *cuda;
  int number;
  cu_context context;
  cu_module *modules;
  cu_function *functions; /* of each launch */
  cu_pointer weights;
} cnnc_rt_shared;

/* Each join that succeeds is to be followed by one leave. */
int cnnc_rt_device_join(const cnnc_rt_shared **out);
void cnnc_rt_device_leave(void);

#endif
