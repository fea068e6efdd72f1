/* What all contexts of a process share on the GPU: CUDA's primary context, the kernels, and the weights, uploaded once.
 * The first context makes it, the last one frees it. */
#define _GNU_SOURCE
#include "cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

/* Shared memory of a block beyond which a function must ask for it. */
#define SMALL_SHARED_BYTES (48u << 10)

#define MODEL cnnc_rt_the_model
#define DEVICE cnnc_rt_the_device

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int users;
static pid_t opened_in; /* the process the driver serves: it does not outlive a fork */
static cnnc_rt_shared device;

/* A GPU runs machine code for its own architecture and for lower ones of the same generation, and PTX for any lower;
 * what has no PTX uses what other architectures lack. */
static int check_architecture(const cnnc_rt_cuda *cuda, int number) {
  int major, minor;
  CNNC_RT_TRY(cuda->device_get_attribute(&major, CU_COMPUTE_CAPABILITY_MAJOR, number));
  CNNC_RT_TRY(cuda->device_get_attribute(&minor, CU_COMPUTE_CAPABILITY_MINOR, number));
  const bool same = major == DEVICE.major && minor == DEVICE.minor;
  const bool newer = major > DEVICE.major || (major == DEVICE.major && minor > DEVICE.minor);
  return same || (newer && DEVICE.portable) ? CNNC_RT_OK : CNNC_RT_ERROR_GPU_ARCH;
}

static int load_kernels(const cnnc_rt_cuda *cuda) {
  for (int i = 0; i < DEVICE.module_count; i++) {
    CNNC_RT_TRY(cuda->module_load_data(&device.modules[i], DEVICE.modules[i]));
  }
  for (int i = 0; i < DEVICE.launch_count; i++) {
    const cnnc_rt_launch *launch = &DEVICE.launches[i];
    CNNC_RT_TRY(cuda->module_get_function(&device.functions[i], device.modules[launch->module], launch->function));
    if (launch->shared_bytes > SMALL_SHARED_BYTES) {
      const int bytes = (int)launch->shared_bytes;
      CNNC_RT_TRY(cuda->function_set_attribute(device.functions[i], CU_MAX_DYNAMIC_SHARED_BYTES, bytes));
    }
  }
  return CNNC_RT_OK;
}

static int upload_weights(const cnnc_rt_cuda *cuda) {
  if (MODEL.weight_bytes == 0) {
    return CNNC_RT_OK;
  }
  CNNC_RT_TRY(cuda->mem_alloc(&device.weights, MODEL.weight_bytes));
  CNNC_RT_TRY(cuda->copy_to_device(device.weights, MODEL.weights, MODEL.weight_bytes));
  return CNNC_RT_OK;
}

static int fill_device(const cnnc_rt_cuda *cuda) {
  device.modules = calloc((size_t)DEVICE.module_count + 1, sizeof *device.modules);
  device.functions = calloc((size_t)DEVICE.launch_count + 1, sizeof *device.functions);
  if (device.modules == NULL || device.functions == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  int code = load_kernels(cuda);
  return code == CNNC_RT_OK ? upload_weights(cuda) : code;
}

/* Frees what was made, as far as it was; in the child of a fork the driver is not there to ask. */
static void close_device(bool forked) {
  const cnnc_rt_cuda *cuda = device.cuda;
  cu_context none;
  if (!forked && cuda->context_push(device.context) == CU_SUCCESS) {
    for (int i = 0; device.modules != NULL && i < DEVICE.module_count; i++) {
      if (device.modules[i] != NULL) {
        cuda->module_unload(device.modules[i]);
      }
    }
    if (device.weights != 0) {
      cuda->mem_free(device.weights);
    }
    cuda->context_pop(&none);
  }
  if (!forked) {
    cuda->primary_context_release(device.number);
  }
  free(device.modules);
  free(device.functions);
  device.modules = NULL;
  device.functions = NULL;
  device.weights = 0;
}

static int open_device(void) {
  const cnnc_rt_cuda *cuda;
  cu_context none;
  int count = 0;
  int code = cnnc_rt_cuda_load(&cuda);
  if (code != CNNC_RT_OK) {
    return code;
  }
  CNNC_RT_TRY(cuda->init(0));
  CNNC_RT_TRY(cuda->device_get_count(&count));
  if (count == 0) {
    return CNNC_RT_ERROR_NO_GPU;
  }
  CNNC_RT_TRY(cuda->device_get(&device.number, 0));
  code = check_architecture(cuda, device.number);
  if (code != CNNC_RT_OK) {
    return code;
  }
  CNNC_RT_TRY(cuda->primary_context_retain(&device.context, device.number));
  device.cuda = cuda;
  opened_in = getpid();
  code = cnnc_rt_cuda_error(cuda->context_push(device.context));
  if (code == CNNC_RT_OK) {
    code = fill_device(cuda);
    cuda->context_pop(&none);
  }
  if (code != CNNC_RT_OK) {
    close_device(false);
  }
  return code;
}

int cnnc_rt_device_join(const cnnc_rt_shared **out) {
  int code = CNNC_RT_OK;
  pthread_mutex_lock(&lock);
  if (opened_in != 0 && opened_in != getpid()) {
    code = CNNC_RT_ERROR_FORKED;
  } else if (users == 0) {
    code = open_device();
  }
  users += code == CNNC_RT_OK;
  pthread_mutex_unlock(&lock);
  *out = &device;
  return code;
}

void cnnc_rt_device_leave(void) {
  pthread_mutex_lock(&lock);
  users--;
  if (users == 0) {
    close_device(opened_in != getpid());
  }
  pthread_mutex_unlock(&lock);
}
