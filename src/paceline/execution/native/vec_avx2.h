/* AVX2 with FMA and F16C: eight lanes. */
#ifndef PACELINE_VEC_AVX2_H
#define PACELINE_VEC_AVX2_H

#include <immintrin.h>

INLINE vec splat(float x) { return (vec)_mm256_set1_ps(x); }
INLINE veci splat_i(int32_t x) { return (veci)_mm256_set1_epi32(x); }
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
INLINE vec load_f16(const uint16_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE veci round_int(vec x) { return (veci)_mm256_cvtps_epi32((__m256)x); }
INLINE vec to_float(veci x) { return (vec)_mm256_cvtepi32_ps((__m256i)x); }
INLINE vec vmax(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec vmin(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vec vabs(vec a) { return (vec)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)a); }
INLINE void store_i8(int8_t *p, veci x) {
  __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}
INLINE int32_t hsum_i(veci x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}
INLINE float hsum(vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE float hmax(vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE int any(veci x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
INLINE int compress(uint32_t *p, veci x, veci kept) {
  int n = 0;
  if (any(kept))
    for (int i = 0; i < LANES; i++) {
      p[n] = (uint32_t)x[i];
      n -= kept[i];
    }
  return n;
}
INLINE vecb low_nibbles(vecb v) { return (vecb)_mm256_and_si256((__m256i)v, _mm256_set1_epi8(15)); }
INLINE vecb high_nibbles(vecb v) {
  return (vecb)_mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), _mm256_set1_epi8(15));
}

/* Products of bytes come as sums of two, in 16 bits that saturate. */
INLINE __m256i four_of(const int8_t *x) {
  int32_t packed;
  memcpy(&packed, x, 4);
  return _mm256_set1_epi32(packed);
}
/* Eight sums of nibbles and rounded activations, 3810 at most each, still fit. */
INLINE void dot_nibbles(const uint8_t *w, const int8_t *x, int stride, const int m, veci *out) {
  __m256i v[8];
  EACH(i, 4) {
    v[2 * i] = (__m256i)low_nibbles(AT(vecb, w + 64 * i));
    v[2 * i + 1] = (__m256i)high_nibbles(AT(vecb, w + 64 * i));
  }
  EACH(r, m) {
    const int8_t *xr = x + (size_t)r * stride;
    __m256i total = _mm256_maddubs_epi16(v[0], four_of(xr));
    for (int i = 1; i < 8; i++) total = _mm256_add_epi16(total, _mm256_maddubs_epi16(v[i], four_of(xr + 4 * i)));
    out[r] = (veci)_mm256_madd_epi16(total, _mm256_set1_epi16(1));
  }
}
/* One sum of two bytes at most 128 in size and rounded activations fits, no more; signs change sides, as one side has none. Rows
 * take turns: three operations in a chain for each four inputs would fill the processor's queue with waiting ones. */
INLINE void dot_bytes(const uint8_t *w, const int8_t *x, int stride, const int m, const int32_t *sum, int sum_stride, veci *out) {
  __m256i total[8], ones = _mm256_set1_epi16(1);
  EACH(i, 8) {
    __m256i v = _mm256_xor_si256((__m256i)AT(vecb, w + 64 * i), _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(v);
    EACH(r, m) {
      __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four_of(x + (size_t)r * stride + 4 * i), v));
      __m256i products = _mm256_madd_epi16(pairs, ones);
      total[r] = i ? _mm256_add_epi32(total[r], products) : products;
    }
  }
  EACH(r, m) out[r] = (veci)total[r];
}

/* A float is a double, and a whole one below 2^52 lies in the low bits of its sum with 2^52. */
INLINE vecl whole(__m128 x) {
  __m256d shift = _mm256_set1_pd(4503599627370496.0), d = _mm256_round_pd(_mm256_cvtps_pd(x), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  return (vecl)_mm256_xor_si256(_mm256_castpd_si256(_mm256_add_pd(d, shift)), _mm256_castpd_si256(shift));
}
INLINE vecl whole_low(vec x) { return whole(_mm256_castps256_ps128((__m256)x)); }
INLINE vecl whole_high(vec x) { return whole(_mm256_extractf128_ps((__m256)x, 1)); }
#endif
