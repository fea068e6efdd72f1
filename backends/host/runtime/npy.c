/* Read and write arrays in NumPy's .npy format. */
#define _GNU_SOURCE
#include "program.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_HEADER 65536

/* By the number of the dtype: our name, numpy's code. */
static const char *const dtype_names[][2] = {
    {"?", "?"},    {"f32", "<f4"}, {"f64", "<f8"},  {"f16", "<f2"}, {"bf16", "<V2"}, {"i8", "|i1"},  {"u8", "|u1"},
    {"i32", "<i4"}, {"i64", "<i8"}, {"bool", "|b1"}, {"i16", "<i2"}, {"u16", "<u2"},  {"u32", "<u4"}, {"u64", "<u8"},
};

void cnnc_rt_describe(const cnnc_rt_tensor *tensor, char *text, size_t size) {
  int used = snprintf(text, size, "%s[", dtype_names[tensor->dtype][0]);
  for (int32_t i = 0; i < tensor->rank && used > 0 && (size_t)used < size; i++) {
    used += snprintf(text + used, size - (size_t)used, "%s%" PRId64, i ? "," : "", tensor->dims[i]);
  }
  if (used > 0 && (size_t)used < size) {
    snprintf(text + used, size - (size_t)used, "]");
  }
}

/* Finds the value of a key in the header's Python dictionary, which numpy writes in one fixed form. */
static const char *value_of(const char *header, const char *key) {
  const char *at = strstr(header, key);
  if (at == NULL) {
    return NULL;
  }
  at += strlen(key);
  while (*at == ' ' || *at == ':') {
    at++;
  }
  return at;
}

static bool same_dtype(const char *at, int32_t dtype) {
  const char *wanted = dtype_names[dtype][1];
  if (at[0] != '\'' || strncmp(at + 2, wanted + 1, 2) != 0 || at[4] != '\'') {
    return false;
  }
  return at[1] == wanted[0] || at[1] == '|' || (at[1] == '=' && wanted[0] == '<') ||
         (at[1] == '<' && wanted[0] == '|');
}

static bool same_shape(const char *at, const cnnc_rt_tensor *tensor) {
  if (*at++ != '(') {
    return false;
  }
  for (int32_t i = 0; i < tensor->rank; i++) {
    char *end;
    errno = 0;
    if (*at < '0' || *at > '9') {
      return false;
    }
    long long extent = strtoll(at, &end, 10);
    if (errno != 0 || extent != tensor->dims[i]) {
      return false;
    }
    at = end;
    while (*at == ',' || *at == ' ') {
      at++;
    }
  }
  return *at == ')';
}

/* Copies the header into `header`, ended with NUL; returns where the data starts, 0 if the file is no .npy. */
static size_t read_header(const cnnc_rt_blob *file, char *header) {
  size_t start, length;
  if (file->size < 12 || memcmp(file->data, "\x93NUMPY", 6) != 0) {
    return 0;
  }
  const unsigned char *d = file->data;
  if (d[6] == 1) {
    start = 10;
    length = (size_t)d[8] | (size_t)d[9] << 8;
  } else if (d[6] == 2 || d[6] == 3) {
    start = 12;
    length = (size_t)d[8] | (size_t)d[9] << 8 | (size_t)d[10] << 16 | (size_t)d[11] << 24;
  } else {
    return 0;
  }
  if (length >= MAX_HEADER || length > file->size - start) {
    return 0;
  }
  memcpy(header, d + start, length);
  header[length] = 0;
  return start + length;
}

bool cnnc_rt_npy_leading(const cnnc_rt_blob *file, int64_t *extent) {
  static char header[MAX_HEADER];
  const char *shape = read_header(file, header) ? value_of(header, "'shape'") : NULL;
  if (shape == NULL || shape[0] != '(' || shape[1] < '0' || shape[1] > '9') {
    return false;
  }
  errno = 0;
  *extent = strtoll(shape + 1, NULL, 10);
  return errno == 0;
}

int cnnc_rt_npy_read(const char *path, const cnnc_rt_blob *file, const cnnc_rt_tensor *tensor, void *to) {
  static char header[MAX_HEADER];
  char wanted[256];
  cnnc_rt_describe(tensor, wanted, sizeof wanted);
  size_t start = read_header(file, header);
  const char *descr = start ? value_of(header, "'descr'") : NULL;
  const char *order = start ? value_of(header, "'fortran_order'") : NULL;
  const char *shape = start ? value_of(header, "'shape'") : NULL;
  if (descr == NULL || order == NULL || shape == NULL) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: not a .npy array of version 1 to 3, or cut", path);
  }
  if (strncmp(order, "False", 5) != 0) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: in Fortran order; save numpy.ascontiguousarray of it", path);
  }
  if (!same_dtype(descr, tensor->dtype) || !same_shape(shape, tensor)) {
    int descr_length = (int)strcspn(descr, ",}");
    int shape_length = (int)strcspn(shape, ")}") + 1;
    return cnnc_rt_problem(EXIT_INVALID, "%s: holds %.*s %.*s, the model takes %s", path,
                           descr_length < 32 ? descr_length : 32, descr, shape_length < 100 ? shape_length : 100,
                           shape, wanted);
  }
  if (file->size - start != tensor->bytes) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: %zu bytes of data, %s has %" PRIu64, path, file->size - start, wanted,
                           tensor->bytes);
  }
  memcpy(to, file->data + start, file->size - start);
  return 0;
}

static int header_text(const cnnc_rt_tensor *tensor, char *text, size_t size) {
  int used = snprintf(text, size, "{'descr': '%s', 'fortran_order': False, 'shape': (", dtype_names[tensor->dtype][1]);
  for (int32_t i = 0; i < tensor->rank; i++) {
    used += snprintf(text + used, size - (size_t)used, "%" PRId64 ",%s", tensor->dims[i], i + 1 < tensor->rank ? " " : "");
  }
  used += snprintf(text + used, size - (size_t)used, "), }");
  /* The data starts at a multiple of 64 bytes; the header ends with a line break. */
  while ((10 + used + 1) % 64 != 0) {
    text[used++] = ' ';
  }
  text[used++] = '\n';
  return used;
}

int cnnc_rt_npy_write(const char *path, const cnnc_rt_tensor *tensor, const void *from) {
  char text[1024];
  char temporary[4096];
  if (tensor->rank > 32) {
    return cnnc_rt_problem(EXIT_LIMIT, "%s: rank %d, at most 32 can be written", path, tensor->rank);
  }
  int length = header_text(tensor, text, sizeof text);
  const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)length, (unsigned char)(length >> 8)};
  if (snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid()) >= (int)sizeof temporary) {
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "%.80s...: the path is too long", path);
  }
  /* The path holds the old file or the whole new one. */
  FILE *file = fopen(temporary, "wbx");
  if (file == NULL) {
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "cannot write %s: %s", path, strerror(errno));
  }
  bool good = fwrite(start, 1, sizeof start, file) == sizeof start;
  good = good && fwrite(text, 1, (size_t)length, file) == (size_t)length;
  good = good && fwrite(from, 1, tensor->bytes, file) == tensor->bytes;
  good = good && fflush(file) == 0 && fsync(fileno(file)) == 0;
  good = fclose(file) == 0 && good;
  if (!good || rename(temporary, path) != 0) {
    int reason = errno;
    remove(temporary);
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "cannot write %s: %s", path, strerror(reason));
  }
  return 0;
}
