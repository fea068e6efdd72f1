/* 16-bit floats of any split into exponent and mantissa: stored in 16 bits, computed in f32, rounded once. */
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

template <int EXPONENT_BITS> struct NarrowFloat {
  static constexpr int MANTISSA_BITS = 15 - EXPONENT_BITS;
  static constexpr int BIAS = (1 << (EXPONENT_BITS - 1)) - 1;
  static constexpr unsigned INFINITE = ((1u << EXPONENT_BITS) - 1) << MANTISSA_BITS;

  std::uint16_t bits;

  NarrowFloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> NarrowFloat(T value) : bits(encode(double(value))) {}

  operator float() const {
    unsigned magnitude = bits & 0x7fffu, mantissa = bits & ((1u << MANTISSA_BITS) - 1);
    int exponent = int(magnitude >> MANTISSA_BITS);
    double value = exponent == 0 ? std::ldexp(double(mantissa), 1 - BIAS - MANTISSA_BITS)
                                 : std::ldexp(1.0 + std::ldexp(double(mantissa), -MANTISSA_BITS), exponent - BIAS);
    if (magnitude >= INFINITE) {
      value = magnitude == INFINITE ? INFINITY : NAN;
    }
    return float(bits & 0x8000u ? -value : value);
  }

  /* To the nearest, halves to even, from the exact value. */
  static std::uint16_t encode(double value) {
    unsigned sign = std::signbit(value) ? 0x8000u : 0u;
    if (std::isnan(value)) {
      return std::uint16_t(sign | INFINITE | 1u << (MANTISSA_BITS - 1));
    }
    double magnitude = std::fabs(value);
    int exponent = magnitude == 0 || std::isinf(magnitude) ? 1 - BIAS : std::ilogb(magnitude);
    exponent = exponent < 1 - BIAS ? 1 - BIAS : exponent;
    double steps = std::nearbyint(std::ldexp(magnitude, MANTISSA_BITS - exponent));
    if (std::isinf(magnitude) || std::ldexp(steps, exponent - MANTISSA_BITS) >= std::ldexp(1.0, BIAS + 1)) {
      return std::uint16_t(sign | INFINITE);
    }
    /* `steps` counts from the start of this binade; a full one carries into the exponent by itself. */
    return std::uint16_t(sign | (unsigned(steps) + (unsigned(exponent + BIAS - 1) << MANTISSA_BITS)));
  }
};

#define CNNC_NARROW_OPERATORS(type) \
  static inline type operator+(type a, type b) { return type(float(a) + float(b)); } \
  static inline type operator-(type a, type b) { return type(float(a) - float(b)); } \
  static inline type operator*(type a, type b) { return type(float(a) * float(b)); } \
  static inline type operator/(type a, type b) { return type(float(a) / float(b)); } \
  static inline bool operator<(type a, type b) { return float(a) < float(b); } \
  static inline bool operator<=(type a, type b) { return float(a) <= float(b); } \
  static inline bool operator>(type a, type b) { return float(a) > float(b); } \
  static inline bool operator>=(type a, type b) { return float(a) >= float(b); } \
  static inline bool operator==(type a, type b) { return float(a) == float(b); } \
  static inline bool operator!=(type a, type b) { return float(a) != float(b); }
