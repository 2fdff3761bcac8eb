/* Matrix times a few rows of activations, in tiles of 16 output features (one vector lane each).
 *
 * A row's result is accumulated over the input in one fixed order, whatever the number of rows: integer products are exact, and
 * floating-point steps happen once a group of 32 inputs, in order. So a token's logits have the same bits alone or in a batch.
 *
 * Packed layout of one tile (16 features x k inputs):
 *   FP32   float  [k][16]
 *   BF16   uint16 [k/2][16][2]
 *   Q8     uint8  [k/32][8][16][4], then f16 scale [k/32][16];                w = scale * (q - 128)
 *   Q4     nibble [k/32][4][16][4] (low: inputs 8i+j, high: 8i+4+j), then f16 scale, offset [k/32][16];  w = scale * q + offset */
#ifndef PACELINE_LINEAR_H
#define PACELINE_LINEAR_H

#include <stddef.h>

#include "vec.h"

enum { FP32 = 0, BF16 = 1, Q8 = 2, Q4 = 3 };

typedef struct {
  const uint8_t *data;
  int32_t n, k; /* output features (data is padded to a multiple of 16), inputs */
  int32_t kind;
  int32_t pad;
} Matrix;

/* Activations of up to max_rows rows, in the form that the matrices want. */
typedef struct {
  float *x;       /* [rows][k] FP32 matrices */
  uint16_t *half; /* [rows][k] BF16 matrices */
  int8_t *q;      /* [rows][k] quantised matrices */
  float *scale;   /* [rows][k/32]: x = scale * q */
  float *sum;     /* [rows][k/32]: scale * (sum of q in the group) */
  int32_t *isum;  /* [rows][k/32]: sum of q in the group */
  float *energy;  /* [rows][k/32]: squared length of the group before rounding; NULL where nobody asks (grades.h) */
} Acts;

INLINE size_t tile_bytes(int kind, int k) {
  size_t groups = (size_t)k / 32;
  return kind == FP32 ? (size_t)k * 64 : kind == BF16 ? (size_t)k * 32 : kind == Q8 ? groups * 544 : groups * 320;
}

/* Weights are read once a pass, in order, so the next ones are asked for long before their use: without this a core waits for
 * memory at a third of its bandwidth. Tiles of a matrix, and matrices of a layer, follow each other in memory. */
#define AHEAD 16384
INLINE void fetch_ahead(const uint8_t *p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch(p + AHEAD + 64 * i, 0, 2);
}

/* Store n values (a multiple of 32) of one row, from column `at`, in the form for `kind`. */
static void put_acts(Acts *a, int kind, int k, int row, int at, const float *src, int n) {
  size_t off = (size_t)row * k + at;
  if (kind == FP32) {
    memcpy(a->x + off, src, (size_t)n * 4);
    return;
  }
  if (kind == BF16) {
    for (int i = 0; i < n; i += 16) store_bf16(a->half + off + i, load16(src + i));
    return;
  }
  for (int g = 0; g < n / 32; g++) {
    const float *s = src + 32 * g;
    v16 lo = load16(s), hi = load16(s + 16);
    float largest = hmax(vmax(vabs(lo), vabs(hi)));
    float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
    v16i a0 = round_int(lo * splat(inverse)), a1 = round_int(hi * splat(inverse));
    int8_t *q = a->q + off + 32 * g;
    store_i8(q, a0);
    store_i8(q + 16, a1);
    int32_t total = hsum_i(a0 + a1);
    size_t at_group = (off + 32 * g) / 32;
    a->scale[at_group] = scale;
    a->sum[at_group] = scale * (float)total;
    a->isum[at_group] = total;
    if (a->energy) a->energy[at_group] = hsum(lo * lo + hi * hi);
  }
}

/* Unrolled, so that the sums of all rows stay in registers until a tile is done. */
#define EACH_ROW(r, m) _Pragma("GCC unroll 8") for (int r = 0; r < m; r++)

INLINE void tile_fp32(const uint8_t *t, int k, const Acts *a, int row, const int m, v16 *out) {
  v16 y[8];
  const float *w = (const float *)t;
  EACH_ROW(r, m) y[r] = splat(0);
  for (int i = 0; i < k; i++) {
    if (row == 0) fetch_ahead(t + 64 * (size_t)i, 1);
    v16 wi = load16(w + 16 * (size_t)i);
    EACH_ROW(r, m) y[r] = FMA(wi, splat(a->x[(size_t)(row + r) * k + i]), y[r]);
  }
  EACH_ROW(r, m) out[r] = y[r];
}

INLINE void tile_bf16(const uint8_t *t, int k, const Acts *a, int row, const int m, v16 *out) {
  v16 y[8];
  EACH_ROW(r, m) y[r] = splat(0);
  for (int i = 0; i < k / 2; i++) {
    if (row == 0) fetch_ahead(t + 64 * (size_t)i, 1);
    v16i pair = *(const v16i *)(t + 64 * (size_t)i);
    EACH_ROW(r, m) {
      int32_t x;
      memcpy(&x, a->half + (size_t)(row + r) * k + 2 * i, 4);
      y[r] = dot2(y[r], pair, splat_i(x));
    }
  }
  EACH_ROW(r, m) out[r] = y[r];
}

INLINE void tile_q8(const uint8_t *t, int k, const Acts *a, int row, const int m, v16 *out) {
  v16 y[8];
  int groups = k / 32;
  const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 512);
  EACH_ROW(r, m) y[r] = splat(0);
  const uint8_t *here = t;
  for (int g = 0; g < groups; g++, t += 512, here += 544) {
    if (row == 0) fetch_ahead(here, 9);
    v16 d = load_f16(scales + 16 * g);
    v64u w[8];
    for (int i = 0; i < 8; i++) w[i] = *(const v64u *)(t + 64 * i);
    EACH_ROW(r, m) {
      size_t at = (size_t)(row + r) * groups + g;
      const int8_t *x = a->q + 32 * at;
      v16i even = splat_i(-128 * a->isum[at]), odd = splat_i(0);
      for (int i = 0; i < 8; i += 2) {
        even = dot4(even, w[i], x + 4 * i);
        odd = dot4(odd, w[i + 1], x + 4 * i + 4);
      }
      y[r] = FMA(d * splat(a->scale[at]), to_float(even + odd), y[r]);
    }
  }
  EACH_ROW(r, m) out[r] = y[r];
}

INLINE void tile_q4(const uint8_t *t, int k, const Acts *a, int row, const int m, v16 *out) {
  v16 y[8];
  int groups = k / 32;
  const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 256), *offsets = scales + (size_t)groups * 16;
  EACH_ROW(r, m) y[r] = splat(0);
  const uint8_t *here = t;
  for (int g = 0; g < groups; g++, t += 256, here += 320) {
    if (row == 0) fetch_ahead(here, 5);
    v16 d = load_f16(scales + 16 * g), o = load_f16(offsets + 16 * g);
    v64u w[8];
    for (int i = 0; i < 4; i++) {
      v64u v = *(const v64u *)(t + 64 * i);
      w[2 * i] = low_nibbles(v);
      w[2 * i + 1] = high_nibbles(v);
    }
    EACH_ROW(r, m) {
      size_t at = (size_t)(row + r) * groups + g;
      const int8_t *x = a->q + 32 * at;
      v16i even = splat_i(0), odd = splat_i(0);
      for (int i = 0; i < 8; i += 2) {
        even = dot4(even, w[i], x + 4 * i);
        odd = dot4(odd, w[i + 1], x + 4 * i + 4);
      }
      y[r] = FMA(d * splat(a->scale[at]), to_float(even + odd), y[r]);
      y[r] = FMA(o, splat(a->sum[at]), y[r]);
    }
  }
  EACH_ROW(r, m) out[r] = y[r];
}

#define TILE_CASE(M)                                                                            \
  case M:                                                                                       \
    if (w->kind == Q4) tile_q4(t, w->k, a, row, M, y);                                          \
    else if (w->kind == Q8) tile_q8(t, w->k, a, row, M, y);                                     \
    else if (w->kind == BF16) tile_bf16(t, w->k, a, row, M, y);                                 \
    else tile_fp32(t, w->k, a, row, M, y);                                                      \
    break;

/* One tile against rows [row, row + m), m <= 8: y[r] holds 16 features of row + r. */
static void tile_rows(const Matrix *w, int tile, const Acts *a, int row, int m, v16 *y) {
  const uint8_t *t = w->data + tile_bytes(w->kind, w->k) * tile;
  switch (m) {
    TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7) TILE_CASE(8)
  }
}

/* One row of a packed matrix as floats (embedding look-up). */
static void unpack_row(const Matrix *w, int row, float *out) {
  const uint8_t *t = w->data + tile_bytes(w->kind, w->k) * (row / 16);
  int lane = row % 16, k = w->k, groups = k / 32;
  for (int i = 0; i < k; i++) {
    int g = i / 32, c = i % 32;
    if (w->kind == FP32) {
      out[i] = ((const float *)t)[16 * (size_t)i + lane];
    } else if (w->kind == BF16) {
      uint32_t bits = (uint32_t)((const uint16_t *)t)[(size_t)(i / 2) * 32 + 2 * lane + i % 2] << 16;
      memcpy(out + i, &bits, 4);
    } else if (w->kind == Q8) {
      v16 d = load_f16((const uint16_t *)(t + (size_t)groups * 512) + 16 * g);
      out[i] = d[lane] * (float)(t[512 * (size_t)g + 64 * (c / 4) + 4 * lane + c % 4] - 128);
    } else {
      const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 256);
      v16 d = load_f16(scales + 16 * g), o = load_f16(scales + (size_t)groups * 16 + 16 * g);
      uint8_t byte = t[256 * (size_t)g + 64 * (c / 8) + 4 * lane + c % 4];
      out[i] = FMA(splat((float)(c % 8 < 4 ? byte & 15 : byte >> 4)), d, o)[lane];
    }
  }
}
#endif
