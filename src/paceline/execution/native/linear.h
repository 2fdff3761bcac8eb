/* Matrix times a few rows of activations, in tiles of BLOCK = 16 output features (each in a vector lane of its own).
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
  float *x;       /* [rows][k] FP32 matrices; BF16 matrices, rounded, where bf16 is not multiplied in pairs */
  uint16_t *half; /* [rows][k] BF16 matrices elsewhere */
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
    for (int i = 0; i < n; i += LANES)
      if (HAVE_PAIRS) store_bf16(a->half + off + i, load(src + i));
      else store(a->x + off + i, bf16_high(round_bf16(load(src + i))));
    return;
  }
  for (int g = 0; g < n / 32; g++) {
    const float *s = src + 32 * g;
    vec largest = vabs(load(s));
    for (int i = LANES; i < 32; i += LANES) largest = vmax(largest, vabs(load(s + i)));
    float top = hmax(largest), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    veci total = splat_i(0);
    for (int i = 0; i < 32; i += LANES) {
      veci q = round_int(load(s + i) * splat(inverse));
      store_i8(a->q + off + 32 * g + i, q);
      total += q;
    }
    size_t at_group = (off + 32 * g) / 32;
    int32_t sum = hsum_i(total);
    a->scale[at_group] = scale;
    a->sum[at_group] = scale * (float)sum;
    a->isum[at_group] = sum;
    if (a->energy) {
      vec squares = splat(0);
      for (int i = 0; i < 32; i += LANES) squares = squares + load(s + i) * load(s + i);
      a->energy[at_group] = hsum(squares);
    }
  }
}

/* Parts [part, part + parts) of a tile times m rows; y[r][BLOCK]. */
#define TILE_ARGS const uint8_t *t, int part, const int parts, int k, const Acts *a, int row, const int m, float *y

INLINE void tile_fp32(TILE_ARGS) {
  vec sum[8];
  const float *w = (const float *)t + LANES * part;
  EACH(i, m * parts) sum[i] = splat(0);
  for (int i = 0; i < k; i++) {
    if (row == 0 && part == 0) fetch_ahead(t + 64 * (size_t)i, 1);
    EACH(p, parts) {
      vec wi = load(w + BLOCK * (size_t)i + LANES * p);
      EACH(r, m) sum[r * parts + p] = FMA(wi, splat(a->x[(size_t)(row + r) * k + i]), sum[r * parts + p]);
    }
  }
  EACH(r, m) EACH(p, parts) store(y + BLOCK * r + LANES * (part + p), sum[r * parts + p]);
}

INLINE void tile_bf16(TILE_ARGS) {
  vec sum[8];
  EACH(i, m * parts) sum[i] = splat(0);
  for (int i = 0; i < k / 2; i++) {
    if (row == 0 && part == 0) fetch_ahead(t + 64 * (size_t)i, 1);
    EACH(p, parts) {
      veci pair = AT(veci, t + 64 * (size_t)i + 4 * LANES * (part + p));
      EACH(r, m) {
        size_t at = (size_t)(row + r) * k + 2 * i;
        if (HAVE_PAIRS) {
          int32_t x;
          memcpy(&x, a->half + at, 4);
          sum[r * parts + p] = dot2(sum[r * parts + p], pair, splat_i(x));
        } else { /* the same, with nothing left to unpack for each row */
          sum[r * parts + p] = FMA(bf16_low(pair), splat(a->x[at]), sum[r * parts + p]);
          sum[r * parts + p] = FMA(bf16_high(pair), splat(a->x[at + 1]), sum[r * parts + p]);
        }
      }
    }
  }
  EACH(r, m) EACH(p, parts) store(y + BLOCK * r + LANES * (part + p), sum[r * parts + p]);
}

INLINE void tile_q8(TILE_ARGS) {
  vec sum[8];
  int groups = k / 32;
  const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 512);
  EACH(i, m * parts) sum[i] = splat(0);
  const uint8_t *here = t;
  for (int g = 0; g < groups; g++, t += 512, here += 544) {
    if (row == 0 && part == 0) fetch_ahead(here, 9);
    EACH(p, parts) {
      int lane = LANES * (part + p);
      vec d = load_f16(scales + BLOCK * g + lane);
      size_t first = (size_t)row * groups + g;
      veci products[8];
      dot_bytes(t + 4 * lane, a->q + 32 * first, k, m, a->isum + first, groups, products);
      EACH(r, m) {
        size_t at = first + (size_t)r * groups;
        sum[r * parts + p] = FMA(d * splat(a->scale[at]), to_float(products[r]), sum[r * parts + p]);
      }
    }
  }
  EACH(r, m) EACH(p, parts) store(y + BLOCK * r + LANES * (part + p), sum[r * parts + p]);
}

INLINE void tile_q4(TILE_ARGS) {
  vec sum[8];
  int groups = k / 32;
  const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 256), *offsets = scales + (size_t)groups * BLOCK;
  EACH(i, m * parts) sum[i] = splat(0);
  const uint8_t *here = t;
  for (int g = 0; g < groups; g++, t += 256, here += 320) {
    if (row == 0 && part == 0) fetch_ahead(here, 5);
    EACH(p, parts) {
      int lane = LANES * (part + p);
      vec d = load_f16(scales + BLOCK * g + lane), o = load_f16(offsets + BLOCK * g + lane);
      size_t first = (size_t)row * groups + g;
      veci products[8];
      dot_nibbles(t + 4 * lane, a->q + 32 * first, k, m, products);
      EACH(r, m) {
        size_t at = first + (size_t)r * groups;
        vec before = FMA(d * splat(a->scale[at]), to_float(products[r]), sum[r * parts + p]);
        sum[r * parts + p] = FMA(o, splat(a->sum[at]), before);
      }
    }
  }
  EACH(r, m) EACH(p, parts) store(y + BLOCK * r + LANES * (part + p), sum[r * parts + p]);
}

/* A function for each format and number of rows: of several in one function the compiler keeps the sums out of registers. Up to
 * `WHOLE` rows go with a whole tile, more with one part of it after another, which are then in the first-level cache. */
typedef void Kernel(const uint8_t *t, int k, const Acts *a, int row, float *y);
#define KERNEL(FORMAT, WHOLE, M)                                                                                  \
  static __attribute__((noinline)) void FORMAT##_##M(const uint8_t *t, int k, const Acts *a, int row, float *y) { \
    enum { TOGETHER = (M) <= (WHOLE) ? PARTS : 1 };                                                               \
    for (int part = 0; part < PARTS; part += TOGETHER) FORMAT(t, part, TOGETHER, k, a, row, M, y);                \
  }
#define KERNELS(FORMAT, WHOLE)                                                                                            \
  KERNEL(FORMAT, WHOLE, 1) KERNEL(FORMAT, WHOLE, 2) KERNEL(FORMAT, WHOLE, 3) KERNEL(FORMAT, WHOLE, 4)                     \
  KERNEL(FORMAT, WHOLE, 5) KERNEL(FORMAT, WHOLE, 6) KERNEL(FORMAT, WHOLE, 7) KERNEL(FORMAT, WHOLE, 8)                     \
  static Kernel *const FORMAT##_kernels[] = {FORMAT##_1, FORMAT##_2, FORMAT##_3, FORMAT##_4,                              \
                                             FORMAT##_5, FORMAT##_6, FORMAT##_7, FORMAT##_8};
KERNELS(tile_fp32, 8 / PARTS)
KERNELS(tile_bf16, 8 / PARTS)
KERNELS(tile_q8, 1)
KERNELS(tile_q4, 1)
static Kernel *const *const kernels_of[] = {tile_fp32_kernels, tile_bf16_kernels, tile_q8_kernels, tile_q4_kernels};

/* One tile against rows [row, row + m), m <= 8: y[r] holds BLOCK features of row + r. */
static void tile_rows(const Matrix *w, int tile, const Acts *a, int row, int m, float *y) {
  kernels_of[w->kind][m - 1](w->data + tile_bytes(w->kind, w->k) * tile, w->k, a, row, y);
}

/* One row of a packed matrix as floats (embedding look-up). */
static void unpack_row(const Matrix *w, int row, float *out) {
  const uint8_t *t = w->data + tile_bytes(w->kind, w->k) * (row / BLOCK);
  int lane = row % BLOCK, first = lane / LANES * LANES, k = w->k, groups = k / 32;
  for (int i = 0; i < k; i++) {
    int g = i / 32, c = i % 32;
    if (w->kind == FP32) {
      out[i] = ((const float *)t)[BLOCK * (size_t)i + lane];
    } else if (w->kind == BF16) {
      uint32_t bits = (uint32_t)((const uint16_t *)t)[(size_t)(i / 2) * 32 + 2 * lane + i % 2] << 16;
      memcpy(out + i, &bits, 4);
    } else if (w->kind == Q8) {
      vec d = load_f16((const uint16_t *)(t + (size_t)groups * 512) + BLOCK * g + first);
      out[i] = d[lane - first] * (float)(t[512 * (size_t)g + 64 * (c / 4) + 4 * lane + c % 4] - 128);
    } else {
      const uint16_t *scales = (const uint16_t *)(t + (size_t)groups * 256);
      vec d = load_f16(scales + BLOCK * g + first), o = load_f16(scales + BLOCK * ((size_t)groups + g) + first);
      uint8_t byte = t[256 * (size_t)g + 64 * (c / 8) + 4 * lane + c % 4];
      out[i] = FMA(splat((float)(c % 8 < 4 ? byte & 15 : byte >> 4)), d, o)[lane - first];
    }
  }
}
#endif
