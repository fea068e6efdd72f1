/* PNG pictures (W3C PNG, RFC 1950, RFC 1951): all colour types and depths, not interlaced; transparency is ignored. */
#include "program.h"

#include <stdlib.h>
#include <string.h>

/* --- inflate, into a buffer of exactly the expected size ---------------------------------------------------------- */

typedef struct stream {
  const unsigned char *in;
  size_t in_size;
  size_t in_at;
  uint32_t bits;
  int bit_count;
  unsigned char *out;
  size_t out_size;
  size_t out_at;
  bool bad;
} stream;

#define MAX_CODE 15

/* A canonical Huffman code: how many codes of each length, and the symbols in order. */
typedef struct huffman {
  uint16_t count[MAX_CODE + 1];
  uint16_t symbol[288];
} huffman;

static uint32_t take(stream *s, int count) {
  while (s->bit_count < count) {
    if (s->in_at >= s->in_size) {
      s->bad = true;
      return 0;
    }
    s->bits |= (uint32_t)s->in[s->in_at++] << s->bit_count;
    s->bit_count += 8;
  }
  uint32_t value = s->bits & ((1u << count) - 1);
  s->bits >>= count;
  s->bit_count -= count;
  return value;
}

static void put(stream *s, unsigned char byte) {
  if (s->out_at >= s->out_size) {
    s->bad = true;
    return;
  }
  s->out[s->out_at++] = byte;
}

/* False if the lengths promise more codes than there are. */
static bool build(huffman *h, const unsigned char *lengths, int count) {
  uint16_t offsets[MAX_CODE + 1];
  int left = 1;
  memset(h->count, 0, sizeof h->count);
  for (int i = 0; i < count; i++) {
    h->count[lengths[i]]++;
  }
  h->count[0] = 0;
  offsets[1] = 0;
  for (int length = 1; length <= MAX_CODE; length++) {
    left = left * 2 - h->count[length];
    if (left < 0) {
      return false;
    }
    if (length < MAX_CODE) {
      offsets[length + 1] = (uint16_t)(offsets[length] + h->count[length]);
    }
  }
  for (int i = 0; i < count; i++) {
    if (lengths[i] != 0) {
      h->symbol[offsets[lengths[i]]++] = (uint16_t)i;
    }
  }
  return true;
}

static int decode(stream *s, const huffman *h) {
  int code = 0;
  int first = 0;
  int index = 0;
  for (int length = 1; length <= MAX_CODE; length++) {
    code |= (int)take(s, 1);
    if (s->bad) {
      return 0;
    }
    int count = h->count[length];
    if (code - first < count) {
      return h->symbol[index + code - first];
    }
    index += count;
    first = (first + count) * 2;
    code *= 2;
  }
  s->bad = true;
  return 0;
}

static const uint16_t length_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                         31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
static const unsigned char length_extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
static const uint16_t distance_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                           193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
static const unsigned char distance_extra[30] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                                 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};

static void copy_match(stream *s, const huffman *distances, int symbol) {
  symbol -= 257;
  if (symbol >= 29) {
    s->bad = true;
    return;
  }
  size_t length = length_base[symbol] + take(s, length_extra[symbol]);
  int code = decode(s, distances);
  if (s->bad || code >= 30) {
    s->bad = true;
    return;
  }
  size_t distance = distance_base[code] + take(s, distance_extra[code]);
  if (distance > s->out_at) {
    s->bad = true;
    return;
  }
  for (; length > 0 && !s->bad; length--) {
    put(s, s->out[s->out_at - distance]);
  }
}

static void inflate_codes(stream *s, const huffman *literals, const huffman *distances) {
  while (!s->bad) {
    int symbol = decode(s, literals);
    if (s->bad || symbol == 256) {
      return;
    }
    if (symbol < 256) {
      put(s, (unsigned char)symbol);
    } else {
      copy_match(s, distances, symbol);
    }
  }
}

static void inflate_stored(stream *s) {
  s->bits = 0;
  s->bit_count = 0;
  if (s->in_size - s->in_at < 4) {
    s->bad = true;
    return;
  }
  const unsigned char *d = s->in + s->in_at;
  size_t length = (size_t)d[0] | (size_t)d[1] << 8;
  s->in_at += 4;
  if ((d[0] ^ d[2]) != 0xff || (d[1] ^ d[3]) != 0xff || length > s->in_size - s->in_at ||
      length > s->out_size - s->out_at) {
    s->bad = true;
    return;
  }
  memcpy(s->out + s->out_at, s->in + s->in_at, length);
  s->in_at += length;
  s->out_at += length;
}

static void inflate_fixed(stream *s) {
  unsigned char lengths[288];
  huffman literals, distances;
  memset(lengths, 8, 144);
  memset(lengths + 144, 9, 112);
  memset(lengths + 256, 7, 24);
  memset(lengths + 280, 8, 8);
  build(&literals, lengths, 288);
  memset(lengths, 5, 30);
  build(&distances, lengths, 30);
  inflate_codes(s, &literals, &distances);
}

static bool read_lengths(stream *s, const huffman *code, unsigned char *lengths, int count) {
  int at = 0;
  while (at < count) {
    int symbol = decode(s, code);
    unsigned char value = 0;
    int repeat = 1;
    if (s->bad) {
      return false;
    }
    if (symbol < 16) {
      value = (unsigned char)symbol;
    } else if (symbol == 16) {
      if (at == 0) {
        return false;
      }
      value = lengths[at - 1];
      repeat = 3 + (int)take(s, 2);
    } else {
      repeat = symbol == 17 ? 3 + (int)take(s, 3) : 11 + (int)take(s, 7);
    }
    if (s->bad || at + repeat > count) {
      return false;
    }
    memset(lengths + at, value, (size_t)repeat);
    at += repeat;
  }
  return true;
}

static void inflate_dynamic(stream *s) {
  static const unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  unsigned char lengths[320];
  huffman code, literals, distances;
  int literal_count = (int)take(s, 5) + 257;
  int distance_count = (int)take(s, 5) + 1;
  int code_count = (int)take(s, 4) + 4;
  memset(lengths, 0, sizeof lengths);
  for (int i = 0; i < code_count; i++) {
    lengths[order[i]] = (unsigned char)take(s, 3);
  }
  if (s->bad || literal_count > 286 || distance_count > 30 || !build(&code, lengths, 19)) {
    s->bad = true;
    return;
  }
  memset(lengths, 0, sizeof lengths);
  if (!read_lengths(s, &code, lengths, literal_count + distance_count) || !build(&literals, lengths, literal_count) ||
      !build(&distances, lengths + literal_count, distance_count)) {
    s->bad = true;
    return;
  }
  inflate_codes(s, &literals, &distances);
}

static uint32_t adler(const unsigned char *data, size_t size) {
  uint32_t a = 1;
  uint32_t b = 0;
  for (size_t i = 0; i < size; i++) {
    a = (a + data[i]) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

static uint32_t big_endian(const unsigned char *d) {
  return (uint32_t)d[0] << 24 | (uint32_t)d[1] << 16 | (uint32_t)d[2] << 8 | d[3];
}

/* True if the zlib stream gives exactly out_size bytes. */
static bool inflate(const unsigned char *in, size_t in_size, unsigned char *out, size_t out_size) {
  stream s = {in, in_size, 2, 0, 0, out, out_size, 0, false};
  bool last = false;
  if (in_size < 6 || (in[0] & 15) != 8 || (in[0] * 256 + in[1]) % 31 != 0 || (in[1] & 32)) {
    return false;
  }
  while (!last && !s.bad) {
    last = take(&s, 1) == 1;
    switch (take(&s, 2)) {
      case 0:
        inflate_stored(&s);
        break;
      case 1:
        inflate_fixed(&s);
        break;
      case 2:
        inflate_dynamic(&s);
        break;
      default:
        s.bad = true;
    }
  }
  return !s.bad && s.out_at == out_size && in_size - s.in_at >= 4 && big_endian(in + s.in_at) == adler(out, out_size);
}

/* --- PNG ---------------------------------------------------------------------------------------------------------- */

typedef struct png {
  uint32_t width;
  uint32_t height;
  int depth;
  int colour;
  int channels;
  const unsigned char *palette;
  size_t palette_size;
  unsigned char *packed; /* all IDAT chunks, one after the other */
  size_t packed_size;
} png;

static uint32_t crc(const unsigned char *data, size_t size) {
  uint32_t value = 0xffffffff;
  for (size_t i = 0; i < size; i++) {
    value ^= data[i];
    for (int bit = 0; bit < 8; bit++) {
      value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
    }
  }
  return ~value;
}

static int read_size(const char *path, const unsigned char *d, png *p) {
  static const int channels[7] = {1, 0, 3, 1, 2, 0, 4};
  p->width = big_endian(d);
  p->height = big_endian(d + 4);
  p->depth = d[8];
  p->colour = d[9];
  p->channels = p->colour < 7 ? channels[p->colour] : 0;
  bool small = p->depth == 1 || p->depth == 2 || p->depth == 4;
  bool fits = p->depth == 8 || (p->depth == 16 && p->colour != 3) || (small && (p->colour == 0 || p->colour == 3));
  if (p->channels == 0 || !fits || d[10] != 0 || d[11] != 0 || d[12] > 1) {
    return cnnc_rt_problem(EXIT_INVALID, "%s: the header of this PNG is wrong", path);
  }
  if (d[12] == 1) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "%s: interlaced PNG is not supported; save it without interlacing", path);
  }
  return 0;
}

/* Walks over the chunks; `packed` has room for the whole file. */
static int read_chunks(const char *path, const cnnc_rt_blob *file, png *p) {
  size_t at = 8;
  bool first = true;
  while (file->size - at >= 12) {
    const unsigned char *chunk = file->data + at;
    size_t length = big_endian(chunk);
    if (length > file->size - at - 12) {
      break;
    }
    if (big_endian(chunk + 8 + length) != crc(chunk + 4, length + 4)) {
      return cnnc_rt_problem(EXIT_INVALID, "%s: this PNG is damaged (checksum of a chunk)", path);
    }
    if (first != (memcmp(chunk + 4, "IHDR", 4) == 0 && length == 13)) {
      break;
    }
    if (first) {
      int code = read_size(path, chunk + 8, p);
      if (code != 0) {
        return code;
      }
    } else if (memcmp(chunk + 4, "PLTE", 4) == 0) {
      p->palette = chunk + 8;
      p->palette_size = length / 3;
    } else if (memcmp(chunk + 4, "IDAT", 4) == 0) {
      memcpy(p->packed + p->packed_size, chunk + 8, length);
      p->packed_size += length;
    } else if (memcmp(chunk + 4, "IEND", 4) == 0) {
      return 0;
    }
    first = false;
    at += length + 12;
  }
  return cnnc_rt_problem(EXIT_INVALID, "%s: this PNG is cut or damaged", path);
}

static int paeth(int a, int b, int c) {
  int pa = abs(b - c);
  int pb = abs(a - c);
  int pc = abs(a + b - 2 * c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

/* Undoes the filter of each row in place; a row is one filter byte and `stride` bytes. */
static bool unfilter(unsigned char *data, size_t stride, size_t rows, size_t step) {
  for (size_t row = 0; row < rows; row++) {
    unsigned char *line = data + row * (stride + 1) + 1;
    const unsigned char *above = row ? line - (stride + 1) : NULL;
    int filter = line[-1];
    if (filter > 4) {
      return false;
    }
    for (size_t i = 0; i < stride; i++) {
      int a = i >= step ? line[i - step] : 0;
      int b = above ? above[i] : 0;
      int c = above && i >= step ? above[i - step] : 0;
      int add = filter == 1 ? a : filter == 2 ? b : filter == 3 ? (a + b) / 2 : filter == 4 ? paeth(a, b, c) : 0;
      line[i] = (unsigned char)(line[i] + add);
    }
  }
  return true;
}

/* The value of a sample; depths below 8 are spread over the whole range, except in a palette. */
static unsigned sample(const png *p, const unsigned char *line, size_t index) {
  if (p->depth == 8) {
    return line[index];
  }
  if (p->depth == 16) {
    return line[index * 2];
  }
  size_t bit = index * (size_t)p->depth;
  unsigned most = (1u << p->depth) - 1;
  unsigned value = line[bit / 8] >> (8 - (unsigned)p->depth - bit % 8) & most;
  return p->colour == 3 ? value : value * 255 / most;
}

static bool convert(const png *p, const unsigned char *data, size_t stride, cnnc_rt_picture *out) {
  for (size_t y = 0; y < p->height; y++) {
    const unsigned char *line = data + y * (stride + 1) + 1;
    for (size_t x = 0; x < p->width; x++) {
      unsigned char *rgb = out->rgb + (y * p->width + x) * 3;
      size_t at = x * (size_t)p->channels;
      if (p->colour == 3) {
        unsigned index = sample(p, line, at);
        if (index >= p->palette_size) {
          return false;
        }
        memcpy(rgb, p->palette + (size_t)index * 3, 3);
        continue;
      }
      for (size_t c = 0; c < 3; c++) {
        rgb[c] = (unsigned char)sample(p, line, at + (p->channels >= 3 ? c : 0));
      }
    }
  }
  return true;
}

static int unpack(const char *path, const png *p, cnnc_rt_picture *out) {
  int code = cnnc_rt_picture_alloc(path, p->width, p->height, out);
  if (code != 0) {
    return code;
  }
  size_t bits = (size_t)p->channels * (size_t)p->depth;
  size_t stride = (p->width * bits + 7) / 8;
  size_t size = (stride + 1) * p->height;
  unsigned char *data = malloc(size);
  if (data == NULL) {
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
  }
  bool good = inflate(p->packed, p->packed_size, data, size);
  good = good && unfilter(data, stride, p->height, bits < 8 ? 1 : bits / 8) && convert(p, data, stride, out);
  free(data);
  return good ? 0 : cnnc_rt_problem(EXIT_INVALID, "%s: the pixels of this PNG are cut or damaged", path);
}

int cnnc_rt_png_read(const char *path, const cnnc_rt_blob *file, cnnc_rt_picture *out) {
  png p;
  memset(&p, 0, sizeof p);
  p.packed = malloc(file->size);
  if (p.packed == NULL) {
    return cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
  }
  int code = read_chunks(path, file, &p);
  if (code == 0) {
    code = unpack(path, &p, out);
  }
  free(p.packed);
  return code;
}
