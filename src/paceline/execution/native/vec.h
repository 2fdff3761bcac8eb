/* Vectors of LANES floats: 16 with AVX-512, 8 with AVX2, 4 (GCC/Clang vector extensions) elsewhere.
 *
 * What processors do differently stands in vec_avx512.h, vec_avx2.h and vec_any.h, each with the same functions; vec_any.h is the
 * readable reference. Every operation has one fixed rounding, so that a row's result never depends on which tile width computed
 * it: compile with -ffp-contract=off, and fuse only where FMA() says so. */
#ifndef PACELINE_VEC_H
#define PACELINE_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define HAVE_AVX512 1
#define HAVE_FMA 1
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAVE_AVX512 0
#define HAVE_FMA 1
#define LANES 8
#else
#define HAVE_AVX512 0
#define HAVE_FMA 0 /* products and sums are rounded each for itself */
#define LANES 4
#endif

/* Features of a tile of weights, and positions of a block of keys: their layouts are the same whatever the width of vectors. */
#define BLOCK 16
#define PARTS (BLOCK / LANES)

#define VECTOR(bytes) __attribute__((vector_size(bytes)))
typedef float vec VECTOR(4 * LANES);
typedef int32_t veci VECTOR(4 * LANES);
typedef int64_t vecl VECTOR(4 * LANES); /* half as many lanes */
typedef uint8_t vecb VECTOR(4 * LANES); /* four bytes a lane */
typedef uint16_t vech VECTOR(2 * LANES);
/* Unrolled, so that variables of all rows stay in registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
#define INLINE static inline __attribute__((always_inline))

/* Memory may lie anywhere. Variables may not: one that leaves its register would cross lines of the cache. */
#define AT(type, p) (*(type##_anywhere *)(p))
#define ANYWHERE __attribute__((aligned(1), may_alias))
typedef vec vec_anywhere ANYWHERE;
typedef veci veci_anywhere ANYWHERE;
typedef vecl vecl_anywhere ANYWHERE;
typedef vecb vecb_anywhere ANYWHERE;
typedef vech vech_anywhere ANYWHERE;
INLINE vec load(const float *p) { return AT(vec, p); }
INLINE void store(float *p, vec x) { AT(vec, p) = x; }

#if HAVE_AVX512
#include "vec_avx512.h"
#elif LANES == 8
#include "vec_avx2.h"
#else
#include "vec_any.h"
#endif

/* Two bf16 values a lane: even elements in the low half of each 32-bit word. */
INLINE vec bf16_low(veci pair) { return (vec)(pair << 16); }
INLINE vec bf16_high(veci pair) { return (vec)(pair & splat_i((int32_t)0xffff0000)); }

#if HAVE_AVX512 && defined(__AVX512BF16__)
#define HAVE_PAIRS 1 /* the processor multiplies pairs of bf16 */
#else
#define HAVE_PAIRS 0
#endif

/* acc += low a * low b + high a * high b */
INLINE vec dot2(vec acc, veci a, veci b) {
#if HAVE_PAIRS
  return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
  acc = FMA(bf16_low(a), bf16_low(b), acc);
  return FMA(bf16_high(a), bf16_high(b), acc);
#endif
}
INLINE veci round_bf16(vec x) { return (veci)x + splat_i(0x7fff) + (((veci)x >> 16) & splat_i(1)); } /* in the upper half */
INLINE void store_bf16(uint16_t *p, vec x) {
#if HAVE_PAIRS
  AT(vech, p) = (vech)_mm512_cvtneps_pbh((__m512)x);
#else
  AT(vech, p) = __builtin_convertvector(round_bf16(x) >> 16, vech);
#endif
}

/* exp(x) to about 2 ulp: range reduction by ln 2 and a degree-6 polynomial. */
INLINE vec vexp(vec x) {
  x = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  veci n = round_int(x * splat(1.44269504f));
  vec f = to_float(n);
  vec r = FMA(f, splat(-0.693359375f), x);
  r = FMA(f, splat(2.12194440e-4f), r);
  vec p = splat(1.9875691500e-4f);
  p = FMA(p, r, splat(1.3981999507e-3f));
  p = FMA(p, r, splat(8.3334519073e-3f));
  p = FMA(p, r, splat(4.1665795894e-2f));
  p = FMA(p, r, splat(1.6666665459e-1f));
  p = FMA(p, r, splat(5.0000001201e-1f));
  p = FMA(p, r * r, r) + splat(1.0f);
  return p * (vec)((n + splat_i(127)) << 23);
}
#endif
