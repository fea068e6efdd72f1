/* CUDA's driver, found at run time: a binary for GPUs loads, and says what is missing, where there is none. */
#define _GNU_SOURCE
#include "cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

typedef struct entry {
  const char *symbol;
  size_t offset;
} entry;

static const entry entries[] = {
#define ENTRY(name, symbol, parameters) {symbol, offsetof(cnnc_rt_cuda, name)},
    CNNC_RT_CUDA_FUNCTIONS(ENTRY)
};

static const entry map_entries[] = {CNNC_RT_CUDA_MAP_FUNCTIONS(ENTRY)};
#undef ENTRY

#define COUNT(array) (sizeof array / sizeof array[0])

static cnnc_rt_cuda cuda;
static bool loaded;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find_all(void *library, const entry *wanted, size_t count) {
  for (size_t i = 0; i < count; i++) {
    void *function = dlsym(library, wanted[i].symbol);
    if (function == NULL) {
      return CNNC_RT_ERROR_DRIVER;
    }
    /* ISO C has no cast from an object's pointer to a function's. */
    memcpy((char *)&cuda + wanted[i].offset, &function, sizeof function);
  }
  return CNNC_RT_OK;
}

/* A library without one of the functions is a driver too old for graphs, or for tensor maps where there are any; it
 * stays loaded, as drivers cannot unload. */
static int load(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    return CNNC_RT_ERROR_DRIVER;
  }
  int code = find_all(library, entries, COUNT(entries));
  if (code == CNNC_RT_OK && cnnc_rt_the_device.map_count > 0) {
    code = find_all(library, map_entries, COUNT(map_entries));
  }
  loaded = code == CNNC_RT_OK;
  return code;
}

int cnnc_rt_cuda_load(const cnnc_rt_cuda **out) {
  pthread_mutex_lock(&lock);
  int code = loaded ? CNNC_RT_OK : load();
  pthread_mutex_unlock(&lock);
  *out = &cuda;
  return code;
}

/* Texts of the driver's errors, each made once and then never changed, as callers keep the pointers. */
enum { TEXTS = 16, TEXT_BYTES = 200 };
static char texts[TEXTS][TEXT_BYTES];
static int results[TEXTS];
static int text_count;

static void keep_text(int result) {
  const char *driver_text = NULL;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < text_count && results[i] != result) {
    i++;
  }
  if (i == text_count && i < TEXTS) {
    cuda.get_error_string(result, &driver_text);
    snprintf(texts[i], TEXT_BYTES, "the GPU or its driver failed: %s (CUDA error %d)",
             driver_text != NULL ? driver_text : "unknown error", result);
    results[i] = result;
    text_count++;
  }
  pthread_mutex_unlock(&lock);
  if (i < TEXTS) {
    atomic_store(&cnnc_rt_gpu_text, texts[i]);
  }
}

int cnnc_rt_cuda_error(int result) {
  switch (result) {
    case CU_SUCCESS:
      return CNNC_RT_OK;
    case CU_OUT_OF_MEMORY:
      return CNNC_RT_ERROR_GPU_MEMORY;
    case CU_STUB_LIBRARY:
    case CU_SYSTEM_DRIVER_MISMATCH:
      return CNNC_RT_ERROR_DRIVER;
    case CU_NO_DEVICE:
      return CNNC_RT_ERROR_NO_GPU;
    case CU_NO_BINARY_FOR_GPU:
      return CNNC_RT_ERROR_GPU_ARCH;
    default:
      keep_text(result);
      return CNNC_RT_ERROR_GPU;
  }
}
