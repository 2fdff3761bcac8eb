/* AVX-512 with VNNI: sixteen lanes. */
#ifndef PACELINE_VEC_AVX512_H
#define PACELINE_VEC_AVX512_H

#include <immintrin.h>

INLINE vec splat(float x) { return (vec)_mm512_set1_ps(x); }
INLINE veci splat_i(int32_t x) { return (veci)_mm512_set1_epi32(x); }
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
INLINE vec load_f16(const uint16_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE veci round_int(vec x) { return (veci)_mm512_cvtps_epi32((__m512)x); }
INLINE vec to_float(veci x) { return (vec)_mm512_cvtepi32_ps((__m512i)x); }
INLINE vec vmax(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec vmin(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec vabs(vec a) { return (vec)_mm512_abs_ps((__m512)a); }
INLINE void store_i8(int8_t *p, veci x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x)); }
INLINE int32_t hsum_i(veci x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE float hsum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float hmax(vec x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE int any(veci x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }
INLINE int compress(uint32_t *p, veci x, veci kept) {
  __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask, (__m512i)x));
  return __builtin_popcount(mask);
}
INLINE vecb low_nibbles(vecb v) { return (vecb)_mm512_and_si512((__m512i)v, _mm512_set1_epi8(15)); }
INLINE vecb high_nibbles(vecb v) {
  return (vecb)_mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), _mm512_set1_epi8(15));
}

INLINE __m512i dot4(__m512i acc, vecb w, const int8_t *x) {
  int32_t packed;
  memcpy(&packed, x, 4);
  return _mm512_dpbusd_epi32(acc, (__m512i)w, _mm512_set1_epi32(packed));
}
INLINE veci dot32(__m512i even, const vecb *w, const int8_t *x) {
  __m512i odd = _mm512_setzero_si512();
  for (int i = 0; i < 8; i += 2) {
    even = dot4(even, w[i], x + 4 * i);
    odd = dot4(odd, w[i + 1], x + 4 * i + 4);
  }
  return (veci)_mm512_add_epi32(even, odd);
}
INLINE void dot_nibbles(const uint8_t *w, const int8_t *x, int stride, const int m, veci *out) {
  vecb v[8];
  for (int i = 0; i < 4; i++) {
    v[2 * i] = low_nibbles(AT(vecb, w + 64 * i));
    v[2 * i + 1] = high_nibbles(AT(vecb, w + 64 * i));
  }
  EACH(r, m) out[r] = dot32(_mm512_setzero_si512(), v, x + (size_t)r * stride);
}
INLINE void dot_bytes(const uint8_t *w, const int8_t *x, int stride, const int m, const int32_t *sum, int sum_stride, veci *out) {
  vecb v[8];
  for (int i = 0; i < 8; i++) v[i] = AT(vecb, w + 64 * i);
  EACH(r, m) out[r] = dot32(_mm512_set1_epi32(-128 * sum[(size_t)r * sum_stride]), v, x + (size_t)r * stride);
}

INLINE vecl whole_low(vec x) { return (vecl)_mm512_cvttps_epi64(_mm512_castps512_ps256((__m512)x)); }
INLINE vecl whole_high(vec x) { return (vecl)_mm512_cvttps_epi64(_mm512_extractf32x8_ps((__m512)x, 1)); }
#endif
