/* Sixteen float lanes. AVX-512 intrinsics where the target has them, GCC/Clang vector extensions elsewhere.
 *
 * Every operation has one fixed rounding, so that a row's result never depends on which tile width computed it: compile with
 * -ffp-contract=off, and fuse only where FMA() says so. */
#ifndef PACELINE_VEC_H
#define PACELINE_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define HAVE_AVX512 1
#else
#define HAVE_AVX512 0
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), aligned(4), may_alias));
typedef int64_t v8l __attribute__((vector_size(64), aligned(8), may_alias));
typedef uint8_t v64u __attribute__((vector_size(64), aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16i splat_i(int32_t x) { return (v16i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 load16(const float *p) { return *(const v16 *)p; }
INLINE void store16(float *p, v16 x) { *(v16 *)p = x; }

#if HAVE_AVX512
#define FMA(a, b, c) ((v16)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
INLINE v16 load_f16(const uint16_t *p) { return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_f16(uint16_t *p, v16 x) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE v16i round_int(v16 x) { return (v16i)_mm512_cvtps_epi32((__m512)x); }
INLINE v16 to_float(v16i x) { return (v16)_mm512_cvtepi32_ps((__m512i)x); }
INLINE v16 vmax(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE v16 vmin(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE v16 vabs(v16 a) { return (v16)_mm512_abs_ps((__m512)a); }
/* acc[lane] += sum over j of w[4 lane + j] * x[j]; w unsigned, x signed bytes. Exact. */
INLINE v16i dot4(v16i acc, v64u w, const int8_t *x) {
  int32_t packed;
  memcpy(&packed, x, 4);
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(packed));
}
INLINE void store_i8(int8_t *p, v16i x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x)); }
INLINE int32_t hsum_i(v16i x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE float hmax(v16 x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE int any(v16i x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }
/* Write the lanes of x whose `kept` is -1 one behind another (and anything behind them, 16 values in all); returns how many. */
INLINE int compress(uint32_t *p, v16i x, v16i kept) {
  __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask, (__m512i)x));
  return __builtin_popcount(mask);
}
INLINE v64u low_nibbles(v64u v) { return (v64u)_mm512_and_si512((__m512i)v, _mm512_set1_epi8(15)); }
INLINE v64u high_nibbles(v64u v) {
  return (v64u)_mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), _mm512_set1_epi8(15));
}
#else
typedef _Float16 v16h __attribute__((vector_size(32), aligned(2), may_alias));
#define FMA(a, b, c) ((a) * (b) + (c))
INLINE v16 load_f16(const uint16_t *p) { return __builtin_convertvector(*(const v16h *)p, v16); }
INLINE void store_f16(uint16_t *p, v16 x) { *(v16h *)p = __builtin_convertvector(x, v16h); }
INLINE v16i round_int(v16 x) {
  v16i r;
  for (int i = 0; i < 16; i++) r[i] = (int32_t)__builtin_rintf(x[i]);
  return r;
}
INLINE v16 to_float(v16i x) { return __builtin_convertvector(x, v16); }
INLINE v16 vmax(v16 a, v16 b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
INLINE v16 vmin(v16 a, v16 b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
INLINE v16 vabs(v16 a) {
  for (int i = 0; i < 16; i++) a[i] = __builtin_fabsf(a[i]);
  return a;
}
INLINE v16i dot4(v16i acc, v64u w, const int8_t *x) {
  for (int i = 0; i < 16; i++)
    acc[i] += w[4 * i] * x[0] + w[4 * i + 1] * x[1] + w[4 * i + 2] * x[2] + w[4 * i + 3] * x[3];
  return acc;
}
INLINE void store_i8(int8_t *p, v16i x) {
  for (int i = 0; i < 16; i++) p[i] = (int8_t)x[i];
}
INLINE int32_t hsum_i(v16i x) {
  int32_t s = 0;
  for (int i = 0; i < 16; i++) s += x[i];
  return s;
}
INLINE float hmax(v16 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = m > x[i] ? m : x[i];
  return m;
}
INLINE int any(v16i x) {
  int32_t some = 0;
  for (int i = 0; i < 16; i++) some |= x[i];
  return some != 0;
}
INLINE int compress(uint32_t *p, v16i x, v16i kept) {
  int n = 0;
  for (int i = 0; i < 16; i++) {
    p[n] = (uint32_t)x[i];
    n -= kept[i];
  }
  return n;
}
INLINE v64u low_nibbles(v64u v) { return v & 15; }
INLINE v64u high_nibbles(v64u v) { return v >> 4; }
#endif

/* Eight lanes as whole numbers, towards zero. */
#if HAVE_AVX512 && defined(__AVX512DQ__)
INLINE v8l whole_low(v16 x) { return (v8l)_mm512_cvttps_epi64(_mm512_castps512_ps256((__m512)x)); }
INLINE v8l whole_high(v16 x) { return (v8l)_mm512_cvttps_epi64(_mm512_extractf32x8_ps((__m512)x, 1)); }
#else
INLINE v8l whole_low(v16 x) {
  v8l r;
  for (int i = 0; i < 8; i++) r[i] = (int64_t)x[i];
  return r;
}
INLINE v8l whole_high(v16 x) {
  v8l r;
  for (int i = 0; i < 8; i++) r[i] = (int64_t)x[i + 8];
  return r;
}
#endif

/* Two bf16 values a lane: even elements in the low half of each 32-bit word. */
INLINE v16 bf16_low(v16i pair) { return (v16)(pair << 16); }
INLINE v16 bf16_high(v16i pair) { return (v16)(pair & splat_i((int32_t)0xffff0000)); }
INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* acc += low a * low b + high a * high b */
INLINE v16 dot2(v16 acc, v16i a, v16i b) {
#if HAVE_AVX512 && defined(__AVX512BF16__)
  return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
  acc = FMA(bf16_low(a), bf16_low(b), acc);
  return FMA(bf16_high(a), bf16_high(b), acc);
#endif
}
typedef uint16_t v16u __attribute__((vector_size(32), aligned(2), may_alias));
INLINE void store_bf16(uint16_t *p, v16 x) {
#if HAVE_AVX512 && defined(__AVX512BF16__)
  *(v16u *)p = (v16u)_mm512_cvtneps_pbh((__m512)x);
#else
  v16i bits = (v16i)x;
  *(v16u *)p = __builtin_convertvector((bits + splat_i(0x7fff) + ((bits >> 16) & splat_i(1))) >> 16, v16u);
#endif
}

/* Lane sums in one fixed tree order. */
INLINE float hsum(v16 x) {
#if HAVE_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[16];
  memcpy(s, &x, 64);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
#endif
}

/* exp(x) to about 2 ulp: range reduction by ln 2 and a degree-6 polynomial. */
INLINE v16 vexp(v16 x) {
  x = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  v16i n = round_int(x * splat(1.44269504f));
  v16 f = to_float(n);
  v16 r = FMA(f, splat(-0.693359375f), x);
  r = FMA(f, splat(2.12194440e-4f), r);
  v16 p = splat(1.9875691500e-4f);
  p = FMA(p, r, splat(1.3981999507e-3f));
  p = FMA(p, r, splat(8.3334519073e-3f));
  p = FMA(p, r, splat(4.1665795894e-2f));
  p = FMA(p, r, splat(1.6666665459e-1f));
  p = FMA(p, r, splat(5.0000001201e-1f));
  p = FMA(p, r * r, r) + splat(1.0f);
  return p * (v16)((n + splat_i(127)) << 23);
}
#endif
