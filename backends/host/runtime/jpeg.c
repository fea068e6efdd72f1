/* JPEG pictures (ITU-T T.81, JFIF): baseline, extended sequential and progressive Huffman coding, 8 bits, grey or colour. */
#include "program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SCANS 200

typedef struct huffman {
  bool defined;
  uint8_t count[17];
  uint8_t symbol[256];
} huffman;

typedef struct component {
  uint8_t id;
  uint8_t quantizer;
  int h; /* samples a unit, along x and y */
  int v;
  int64_t blocks_x; /* blocks that are stored: whole units */
  int64_t blocks_y;
  int64_t own_x; /* blocks a scan of this component alone has */
  int64_t own_y;
  int16_t *coefficients; /* 64 a block, row-major */
  unsigned char *plane;  /* 8 * blocks_x wide */
  const huffman *dc;
  const huffman *ac;
  int dc_value;
} component;

typedef struct jpeg {
  const unsigned char *data;
  size_t size;
  size_t at;
  uint32_t width;
  uint32_t height;
  bool progressive;
  bool rgb; /* stored as RGB, as Adobe's marker says */
  int components;
  component component[3];
  int h_most;
  int v_most;
  uint16_t quantizer[4][64];
  bool quantizer_defined[4];
  huffman dc[4];
  huffman ac[4];
  int restart_interval;
  int scans;
  /* the scan being read */
  int first; /* coefficients of the scan */
  int last;
  int high; /* bits that were sent before, and that are sent after this scan */
  int low;
  int end_run;
  uint32_t bits;
  int bit_count;
  bool bad;
} jpeg;

static const uint8_t zigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                   41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                   30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

/* --- bits and codes ----------------------------------------------------------------------------------------------- */

static int take_bit(jpeg *j) {
  if (j->bit_count == 0) {
    if (j->at >= j->size) {
      j->bad = true;
      return 0;
    }
    j->bits = j->data[j->at];
    if (j->bits == 0xff) {
      /* A data byte 0xff is followed by 0; anything else is a marker, where the data ends. */
      if (j->at + 1 >= j->size || j->data[j->at + 1] != 0) {
        j->bad = true;
        return 0;
      }
      j->at++;
    }
    j->at++;
    j->bit_count = 8;
  }
  j->bit_count--;
  return (int)(j->bits >> j->bit_count & 1);
}

static int take_bits(jpeg *j, int count) {
  int value = 0;
  for (int i = 0; i < count; i++) {
    value = value * 2 + take_bit(j);
  }
  return value;
}

/* A number of `count` bits in the form of T.81 F.2.2.1: the upper half is positive, the lower negative. */
static int take_signed(jpeg *j, int count) {
  if (count == 0) {
    return 0;
  }
  int value = take_bits(j, count);
  return value >= 1 << (count - 1) ? value : value - (1 << count) + 1;
}

static int decode(jpeg *j, const huffman *h) {
  int code = 0;
  int first = 0;
  int index = 0;
  for (int length = 1; length <= 16; length++) {
    code = code * 2 + take_bit(j);
    if (j->bad) {
      return 0;
    }
    if (code - first < h->count[length]) {
      return h->symbol[index + code - first];
    }
    index += h->count[length];
    first = (first + h->count[length]) * 2;
  }
  j->bad = true;
  return 0;
}

static int16_t clamp16(int value) { return (int16_t)(value > 32767 ? 32767 : value < -32768 ? -32768 : value); }

/* --- one block ---------------------------------------------------------------------------------------------------- */

static void decode_dc(jpeg *j, component *c, int16_t *block) {
  int size = decode(j, c->dc);
  if (size > 15) {
    j->bad = true;
    return;
  }
  c->dc_value = clamp16(c->dc_value + take_signed(j, size));
  block[0] = clamp16(c->dc_value * (1 << j->low));
}

static void decode_ac(jpeg *j, const component *c, int16_t *block) {
  int k = j->first == 0 ? 1 : j->first;
  if (j->end_run > 0) {
    j->end_run--;
    return;
  }
  while (k <= j->last && !j->bad) {
    int code = decode(j, c->ac);
    int run = code >> 4;
    int size = code & 15;
    if (size == 0) {
      if (run < 15) {
        j->end_run = (1 << run) - 1 + take_bits(j, run);
        return;
      }
      k += 16;
      continue;
    }
    k += run;
    if (k > j->last) {
      j->bad = true;
      return;
    }
    block[zigzag[k++]] = clamp16(take_signed(j, size) * (1 << j->low));
  }
}

/* One more bit for a coefficient that is not zero yet known. */
static void refine(jpeg *j, int16_t *value) {
  int bit = 1 << j->low;
  if (take_bit(j) && (*value & bit) == 0) {
    *value = clamp16(*value > 0 ? *value + bit : *value - bit);
  }
}

static void refine_ac(jpeg *j, const component *c, int16_t *block) {
  int k = j->first;
  while (j->end_run == 0 && k <= j->last && !j->bad) {
    int code = decode(j, c->ac);
    int run = code >> 4;
    int value = 0;
    if ((code & 15) == 1) {
      value = take_bit(j) ? 1 << j->low : -(1 << j->low);
    } else if ((code & 15) != 0) {
      j->bad = true;
    } else if (run < 15) {
      j->end_run = (1 << run) + take_bits(j, run);
      break;
    }
    for (; k <= j->last && !j->bad; k++) {
      int16_t *at = &block[zigzag[k]];
      if (*at != 0) {
        refine(j, at);
      } else if (run-- == 0) {
        *at = (int16_t)value;
        k++;
        break;
      }
    }
  }
  if (j->end_run > 0) {
    for (; k <= j->last && !j->bad; k++) {
      if (block[zigzag[k]] != 0) {
        refine(j, &block[zigzag[k]]);
      }
    }
    j->end_run--;
  }
}

static void decode_block(jpeg *j, component *c, int16_t *block) {
  if (!j->progressive) {
    decode_dc(j, c, block);
    decode_ac(j, c, block);
    j->end_run = 0;
  } else if (j->first == 0 && j->high == 0) {
    decode_dc(j, c, block);
  } else if (j->first == 0) {
    block[0] = (int16_t)(block[0] | take_bit(j) * (1 << j->low));
  } else if (j->high == 0) {
    decode_ac(j, c, block);
  } else {
    refine_ac(j, c, block);
  }
}

/* --- one scan ----------------------------------------------------------------------------------------------------- */

static void restart(jpeg *j) {
  j->bit_count = 0;
  j->end_run = 0;
  for (int i = 0; i < j->components; i++) {
    j->component[i].dc_value = 0;
  }
}

static void expect_restart(jpeg *j) {
  if (j->size - j->at < 2 || j->data[j->at] != 0xff || (j->data[j->at + 1] & 0xf8) != 0xd0) {
    j->bad = true;
    return;
  }
  j->at += 2;
  restart(j);
}

static void decode_unit(jpeg *j, component *c, int64_t unit, int64_t units_x) {
  for (int i = 0; i < c->h * c->v; i++) {
    int64_t x = unit % units_x * c->h + i % c->h;
    int64_t y = unit / units_x * c->v + i / c->h;
    decode_block(j, c, c->coefficients + (y * c->blocks_x + x) * 64);
  }
}

static void decode_scan(jpeg *j, component *const *parts, int count) {
  int64_t units_x = (j->width + 8 * j->h_most - 1) / (8 * j->h_most);
  int64_t units = count == 1 ? parts[0]->own_x * parts[0]->own_y : parts[0]->blocks_y / parts[0]->v * units_x;
  restart(j);
  for (int64_t unit = 0; unit < units && !j->bad; unit++) {
    if (unit > 0 && j->restart_interval > 0 && unit % j->restart_interval == 0) {
      expect_restart(j);
    }
    if (count == 1) {
      int64_t at = unit / parts[0]->own_x * parts[0]->blocks_x + unit % parts[0]->own_x;
      decode_block(j, parts[0], parts[0]->coefficients + at * 64);
      continue;
    }
    for (int i = 0; i < count; i++) {
      decode_unit(j, parts[i], unit, units_x);
    }
  }
  j->bit_count = 0;
}

/* --- segments: `d` holds `size` bytes after the length; false if they make no sense ------------------------------- */

static bool read_huffman(jpeg *j, const unsigned char *d, size_t size) {
  while (size >= 17) {
    int class = d[0] >> 4;
    int index = d[0] & 15;
    size_t total = 0;
    int left = 1;
    if (class > 1 || index > 3) {
      return false;
    }
    huffman *h = class ? &j->ac[index] : &j->dc[index];
    for (int length = 1; length <= 16; length++) {
      h->count[length] = d[length];
      total += d[length];
      left = left * 2 - d[length];
      if (left < 0) {
        return false;
      }
    }
    if (total > 256 || total > size - 17) {
      return false;
    }
    memset(h->symbol, 0, sizeof h->symbol);
    memcpy(h->symbol, d + 17, total);
    h->defined = true;
    d += 17 + total;
    size -= 17 + total;
  }
  return size == 0;
}

static bool read_quantizers(jpeg *j, const unsigned char *d, size_t size) {
  while (size > 0) {
    size_t wide = d[0] >> 4;
    int index = d[0] & 15;
    if (wide > 1 || index > 3 || size < 1 + 64 * (wide + 1)) {
      return false;
    }
    for (size_t i = 0; i < 64; i++) {
      j->quantizer[index][zigzag[i]] = wide ? (uint16_t)(d[1 + 2 * i] * 256 + d[2 + 2 * i]) : d[1 + i];
    }
    j->quantizer_defined[index] = true;
    d += 1 + 64 * (wide + 1);
    size -= 1 + 64 * (wide + 1);
  }
  return true;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int allocate(const char *path, jpeg *j, cnnc_rt_picture *out) {
  int code = cnnc_rt_picture_alloc(path, j->width, j->height, out);
  for (int i = 0; i < j->components && code == 0; i++) {
    component *c = &j->component[i];
    c->blocks_x = ceil_div(j->width, 8 * j->h_most) * c->h;
    c->blocks_y = ceil_div(j->height, 8 * j->v_most) * c->v;
    c->own_x = ceil_div(ceil_div((int64_t)j->width * c->h, j->h_most), 8);
    c->own_y = ceil_div(ceil_div((int64_t)j->height * c->v, j->v_most), 8);
    c->coefficients = calloc((size_t)(c->blocks_x * c->blocks_y), 64 * sizeof *c->coefficients);
    c->plane = malloc((size_t)(c->blocks_x * c->blocks_y) * 64);
    if (c->coefficients == NULL || c->plane == NULL) {
      code = cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
    }
  }
  return code;
}

static int read_frame(const char *path, jpeg *j, const unsigned char *d, size_t size, cnnc_rt_picture *out) {
  bool good = j->components == 0 && size >= 6 && size == 6 + 3 * (size_t)d[5] && d[0] == 8;
  if (size >= 6 && d[0] != 8) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: JPEG with %d bits is not supported", path, d[0]);
  }
  if (good && d[5] != 1 && d[5] != 3) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: JPEG with %d colours (CMYK?) is not supported", path, d[5]);
  }
  if (!good) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: the header of this JPEG is wrong", path);
  }
  j->height = (uint32_t)(d[1] * 256 + d[2]);
  j->width = (uint32_t)(d[3] * 256 + d[4]);
  j->components = d[5];
  for (int i = 0; i < j->components; i++) {
    component *c = &j->component[i];
    c->id = d[6 + 3 * i];
    c->h = d[7 + 3 * i] >> 4;
    c->v = d[7 + 3 * i] & 15;
    c->quantizer = d[8 + 3 * i];
    if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4 || c->quantizer > 3) {
      return cnnc_rt_problem(EXIT_INVALID, "%s: the header of this JPEG is wrong", path);
    }
    if (j->components == 1) {
      /* With one component, the unit is one block, whatever the factors say. */
      c->h = 1;
      c->v = 1;
    }
    j->h_most = c->h > j->h_most ? c->h : j->h_most;
    j->v_most = c->v > j->v_most ? c->v : j->v_most;
  }
  return allocate(path, j, out);
}

static bool read_scan(jpeg *j, const unsigned char *d, size_t size) {
  component *parts[3];
  if (j->components == 0 || size < 1 || d[0] < 1 || d[0] > j->components || size != 4 + 2 * (size_t)d[0]) {
    return false;
  }
  int count = d[0];
  const unsigned char *tail = d + 1 + 2 * count;
  j->first = j->progressive ? tail[0] : 0;
  j->last = j->progressive ? tail[1] : 63;
  j->high = j->progressive ? tail[2] >> 4 : 0;
  j->low = j->progressive ? tail[2] & 15 : 0;
  bool range = j->first == 0 ? !j->progressive || j->last == 0 : count == 1 && j->first <= j->last && j->last <= 63;
  if (!range || j->low > 13 || (j->high != 0 && j->high != j->low + 1)) {
    return false;
  }
  bool needs_dc = j->first == 0 && j->high == 0;
  bool needs_ac = !j->progressive || j->first > 0;
  for (int i = 0; i < count; i++) {
    parts[i] = NULL;
    for (int k = 0; k < j->components; k++) {
      if (j->component[k].id == d[1 + 2 * i]) {
        parts[i] = &j->component[k];
      }
    }
    int dc = d[2 + 2 * i] >> 4;
    int ac = d[2 + 2 * i] & 15;
    if (parts[i] == NULL || dc > 3 || ac > 3 || (needs_dc && !j->dc[dc].defined) || (needs_ac && !j->ac[ac].defined)) {
      return false;
    }
    parts[i]->dc = &j->dc[dc];
    parts[i]->ac = &j->ac[ac];
    for (int k = 0; k < i; k++) {
      if (parts[k] == parts[i]) {
        return false;
      }
    }
  }
  j->scans++;
  decode_scan(j, parts, count);
  return !j->bad;
}

/* --- pixels ------------------------------------------------------------------------------------------------------- */

static unsigned char clamp8(float value) {
  return (unsigned char)(value < 0.5f ? 0 : value > 254.5f ? 255 : (int)(value + 0.5f));
}

/* The inverse cosine transform of T.81 A.3.3, rows then columns. */
static void transform(const int16_t *block, const uint16_t *quantizer, float (*cosines)[8], unsigned char *to,
                      int64_t stride) {
  float half[8][8];
  for (int v = 0; v < 8; v++) {
    for (int x = 0; x < 8; x++) {
      float sum = 0;
      for (int u = 0; u < 8; u++) {
        sum += (float)block[v * 8 + u] * (float)quantizer[v * 8 + u] * cosines[x][u];
      }
      half[v][x] = sum;
    }
  }
  for (int y = 0; y < 8; y++) {
    for (int x = 0; x < 8; x++) {
      float sum = 0;
      for (int v = 0; v < 8; v++) {
        sum += half[v][x] * cosines[y][v];
      }
      to[y * stride + x] = clamp8(sum + 128);
    }
  }
}

static bool transform_all(jpeg *j) {
  float cosines[8][8];
  for (int x = 0; x < 8; x++) {
    for (int u = 0; u < 8; u++) {
      cosines[x][u] = (float)(cos((2 * x + 1) * u * 3.14159265358979323846 / 16) * (u ? 0.5 : sqrt(0.125)));
    }
  }
  for (int i = 0; i < j->components; i++) {
    component *c = &j->component[i];
    if (!j->quantizer_defined[c->quantizer]) {
      return false;
    }
    for (int64_t b = 0; b < c->blocks_x * c->blocks_y; b++) {
      unsigned char *to = c->plane + (b / c->blocks_x * c->blocks_x * 64) + b % c->blocks_x * 8;
      transform(c->coefficients + b * 64, j->quantizer[c->quantizer], cosines, to, c->blocks_x * 8);
    }
  }
  return true;
}

/* The value of a plane at a pixel of the picture, linear between the centres of its samples. */
static float plane_at(const jpeg *j, const component *c, int64_t x, int64_t y) {
  int64_t stride = c->blocks_x * 8;
  if (c->h == j->h_most && c->v == j->v_most) {
    return c->plane[y * stride + x];
  }
  int64_t right = ceil_div((int64_t)j->width * c->h, j->h_most) - 1;
  int64_t bottom = ceil_div((int64_t)j->height * c->v, j->v_most) - 1;
  float at_x = ((float)x + 0.5f) * (float)c->h / (float)j->h_most - 0.5f;
  float at_y = ((float)y + 0.5f) * (float)c->v / (float)j->v_most - 0.5f;
  at_x = at_x < 0 ? 0 : at_x;
  at_y = at_y < 0 ? 0 : at_y;
  int64_t x0 = (int64_t)at_x < right ? (int64_t)at_x : right;
  int64_t y0 = (int64_t)at_y < bottom ? (int64_t)at_y : bottom;
  int64_t x1 = x0 < right ? x0 + 1 : right;
  int64_t y1 = y0 < bottom ? y0 + 1 : bottom;
  float fx = at_x - (float)x0;
  float fy = at_y - (float)y0;
  const unsigned char *p = c->plane;
  float above = (float)p[y0 * stride + x0] * (1 - fx) + (float)p[y0 * stride + x1] * fx;
  float below = (float)p[y1 * stride + x0] * (1 - fx) + (float)p[y1 * stride + x1] * fx;
  return above * (1 - fy) + below * fy;
}

static void convert(const jpeg *j, cnnc_rt_picture *out) {
  for (int64_t y = 0; y < j->height; y++) {
    for (int64_t x = 0; x < j->width; x++) {
      unsigned char *rgb = out->rgb + (y * j->width + x) * 3;
      float a = plane_at(j, &j->component[0], x, y);
      if (j->components == 1) {
        memset(rgb, clamp8(a), 3);
        continue;
      }
      float b = plane_at(j, &j->component[1], x, y);
      float c = plane_at(j, &j->component[2], x, y);
      if (j->rgb) {
        rgb[0] = clamp8(a);
        rgb[1] = clamp8(b);
        rgb[2] = clamp8(c);
        continue;
      }
      rgb[0] = clamp8(a + 1.402f * (c - 128));
      rgb[1] = clamp8(a - 0.344136f * (b - 128) - 0.714136f * (c - 128));
      rgb[2] = clamp8(a + 1.772f * (b - 128));
    }
  }
}

/* --- the file ----------------------------------------------------------------------------------------------------- */

static int read_segment(const char *path, jpeg *j, int marker, const unsigned char *d, size_t size,
                        cnnc_rt_picture *out) {
  bool good = true;
  if (marker == 0xc4) {
    good = read_huffman(j, d, size);
  } else if (marker == 0xdb) {
    good = read_quantizers(j, d, size);
  } else if (marker == 0xdd) {
    good = size == 2;
    j->restart_interval = good ? d[0] * 256 + d[1] : 0;
  } else if (marker == 0xee && size >= 12 && memcmp(d, "Adobe", 5) == 0) {
    j->rgb = d[11] == 0;
  } else if (marker >= 0xc0 && marker <= 0xc2) {
    j->progressive = marker == 0xc2;
    return read_frame(path, j, d, size, out);
  } else if (marker >= 0xc3 && marker <= 0xcf && marker != 0xc8) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: this kind of JPEG (lossless, arithmetic or hierarchical) is not supported",
                           path);
  } else if (marker == 0xda && j->scans >= MAX_SCANS) {
    return cnnc_rt_problem(EXIT_LIMIT, "%s: JPEG with more than %d scans", path, MAX_SCANS);
  } else if (marker == 0xda) {
    good = read_scan(j, d, size);
  }
  return good ? 0 : cnnc_rt_problem(EXIT_INVALID, "%s: this JPEG is cut or damaged", path);
}

static int read_all(const char *path, jpeg *j, cnnc_rt_picture *out) {
  j->at = 2;
  while (j->size - j->at >= 4 && j->data[j->at] == 0xff) {
    int marker = j->data[j->at + 1];
    if (marker == 0xff) {
      j->at++;
      continue;
    }
    if (marker == 0xd9) {
      break;
    }
    size_t length = (size_t)j->data[j->at + 2] << 8 | j->data[j->at + 3];
    if (length < 2 || length > j->size - j->at - 2) {
      return cnnc_rt_problem(EXIT_INVALID, "%s: this JPEG is cut or damaged", path);
    }
    const unsigned char *segment = j->data + j->at + 4;
    j->at += 2 + length;
    int code = read_segment(path, j, marker, segment, length - 2, out);
    if (code != 0) {
      return code;
    }
  }
  bool ended = j->size - j->at >= 2 && j->data[j->at] == 0xff && j->data[j->at + 1] == 0xd9;
  if (!ended || j->scans == 0 || !transform_all(j)) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: this JPEG is cut or damaged", path);
  }
  convert(j, out);
  return 0;
}

int cnnc_rt_jpeg_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out) {
  jpeg *j = calloc(1, sizeof *j);
  if (j == NULL) {
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
  }
  j->data = file->data;
  j->size = file->size;
  int code = read_all(path, j, out);
  for (int i = 0; i < 3; i++) {
    free(j->component[i].coefficients);
    free(j->component[i].plane);
  }
  free(j);
  return code;
}
