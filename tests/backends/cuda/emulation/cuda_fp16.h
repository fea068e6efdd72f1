/* half, as generated kernels use it. */
#pragma once

#include "narrow_float.h"

using half = NarrowFloat<5>;
using __half = half;
CNNC_NARROW_OPERATORS(half)

static inline half __float2half_rn(float value) { return half(value); }
static inline float __half2float(half value) { return float(value); }

struct __attribute__((aligned(4))) half2 { half x, y; };
#define CNNC_HALF4
struct __attribute__((aligned(8))) half4 { half x, y, z, w; };
