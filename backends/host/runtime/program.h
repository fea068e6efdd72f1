/* The pieces of the command-line program: files, arrays, pictures.  Every reader takes hostile bytes.
 *
 * Functions that can fail print one line to stderr and return cnnc's exit code for it; 0 is success. */
#ifndef CNNC_RT_PROGRAM_H
#define CNNC_RT_PROGRAM_H

#include "cnnc_rt.h"

enum { EXIT_USAGE = 2, EXIT_INVALID = 3, EXIT_UNSUPPORTED = 4, EXIT_LIMIT = 5, EXIT_ENVIRONMENT = 6 };

#define CNNC_RT_MAX_FILE ((uint64_t)1 << 32)
#define CNNC_RT_MAX_PIXELS ((uint64_t)1 << 26)

typedef struct cnnc_rt_blob {
  unsigned char *data;
  size_t size;
} cnnc_rt_blob;

/* Three bytes a pixel, rows from the top. */
typedef struct cnnc_rt_picture {
  uint32_t width;
  uint32_t height;
  unsigned char *rgb;
} cnnc_rt_picture;

/* How a picture becomes an array: the short side is scaled to `resize` pixels (0: just enough), the middle is cut out,
 * and channel c becomes (value / 255 - mean[c]) / std[c]. */
typedef struct cnnc_rt_preprocess {
  uint32_t resize;
  float mean[3];
  float std[3];
} cnnc_rt_preprocess;

/* main.c */
int cnnc_rt_problem(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* npy.c: NumPy's format, versions 1 to 3, little-endian, C order; dtype and shape must be the tensor's. */
int cnnc_rt_npy_read(const char *path, const cnnc_rt_blob *file, const cnnc_rt_tensor *tensor, void *to);
/* Gives the first extent of the array in a file; false if it is no .npy, or has none. */
bool cnnc_rt_npy_leading(const cnnc_rt_blob *file, int64_t *extent);
int cnnc_rt_npy_write(const char *path, const cnnc_rt_tensor *tensor, const void *from);
void cnnc_rt_describe(const cnnc_rt_tensor *tensor, char *text, size_t size);

/* picture.c: PPM and PGM (binary), PNG, JPEG, told apart by their first bytes. */
int cnnc_rt_picture_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out);
int cnnc_rt_picture_fill(const char *path, const cnnc_rt_picture *picture, const cnnc_rt_tensor *tensor,
                         const cnnc_rt_preprocess *how, float *to);
int cnnc_rt_picture_alloc(const char *path, uint64_t width, uint64_t height, cnnc_rt_picture *out);

/* png.c, jpeg.c */
int cnnc_rt_png_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out);
int cnnc_rt_jpeg_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out);

#endif
