/* nv_bfloat16, as generated kernels use it. */
#pragma once

#include "narrow_float.h"

using nv_bfloat16 = NarrowFloat<8>;
using __nv_bfloat16 = nv_bfloat16;
CNNC_NARROW_OPERATORS(nv_bfloat16)

static inline nv_bfloat16 __float2bfloat16(float value) { return nv_bfloat16(value); }
static inline float __bfloat162float(nv_bfloat16 value) { return float(value); }
static inline nv_bfloat16 __float2bfloat16_rn(float value) { return nv_bfloat16(value); }

struct __attribute__((aligned(4))) nv_bfloat162 { nv_bfloat16 x, y; };
#define CNNC_NV_BFLOAT164
struct __attribute__((aligned(8))) nv_bfloat164 { nv_bfloat16 x, y, z, w; };
