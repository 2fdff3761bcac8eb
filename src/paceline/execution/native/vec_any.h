/* Any processor, in GCC/Clang vector extensions and loops: the readable reference of vec_avx512.h and vec_avx2.h. */
#ifndef PACELINE_VEC_ANY_H
#define PACELINE_VEC_ANY_H

typedef _Float16 vecf16 __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
INLINE vec splat(float x) {
  vec r;
  for (int i = 0; i < LANES; i++) r[i] = x;
  return r;
}
INLINE veci splat_i(int32_t x) {
  veci r;
  for (int i = 0; i < LANES; i++) r[i] = x;
  return r;
}
#define FMA(a, b, c) ((a) * (b) + (c))
INLINE vec load_f16(const uint16_t *p) { return __builtin_convertvector(*(const vecf16 *)p, vec); }
INLINE veci round_int(vec x) {
  veci r;
  for (int i = 0; i < LANES; i++) r[i] = (int32_t)__builtin_rintf(x[i]);
  return r;
}
INLINE vec to_float(veci x) { return __builtin_convertvector(x, vec); }
INLINE vec vmax(vec a, vec b) {
  for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
INLINE vec vmin(vec a, vec b) {
  for (int i = 0; i < LANES; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
INLINE vec vabs(vec a) {
  for (int i = 0; i < LANES; i++) a[i] = __builtin_fabsf(a[i]);
  return a;
}
INLINE void store_i8(int8_t *p, veci x) {
  for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i];
}
INLINE int32_t hsum_i(veci x) {
  int32_t s = 0;
  for (int i = 0; i < LANES; i++) s += x[i];
  return s;
}
/* In one fixed tree order. */
INLINE float hsum(vec x) {
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
}
INLINE float hmax(vec x) {
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = m > x[i] ? m : x[i];
  return m;
}
INLINE int any(veci x) {
  int32_t some = 0;
  for (int i = 0; i < LANES; i++) some |= x[i];
  return some != 0;
}
/* Write the lanes of x whose `kept` is -1 one behind another (and anything behind them, LANES values in all); returns how many. */
INLINE int compress(uint32_t *p, veci x, veci kept) {
  int n = 0;
  for (int i = 0; i < LANES; i++) {
    p[n] = (uint32_t)x[i];
    n -= kept[i];
  }
  return n;
}
INLINE vecb low_nibbles(vecb v) { return v & 15; }
INLINE vecb high_nibbles(vecb v) { return v >> 4; }

/* Of 32 inputs, exact: out[r] lane = sum over i, j of w[64 i + 4 lane + j] times x[r stride + 4 i + j], m rows. */
INLINE void dot_unsigned(const vecb *w, const int8_t *x, int stride, const int m, veci *out) {
  EACH(r, m) {
    out[r] = splat_i(0);
    for (int i = 0; i < 8; i++)
      for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) out[r][lane] += w[i][4 * lane + j] * x[(size_t)r * stride + 4 * i + j];
  }
}
/* w: inputs 8 i + j in low nibbles, 8 i + 4 + j in high ones. */
INLINE void dot_nibbles(const uint8_t *w, const int8_t *x, int stride, const int m, veci *out) {
  vecb v[8];
  for (int i = 0; i < 4; i++) {
    v[2 * i] = low_nibbles(AT(vecb, w + 64 * i));
    v[2 * i + 1] = high_nibbles(AT(vecb, w + 64 * i));
  }
  dot_unsigned(v, x, stride, m, out);
}
/* Of w - 128. sum[r sum_stride]: of the row's x. */
INLINE void dot_bytes(const uint8_t *w, const int8_t *x, int stride, const int m, const int32_t *sum, int sum_stride, veci *out) {
  vecb v[8];
  for (int i = 0; i < 8; i++) v[i] = AT(vecb, w + 64 * i);
  dot_unsigned(v, x, stride, m, out);
  EACH(r, m) out[r] -= splat_i(128 * sum[(size_t)r * sum_stride]);
}

/* Half of the lanes as whole numbers, towards zero. Those met here are not negative and below 2^52. */
INLINE vecl whole_low(vec x) {
  vecl r;
  for (int i = 0; i < LANES / 2; i++) r[i] = (int64_t)x[i];
  return r;
}
INLINE vecl whole_high(vec x) {
  vecl r;
  for (int i = 0; i < LANES / 2; i++) r[i] = (int64_t)x[i + LANES / 2];
  return r;
}
#endif
