/* What a caller can ask without a context: ports, kernels, error texts, the table for generic loaders. */
#include "cnnc_rt.h"

#define MODEL cnnc_rt_the_model

const cnnc_rt_variant *cnnc_rt_find(int batch) {
  for (int i = 0; i < MODEL.variant_count; i++) {
    if (MODEL.variants[i].batch == batch) {
      return &MODEL.variants[i];
    }
  }
  return NULL;
}

static const cnnc_rt_tensor *input(const cnnc_rt_variant *variant, int index) {
  return variant != NULL && index >= 0 && index < MODEL.input_count ? &variant->inputs[index] : NULL;
}

static const cnnc_rt_tensor *output(const cnnc_rt_variant *variant, int index) {
  return variant != NULL && index >= 0 && index < MODEL.output_count ? &variant->outputs[index] : NULL;
}

static const cnnc_rt_kernel *kernel(const cnnc_rt_variant *variant, int index) {
  return variant != NULL && index >= 0 && index < variant->kernel_count ? &variant->kernels[index] : NULL;
}

int cnnc_rt_input_count(void) { return MODEL.input_count; }

int cnnc_rt_output_count(void) { return MODEL.output_count; }

int cnnc_rt_kernel_count(void) { return MODEL.variants->kernel_count; }

const cnnc_rt_tensor *cnnc_rt_input(int index) { return input(MODEL.variants, index); }

const cnnc_rt_tensor *cnnc_rt_output(int index) { return output(MODEL.variants, index); }

const cnnc_rt_kernel *cnnc_rt_kernel_at(int index) { return kernel(MODEL.variants, index); }

int cnnc_rt_batch_count(void) { return MODEL.variant_count; }

int cnnc_rt_batch_at(int index) { return index >= 0 && index < MODEL.variant_count ? MODEL.variants[index].batch : 0; }

const cnnc_rt_tensor *cnnc_rt_batch_input(int batch, int index) { return input(cnnc_rt_find(batch), index); }

const cnnc_rt_tensor *cnnc_rt_batch_output(int batch, int index) { return output(cnnc_rt_find(batch), index); }

const cnnc_rt_kernel *cnnc_rt_batch_kernel(int batch, int index) { return kernel(cnnc_rt_find(batch), index); }

int cnnc_rt_batch_kernel_count(int batch) {
  const cnnc_rt_variant *variant = cnnc_rt_find(batch);
  return variant != NULL ? variant->kernel_count : 0;
}

const char *cnnc_rt_meta(void) { return MODEL.meta; }

int cnnc_rt_abi_version(void) { return CNNC_RT_ABI; }

_Atomic(const char *) cnnc_rt_gpu_text;

const char *cnnc_rt_error_text(int code) {
  switch (code) {
    case CNNC_RT_OK:
      return "no error";
    case CNNC_RT_ERROR_NULL:
      return "a pointer is null: the context, an array, or an input or output in it";
    case CNNC_RT_ERROR_THREADS:
      return "the number of threads must be 1 to 1024, or 0 for as many as this process may use";
    case CNNC_RT_ERROR_CONTEXT:
      return "not a live context: it was destroyed, or never created by this model";
    case CNNC_RT_ERROR_BUSY:
      return "the context is in use by another thread: give each thread a context of its own";
    case CNNC_RT_ERROR_OVERLAP:
      return "two outputs overlap in memory";
    case CNNC_RT_ERROR_BATCH:
      return "the model was not compiled for this batch size: batch_count and batch_at tell for which it was";
    case CNNC_RT_ERROR_VALUE:
      return "a value computed at run time is out of range (an index or a size): the outputs are not valid";
    case CNNC_RT_ERROR_TOO_MANY:
      return "1024 contexts are alive: destroy some";
    case CNNC_RT_ERROR_MEMORY:
      return "not enough memory";
    case CNNC_RT_ERROR_START_THREAD:
      return "a thread cannot be started: ask for fewer threads, or raise the limit on processes";
    case CNNC_RT_ERROR_DRIVER:
      return "no CUDA driver: libcuda.so.1 cannot be loaded, or is older than CUDA 11.4 (12.0 for sm_90a); "
             "install NVIDIA's driver";
    case CNNC_RT_ERROR_NO_GPU:
      return "no CUDA device: the driver is there but shows no GPU (is CUDA_VISIBLE_DEVICES set?)";
    case CNNC_RT_ERROR_GPU_MEMORY:
      return "not enough memory on the GPU";
    case CNNC_RT_ERROR_GPU: {
      const char *text = atomic_load(&cnnc_rt_gpu_text);
      return text != NULL ? text : "the GPU or its driver failed";
    }
    case CNNC_RT_ERROR_FORKED:
      return "the GPU cannot be used in a process forked after the first context was made: create contexts in the child";
    case CNNC_RT_ERROR_GPU_ARCH:
      return "the model was compiled for another GPU: see the target in its meta data, and compile it for this one";
    case CNNC_RT_ERROR_CPU: {
      const char *missing = cnnc_rt_missing_feature(MODEL.features, MODEL.feature_count);
      return missing != NULL ? missing : "this CPU lacks a feature that the model was compiled for";
    }
    case CNNC_RT_ERROR_KERNEL:
      return "a kernel failed: this is a bug of cnnc";
    default:
      return "unknown error code";
  }
}

const cnnc_rt_table cnnc_rt_the_table = {
    CNNC_RT_MAGIC,           CNNC_RT_ABI,     sizeof(cnnc_rt_table), &cnnc_rt_the_model, cnnc_rt_create,
    cnnc_rt_run_batch,       cnnc_rt_destroy, cnnc_rt_profile,       cnnc_rt_batch_kernel_ns,
    cnnc_rt_threads,         cnnc_rt_error_text,
};
