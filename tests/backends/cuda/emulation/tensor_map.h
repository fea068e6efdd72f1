/* Tensor maps as the emulation has them, and what the driver checks when it makes one, by the CUDA Driver API reference
 * ("Tensor Map Object Management").  In C too, for the stand-in for libcuda. */
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MAP_BYTES = 128, MAP_ALIGNMENT = 64, MOST_RANK = 5 };
#define MAP_MAGIC UINT64_C(0x70614d726f736e54)

/* Axes from the innermost; what is opaque in the real one. */
typedef struct tensor_map {
  uint64_t magic, address, strides[MOST_RANK - 1];
  uint32_t last[MOST_RANK]; /* element of each axis */
  uint16_t box[MOST_RANK];
  int16_t lower[3], upper[3]; /* of W, H, D */
  uint16_t channels, pixels;  /* 0 in tiled maps */
  uint8_t steps[MOST_RANK];
  uint8_t rank, element_bytes, swizzle_bytes;
} tensor_map;

/* The bytes of the elements by CUtensorMapDataType, whether they are floats, and CUtensorMapSwizzle's. */
static const uint8_t map_element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
static const uint8_t map_element_is_float[] = {0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1};
static const uint8_t map_swizzle_bytes[] = {0, 32, 64, 128};

static inline int map_refused(const char *why) {
  fprintf(stderr, "fake CUDA: tensor map: %s\n", why);
  return 1; /* CUDA_ERROR_INVALID_VALUE */
}

#define MAP_REFUSE(condition) \
  if (condition) { \
    return map_refused(#condition); \
  }

/* What both kinds have; without interleaved layouts, packed types and swizzles of larger atoms, which nothing uses. */
static inline int map_common(tensor_map *made, const void *to, int type, unsigned rank, unsigned least_rank,
                             const void *address, const uint64_t *shape, const uint64_t *strides,
                             const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  MAP_REFUSE((uintptr_t)to % MAP_ALIGNMENT != 0)
  MAP_REFUSE(type < 0 || type >= (int)sizeof map_element_bytes)
  MAP_REFUSE(rank < least_rank || rank > MOST_RANK)
  MAP_REFUSE((uintptr_t)address % 16 != 0)
  MAP_REFUSE(interleave != 0)
  MAP_REFUSE(swizzle < 0 || swizzle >= (int)sizeof map_swizzle_bytes)
  MAP_REFUSE(promotion < 0 || promotion > 3)
  MAP_REFUSE(fill < 0 || fill > 1 || (fill == 1 && !map_element_is_float[type]))
  memset(made, 0, sizeof *made);
  for (unsigned i = 0; i < rank; i++) {
    MAP_REFUSE(shape[i] == 0 || shape[i] > UINT64_C(1) << 32)
    MAP_REFUSE(steps[i] == 0 || steps[i] > 8)
    made->last[i] = (uint32_t)(shape[i] - 1);
    made->steps[i] = (uint8_t)steps[i];
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    MAP_REFUSE(strides[i] % 16 != 0 || strides[i] >= UINT64_C(1) << 40)
    MAP_REFUSE(strides[i] < shape[i])
    made->strides[i] = strides[i];
  }
  made->magic = MAP_MAGIC;
  made->address = (uint64_t)(uintptr_t)address;
  made->rank = (uint8_t)rank;
  made->element_bytes = map_element_bytes[type];
  made->swizzle_bytes = map_swizzle_bytes[swizzle];
  return 0;
}

static inline int map_encode_tiled(void *to, int type, unsigned rank, const void *address, const uint64_t *shape,
                                   const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                   int swizzle, int promotion, int fill) {
  tensor_map made;
  int error = map_common(&made, to, type, rank, 1, address, shape, strides, steps, interleave, swizzle, promotion, fill);
  if (error != 0) {
    return error;
  }
  for (unsigned i = 0; i < rank; i++) {
    MAP_REFUSE(box[i] == 0 || box[i] > 256)
    made.box[i] = (uint16_t)box[i];
  }
  MAP_REFUSE(box[0] * made.element_bytes % 16 != 0)
  MAP_REFUSE(swizzle != 0 && box[0] * made.element_bytes > made.swizzle_bytes)
  memset(to, 0, MAP_BYTES);
  memcpy(to, &made, sizeof made);
  return 0;
}

static inline int map_encode_im2col(void *to, int type, unsigned rank, const void *address, const uint64_t *shape,
                                    const uint64_t *strides, const int *lower, const int *upper, unsigned channels,
                                    unsigned pixels, const uint32_t *steps, int interleave, int swizzle, int promotion,
                                    int fill) {
  static const int limits[] = {0, 0, 0, 1 << 15, 1 << 7, 1 << 4};
  tensor_map made;
  int error = map_common(&made, to, type, rank, 3, address, shape, strides, steps, interleave, swizzle, promotion, fill);
  if (error != 0) {
    return error;
  }
  for (unsigned i = 0; i < rank - 2; i++) {
    MAP_REFUSE(lower[i] < -limits[rank] || lower[i] >= limits[rank])
    MAP_REFUSE(upper[i] < -limits[rank] || upper[i] >= limits[rank])
    MAP_REFUSE((int64_t)shape[i + 1] + upper[i] - lower[i] <= 0)
    made.lower[i] = (int16_t)lower[i];
    made.upper[i] = (int16_t)upper[i];
  }
  MAP_REFUSE(channels == 0 || channels > 256)
  MAP_REFUSE(pixels == 0 || pixels > 1024)
  MAP_REFUSE(channels * made.element_bytes % 16 != 0)
  MAP_REFUSE(swizzle != 0 && channels * made.element_bytes > made.swizzle_bytes)
  made.channels = (uint16_t)channels;
  made.pixels = (uint16_t)pixels;
  memset(to, 0, MAP_BYTES);
  memcpy(to, &made, sizeof made);
  return 0;
}

/* The bytes of memory from the map's address to the end of its last element. */
static inline uint64_t map_extent(const tensor_map *map) {
  uint64_t end = ((uint64_t)map->last[0] + 1) * map->element_bytes;
  for (unsigned i = 1; i < map->rank; i++) {
    end += map->last[i] * map->strides[i - 1];
  }
  return end;
}
