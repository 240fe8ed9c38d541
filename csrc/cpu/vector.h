// Vectors of one instruction set and register tiles of them, in the namespace that T2V_ISA names. Included by tile.cpp
// only. Vectors are the compiler's own (vector_size), so the same code serves every width.
#pragma once

#include "tile.h"

#ifdef __AVX512BF16__  // compiled together with the dot products of 16-bit integers
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

// Whether the instruction set has dot products of bfloat16 pairs.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define T2V_PAIRS
#endif

#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define T2V_BYTES 64
#elif defined(__AVX2__)
#define T2V_BYTES 32
#else
#define T2V_BYTES 16
#endif

namespace t2v {
namespace T2V_ISA {
namespace {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(T2V_BYTES)));
  static constexpr int width = T2V_BYTES / sizeof(T);
};
template <class T>
using V = typename Vector<T>::type;

template <class T>
inline V<T> load(const T* p) {
  V<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, V<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

typedef uint32_t Bits __attribute__((vector_size(T2V_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(T2V_BYTES / 2)));

// Rounds to bfloat16, in the upper halves: to the nearest value, and to the even one of two equally near.
inline Bits rounded(V<float> v) {
  const Bits bits = (Bits)v;
  return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : Bits{} + 0x7fc00000;
}

// Loads values of another type, such as bfloat16, as a vector.
template <class T, class S>
inline V<T> load_as(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load(p);
  } else {
    Halves halves;
    std::memcpy(&halves, p, sizeof(halves));
    return (V<T>)(__builtin_convertvector(halves, Bits) << 16);
  }
}

template <class T, class S>
inline void store_as(S* p, V<T> v, int64_t valid = Vector<T>::width) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(p, &v, valid * sizeof(T));
  } else {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const Halves halves = __builtin_convertvector(rounded(v) >> 16, Halves);
#endif
    std::memcpy(p, &halves, valid * sizeof(S));
  }
}

// The sum of a vector, halving it step by step.
template <class T, int Bytes = T2V_BYTES>
inline T whole_total(const void* v) {
  if constexpr (Bytes > 16) {
    typedef T Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, v, sizeof(low));
    std::memcpy(&high, static_cast<const char*>(v) + sizeof(low), sizeof(high));
    const Half sum = low + high;
    return whole_total<T, Bytes / 2>(&sum);
  } else {
    T values[Bytes / sizeof(T)];
    std::memcpy(values, v, Bytes);
    if constexpr (sizeof(T) == 8) return values[0] + values[1];
    return (values[0] + values[1]) + (values[2] + values[3]);
  }
}

template <class T>
inline T total(V<T> v, int valid = Vector<T>::width) {
  if (valid == Vector<T>::width) return whole_total<T>(&v);
  T sum = 0;
  for (int k = 0; k < valid; ++k) sum += v[k];
  return sum;
}

// How a tile multiplies its operands: single values or pairs.
template <class E>
struct Operand {
  typedef V<E> Values;
  typedef V<E> Sums;
  static V<E> multiply_add(V<E> sum, E a, Values b) { return sum + a * b; }
};

#ifdef T2V_PAIRS
template <>
struct Operand<Pair> {
  typedef int32_t Values __attribute__((vector_size(T2V_BYTES)));
  typedef V<float> Sums;
  // Denormal operands count as zero.
  static V<float> multiply_add(V<float> sum, Pair a, Values b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof(bits));
#ifdef __AVX512BF16__
    return (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
#else
    return (V<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)vdupq_n_s32(bits), (bfloat16x8_t)b);
#endif
  }
};
#endif

#ifdef __AVX512BF16__
template <>
struct Operand<Fixed> {
  typedef int32_t Values __attribute__((vector_size(T2V_BYTES)));
  typedef Values Sums;
  static Sums multiply_add(Sums sum, Fixed a, Values b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof(bits));
    return (Sums)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(bits), (__m512i)b);
  }
};
#endif

// The 32 registers of AVX-512 and of NEON hold 12 x 2 sums, 2 columns and a broadcast; the 16 of AVX2 hold 6 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int max_height = 12;
#else
constexpr int max_height = 6;
#endif

// Computes one tile of MR rows and NV vectors, and passes each row of sums to the epilogue.
template <class T, int MR, int NV, class E, class Epilogue>
inline void tile(const E* a, const Rows& rows, const E* b, int64_t column, int64_t columns, const Epilogue& epilogue) {
  constexpr int width = Vector<T>::width;
  typename Operand<E>::Sums sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = typename Operand<E>::Sums{};
  for (int64_t y = 0; y < rows.outer; ++y, a += rows.a_skip) {
    const E* p = b + y * rows.outer_stride + column;
    for (int64_t z = 0; z < rows.inner; ++z, p += rows.inner_stride, a += rows.a_stride) {
      typename Operand<E>::Values values[NV];
      for (int v = 0; v < NV; ++v) std::memcpy(&values[v], p + v * width, sizeof(values[v]));
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) sums[i][v] = Operand<E>::multiply_add(sums[i][v], a[i * rows.a_column], values[v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = column + v * width, left = columns - at;
      if (left > 0) epilogue(i, at, left < width ? static_cast<int>(left) : width, sums[i][v]);
    }
}

}  // namespace
}  // namespace T2V_ISA
}  // namespace t2v
