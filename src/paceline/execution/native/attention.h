/* Attention of a few new rows over a sequence's cache: committed slots, then the row's own ancestors, then the row itself.
 *
 * A row visits its keys in position order whether they lie in a chain or on a branch of a tree, so both give the same bits.
 *
 * Cache layout of one (layer, kv head): keys [capacity/16][D][16] (a lane is a position), values [capacity][D];
 * f16, or f32 when the model runs in fp32. A slot plus the segment's shift is its position; a sequence that keeps only some rows
 * has a shift, and its first slots hold rows of lower positions (in windowed layers: exactly those positions). */
#ifndef PACELINE_ATTENTION_H
#define PACELINE_ATTENTION_H

#include "vec.h"

/* Sums stay in registers only if every loop over them is unrolled. */
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
  uint8_t *keys, *values; /* [layers][kv heads] regions as above */
  int32_t capacity;       /* slots, a multiple of 16 */
  int32_t base;           /* committed slots */
  int32_t first_row, num_rows;
  int32_t is_tree; /* rows carry ancestor bits; otherwise row i sees rows 0..i */
  int32_t shift;   /* position - slot */
} Segment;

INLINE v16 load_kv(const uint8_t *p, size_t i, const int f32) {
  return f32 ? load16((const float *)p + i) : load_f16((const uint16_t *)p + i);
}

static void write_kv(Segment *s, size_t region, int dim, int slot, const float *key, const float *value, int f32) {
  size_t at = region * (size_t)s->capacity * dim;
  size_t k0 = at + (size_t)(slot / 16) * dim * 16 + slot % 16, v0 = at + (size_t)slot * dim;
  for (int i = 0; i < dim; i += 16) {
    v16 k = load16(key + i), v = load16(value + i);
    if (f32) {
      for (int j = 0; j < 16; j++) ((float *)s->keys)[k0 + 16 * (size_t)(i + j)] = k[j];
      store16((float *)s->values + v0 + i, v);
    } else {
      uint16_t half[16];
      store_f16(half, k);
      for (int j = 0; j < 16; j++) ((uint16_t *)s->keys)[k0 + 16 * (size_t)(i + j)] = half[j];
      store_f16((uint16_t *)s->values + v0 + i, v);
    }
  }
}

/* scores[r][16 b ..] for rows r and key blocks b .. b + blocks: each a sum over D in order. On the way it asks memory for the keys
 * of the next blocks and for the values of these: a long context does not fit the caches. */
INLINE void score_blocks(const float *const *q, const uint8_t *keys, const uint8_t *values, size_t at, int dim, float scale, const int rows,
                         const int blocks, int b, float *scores, int stride, const int f32) {
  v16 acc[8];
  UNROLL for (int i = 0; i < rows * blocks; i++) acc[i] = splat(0);
  size_t block0 = at + (size_t)b * dim * 16;
  for (int d = 0; d < dim; d++)
    UNROLL for (int j = 0; j < blocks; j++) {
      size_t element = block0 + ((size_t)j * dim + d) * 16;
      v16 k = load_kv(keys, element, f32);
      if (d % 2) __builtin_prefetch(values + (element << (1 + f32)), 0, 2);
      else __builtin_prefetch(keys + ((element + (size_t)blocks * dim * 16) << (1 + f32)), 0, 2);
      UNROLL for (int r = 0; r < rows; r++) acc[r * blocks + j] = FMA(k, splat(q[r][d]), acc[r * blocks + j]);
    }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int j = 0; j < blocks; j++) store16(scores + (size_t)r * stride + 16 * (b + j), acc[r * blocks + j] * splat(scale));
}

INLINE void score_rows(const float *const *q, const uint8_t *keys, const uint8_t *values, size_t at, int dim, float scale, const int rows,
                       const int wide, int first, int last, float *scores, int stride, const int f32) {
  int b = first;
  for (; b + wide <= last; b += wide) score_blocks(q, keys, values, at, dim, scale, rows, wide, b, scores, stride, f32);
  for (; b < last; b++) score_blocks(q, keys, values, at, dim, scale, rows, 1, b, scores, stride, f32);
}

/* Softmax of n scores in place, unnormalised; returns the sum. Padded up to a multiple of 16. */
static float softmax(float *s, int n) {
  int padded = (n + 15) & ~15;
  for (int i = n; i < padded; i++) s[i] = -1e30f;
  v16 top = splat(-1e30f), total = splat(0);
  for (int i = 0; i < padded; i += 16) top = vmax(top, load16(s + i));
  v16 largest = splat(hmax(top));
  for (int i = 0; i < padded; i += 16) {
    v16 e = vexp(load16(s + i) - largest);
    if (i + 16 > n)
      for (int j = n - i; j < 16; j++) e[j] = 0;
    store16(s + i, e);
    total = total + e;
  }
  return hsum(total);
}

/* acc[r] += weights[r][i] * value(slot) over slots from..to, in order; weights are indexed from `shift[r]`. */
INLINE void add_values(v16 acc[][4], const float *const *weights, const int *shift, const int rows, const uint8_t *values,
                       size_t at, int dim, int column, const int lanes, int from, int to, const int f32) {
  for (int slot = from; slot < to; slot++)
    UNROLL for (int c = 0; c < lanes; c++) {
      v16 v = load_kv(values, at + (size_t)slot * dim + column + 16 * c, f32);
      UNROLL for (int r = 0; r < rows; r++) acc[r][c] = FMA(v, splat(weights[r][slot - shift[r]]), acc[r][c]);
    }
}

typedef struct {
  int dim, window;
  float scale;
  const uint64_t *ancestors; /* per row of the batch: bit i = row i of its segment is an ancestor or itself */
  const int32_t *positions;
  float *mass; /* [regions][mass_stride]: attention that each slot gets, summed over queries; or NULL */
  int32_t mass_stride;
} AttentionSpec;

/* Up to 4 queries that share a kv head: query r belongs to row row_of[r] of the segment (not decreasing). out[r]: [dim].
 * scratch: 4 x stride floats, stride >= capacity + 64. */
INLINE void attend_block(const Segment *s, size_t region, const AttentionSpec *a, const float *const *q, float *const *out,
                         const int *row_of, const int rows, const int lanes, const int f32, float *scratch, int stride) {
  size_t at = region * (size_t)s->capacity * a->dim;
  int start[4], prefix_end[4], count[4], shift[4];
  const float *weights[4];
  int lowest = 1 << 30, slots = s->base + row_of[rows - 1] + 1;
  for (int r = 0; r < rows; r++) {
    int position = a->positions[s->first_row + row_of[r]] - s->shift; /* in slots */
    start[r] = a->window && position - a->window + 1 > 0 ? position - a->window + 1 : 0;
    if (start[r] < lowest) lowest = start[r];
  }
  const int wide = rows == 1 ? 4 : 2;
  score_rows(q, s->keys, s->values, at, a->dim, a->scale, rows, wide, lowest / 16, (slots + 15) / 16, scratch, stride, f32);

  uint8_t branch[4][64]; /* rows of the segment that each tree row sees, in order */
  float inverse[4];
  int shared_from = 0, shared_to = 1 << 30;
  for (int r = 0; r < rows; r++) {
    float *scores = scratch + (size_t)r * stride;
    int visible = 0;
    prefix_end[r] = s->is_tree ? s->base : s->base + row_of[r] + 1;
    if (start[r] > prefix_end[r]) start[r] = prefix_end[r];
    if (s->is_tree) {
      uint64_t bits = a->ancestors[s->first_row + row_of[r]];
      for (int i = 0; i < s->num_rows && i < 64; i++)
        if (bits >> i & 1) {
          scores[s->base + visible] = scores[s->base + i];
          branch[r][visible++] = (uint8_t)i;
        }
    }
    count[r] = prefix_end[r] - start[r] + visible;
    inverse[r] = 1.0f / softmax(scores + start[r], count[r]);
    if (a->mass)
      for (int i = start[r]; i < prefix_end[r]; i++) a->mass[region * (size_t)a->mass_stride + i] += scores[i] * inverse[r];
    weights[r] = scores + start[r];
    shift[r] = start[r];
    if (start[r] > shared_from) shared_from = start[r];
    if (prefix_end[r] < shared_to) shared_to = prefix_end[r];
  }
  if (shared_to < shared_from) shared_to = shared_from;
  for (int column = 0; column < a->dim; column += 16 * lanes) {
    v16 acc[4][4];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int c = 0; c < lanes; c++) acc[r][c] = splat(0);
    UNROLL for (int r = 0; r < rows; r++) {
      int to = prefix_end[r] < shared_from ? prefix_end[r] : shared_from;
      add_values(acc + r, weights + r, shift + r, 1, s->values, at, a->dim, column, lanes, start[r], to, f32);
    }
    add_values(acc, weights, shift, rows, s->values, at, a->dim, column, lanes, shared_from, shared_to, f32);
    UNROLL for (int r = 0; r < rows; r++) {
      if (prefix_end[r] > shared_to)
        add_values(acc + r, weights + r, shift + r, 1, s->values, at, a->dim, column, lanes, shared_to, prefix_end[r], f32);
      int seen = prefix_end[r] - start[r];
      for (int i = seen; i < count[r]; i++) {
        const float *weight = weights[r] + i;
        int slot = s->base + branch[r][i - seen];
        add_values(acc + r, &weight, &slot, 1, s->values, at, a->dim, column, lanes, slot, slot + 1, f32);
      }
      UNROLL for (int c = 0; c < lanes; c++) store16(out[r] + column + 16 * c, acc[r][c] * splat(inverse[r]));
    }
  }
}

/* The same for 1 to 4 queries; widths are constants inside, so that sums stay in registers. */
static void attend(const Segment *s, size_t region, const AttentionSpec *a, const float *const *q, float *const *out,
                   const int *row_of, int rows, int f32, float *scratch, int stride) {
#define ATTEND(ROWS, LANES, F32) attend_block(s, region, a, q, out, row_of, ROWS, LANES, F32, scratch, stride)
#define ATTEND_ROWS(LANES, F32)                                                                                        \
  do {                                                                                                                 \
    if (rows == 4) ATTEND(4, LANES, F32);                                                                              \
    else if (rows == 3) ATTEND(3, LANES, F32);                                                                         \
    else if (rows == 2) ATTEND(2, LANES, F32);                                                                         \
    else ATTEND(1, LANES, F32);                                                                                        \
  } while (0)
  if (a->dim % 64 == 0 && !f32) ATTEND_ROWS(4, 0);
  else if (a->dim % 64 == 0) ATTEND_ROWS(4, 1);
  else if (f32) ATTEND_ROWS(1, 1);
  else ATTEND_ROWS(1, 0);
}
#endif
