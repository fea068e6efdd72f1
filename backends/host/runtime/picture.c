/* Pictures: binary PPM and PGM, and how any picture becomes the model's input. */
#include "program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int cnnc_rt_picture_alloc(const char *path, uint64_t width, uint64_t height, cnnc_rt_picture *out) {
  if (width == 0 || height == 0) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: a picture without pixels", path);
  }
  if (width > CNNC_RT_MAX_PIXELS || height > CNNC_RT_MAX_PIXELS || width * height > CNNC_RT_MAX_PIXELS) {
    return cnnc_rt_problem(EXIT_LIMIT, "%s: more than %llu pixels", path, (unsigned long long)CNNC_RT_MAX_PIXELS);
  }
  out->width = (uint32_t)width;
  out->height = (uint32_t)height;
  out->rgb = malloc((size_t)(width * height * 3));
  return out->rgb != NULL ? 0 : cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
}

/* Reads one number of a PNM header, after white space and comments; -1 if there is none. */
static int64_t pnm_number(const cnnc_rt_blob *file, size_t *at) {
  const unsigned char *d = file->data;
  while (*at < file->size && (d[*at] == '#' || strchr(" \t\r\n", d[*at]) != NULL)) {
    if (d[*at] == 0) {
      return -1;
    }
    if (d[*at] == '#') {
      while (*at < file->size && d[*at] != '\n') {
        ++*at;
      }
    } else {
      ++*at;
    }
  }
  int64_t value = -1;
  for (; *at < file->size && d[*at] >= '0' && d[*at] <= '9'; ++*at) {
    value = (value < 0 ? 0 : value) * 10 + (d[*at] - '0');
    if (value > INT32_MAX) {
      return -1;
    }
  }
  return value;
}

static int pnm_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out) {
  size_t at = 2;
  size_t channels = file->data[1] == '6' ? 3 : 1;
  int64_t width = pnm_number(file, &at);
  int64_t height = pnm_number(file, &at);
  int64_t most = pnm_number(file, &at);
  if (width < 0 || height < 0 || most < 1 || most > 65535 || at >= file->size) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: the header of this PPM or PGM is wrong", path);
  }
  if (most > 255) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: PPM and PGM with more than 8 bits are not supported", path);
  }
  at++;
  int code = cnnc_rt_picture_alloc(path, (uint64_t)width, (uint64_t)height, out);
  if (code != 0) {
    return code;
  }
  size_t pixels = (size_t)width * (size_t)height;
  if (file->size - at < pixels * channels) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: the picture is cut", path);
  }
  for (size_t i = 0; i < pixels * 3; i++) {
    unsigned value = file->data[at + (channels == 3 ? i : i / 3)];
    unsigned scaled = (value * 255 + (unsigned)most / 2) / (unsigned)most;
    out->rgb[i] = (unsigned char)(scaled > 255 ? 255 : scaled);
  }
  return 0;
}

int cnnc_rt_picture_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out) {
  const unsigned char *d = file->data;
  if (file->size > 8 && memcmp(d, "\x89PNG\r\n\x1a\n", 8) == 0) {
    return cnnc_rt_png_read(path, file, out);
  }
  if (file->size > 3 && d[0] == 0xff && d[1] == 0xd8 && d[2] == 0xff) {
    return cnnc_rt_jpeg_read(path, file, out);
  }
  if (file->size > 3 && d[0] == 'P' && (d[1] == '5' || d[1] == '6')) {
    return pnm_read(path, file, out);
  }
  return cnnc_rt_problem(EXIT_INVALID, "%s: neither .npy nor a PNG, JPEG, PPM or PGM picture", path);
}

/* One axis of the scaling: a triangle filter, widened when the picture shrinks, so that every pixel counts (what PIL
 * calls bilinear with antialiasing).  Weight k of target t belongs to source first[t] + k. */
typedef struct axis {
  int64_t targets;
  int64_t width; /* weights of a target */
  int64_t *first;
  float *weights;
} axis;

static bool axis_init(axis *a, int64_t source, int64_t scaled, int64_t crop) {
  double scale = (double)source / (double)scaled;
  double support = scale > 1 ? scale : 1;
  double offset = (double)(scaled - crop) / 2;
  a->targets = crop;
  a->width = (int64_t)ceil(support) * 2 + 1;
  a->first = malloc((size_t)crop * sizeof *a->first);
  a->weights = calloc((size_t)crop * (size_t)a->width, sizeof *a->weights);
  if (a->first == NULL || a->weights == NULL) {
    return false;
  }
  for (int64_t t = 0; t < crop; t++) {
    double centre = ((double)t + floor(offset + 0.5) + 0.5) * scale;
    int64_t first = (int64_t)floor(centre - support);
    double sum = 0;
    first = first < 0 ? 0 : first;
    a->first[t] = first;
    float *weights = a->weights + t * a->width;
    for (int64_t k = 0; k < a->width && first + k < source; k++) {
      double distance = fabs(((double)(first + k) + 0.5 - centre) / support);
      weights[k] = distance < 1 ? (float)(1 - distance) : 0;
      sum += weights[k];
    }
    for (int64_t k = 0; k < a->width; k++) {
      weights[k] = (float)(weights[k] / sum);
    }
  }
  return true;
}

static void axis_free(axis *a) {
  free(a->first);
  free(a->weights);
}

/* Scales `count` rows from `start` on along x: `out` is count x targets x 3. */
static void scale_rows(const cnnc_rt_picture *picture, int64_t start, int64_t count, const axis *x, float *out) {
  for (int64_t row = 0; row < count; row++) {
    const unsigned char *line = picture->rgb + (start + row) * picture->width * 3;
    for (int64_t t = 0; t < x->targets; t++) {
      float sum[3] = {0, 0, 0};
      for (int64_t k = 0; k < x->width && x->first[t] + k < picture->width; k++) {
        float weight = x->weights[t * x->width + k];
        for (int c = 0; c < 3; c++) {
          sum[c] += weight * line[(x->first[t] + k) * 3 + c];
        }
      }
      memcpy(out + (row * x->targets + t) * 3, sum, sizeof sum);
    }
  }
}

/* Scales along y, normalises, and writes channel planes; one channel means grey (ITU-R 601 weights). */
static void fill_planes(const float *rows, int64_t start, int64_t count, const axis *x, const axis *y, int64_t channels,
                        const cnnc_rt_preprocess *how, float *to) {
  int64_t plane = y->targets * x->targets;
  for (int64_t i = 0; i < plane; i++) {
    int64_t t = i / x->targets;
    float sum[3] = {0, 0, 0};
    for (int64_t k = 0; k < y->width && y->first[t] + k < start + count; k++) {
      float weight = y->weights[t * y->width + k];
      const float *from = rows + ((y->first[t] + k - start) * x->targets + i % x->targets) * 3;
      for (int c = 0; c < 3; c++) {
        sum[c] += weight * from[c];
      }
    }
    if (channels == 1) {
      sum[0] = 0.299f * sum[0] + 0.587f * sum[1] + 0.114f * sum[2];
    }
    for (int64_t c = 0; c < channels; c++) {
      to[c * plane + i] = (sum[c] / 255 - how->mean[c]) / how->std[c];
    }
  }
}

int cnnc_rt_picture_fill(const char *path, const cnnc_rt_picture *picture, const cnnc_rt_tensor *tensor,
                         const cnnc_rt_preprocess *how, float *to) {
  char shape[256];
  const int64_t *d = tensor->dims;
  cnnc_rt_describe(tensor, shape, sizeof shape);
  if (tensor->dtype != 1 || tensor->rank != 4 || d[0] != 1 || (d[1] != 1 && d[1] != 3) || tensor->bytes == 0) {
    return cnnc_rt_problem(EXIT_USAGE, "%s: the model takes %s; a picture fits f32[1,3,H,W] or f32[1,1,H,W] only",
                           path, shape);
  }
  double height = picture->height;
  double width = picture->width;
  double scale = fmax((double)d[2] / height, (double)d[3] / width);
  if (how->resize != 0) {
    scale = (double)how->resize / fmin(height, width);
  }
  int64_t scaled_height = (int64_t)floor(height * scale + 0.5);
  int64_t scaled_width = (int64_t)floor(width * scale + 0.5);
  if (scaled_height < d[2] || scaled_width < d[3]) {
    return cnnc_rt_problem(EXIT_USAGE, "--resize %u is too small for %s", how->resize, shape);
  }
  axis x = {0, 0, NULL, NULL};
  axis y = {0, 0, NULL, NULL};
  float *rows = NULL;
  bool good = axis_init(&x, picture->width, scaled_width, d[3]) && axis_init(&y, picture->height, scaled_height, d[2]);
  if (good) {
    /* Only the rows that the cut needs: a picture may be very long. */
    int64_t start = y.first[0];
    int64_t end = y.first[y.targets - 1] + y.width;
    int64_t count = (end < picture->height ? end : picture->height) - start;
    rows = malloc((size_t)count * (size_t)d[3] * 3 * sizeof *rows);
    good = rows != NULL;
    if (good) {
      scale_rows(picture, start, count, &x, rows);
      fill_planes(rows, start, count, &x, &y, d[1], how, to);
    }
  }
  free(rows);
  axis_free(&x);
  axis_free(&y);
  return good ? 0 : cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
}
