/* Attention of a few new rows over a sequence's cache: committed slots, then the row's own ancestors, then the row itself.
 *
 * A row visits its keys in position order whether they lie in a chain or on a branch of a tree, and always in chunks of CHUNK
 * slots that are joined in order: so it has the same bits in a chain, in a tree and in any batch, and chunks can be shared out.
 * Queries that share a kv head go together, so that a key or value is read and converted once for up to QUERIES of them.
 *
 * Cache layout of one (layer, kv head), in words of 32 bits: keys [capacity/16][D/P][16] (positions side by side), values
 * [capacity/P][D]. At fp32 a word is a float (P = 1); else it is two bf16 (P = 2): neighbouring inputs of a key, neighbouring
 * slots of a value, as the processor's dot product of pairs and its matrix unit want them. A slot plus the segment's shift is its
 * position; a sequence that keeps only some rows has a shift, and its first slots hold rows of lower positions (in windowed layers:
 * exactly those positions). */
#ifndef PACELINE_ATTENTION_H
#define PACELINE_ATTENTION_H

#include "tiles.h"

/* Sums stay in registers only if every loop over them is unrolled. */
#define UNROLL _Pragma("GCC unroll 16")
#define CHUNK 128
#define QUERIES TILE_ROWS /* that go together at most */
#define VECTOR_QUERIES 12 /* without a matrix unit */
#define WIDEST_TILED 256  /* largest head that goes through the matrix unit */
#define MAX_TREE 64
#define TAIL (MAX_TREE + 32)                         /* scores of a tree's rows, from a multiple of BLOCK */
/* Floats, and one partial result: scores, their tails, weights, queries side by side, sums. */
#define ATTENTION_SCRATCH (QUERIES * (CHUNK + TAIL + CHUNK / 2 + WIDEST_TILED / 2 + 64))

typedef struct {
  uint8_t *keys, *values; /* [layers][kv heads] regions as above */
  int32_t capacity;       /* slots, a multiple of BLOCK */
  int32_t base;           /* committed slots */
  int32_t first_row, num_rows;
  int32_t is_tree; /* rows carry ancestor bits; otherwise row i sees rows 0..i */
  int32_t shift;   /* position - slot */
} Segment;

typedef struct {
  int dim, window, kv_f32;
  int tiled; /* through the matrix unit */
  float scale;
  const uint64_t *ancestors; /* per row of the batch: bit i = row i of its segment is an ancestor or itself */
  const int32_t *positions;
} AttentionSpec;

/* What a row sees, in slots of its own path: a tree's row i of depth n sees the same numbers as row n of a chain. */
typedef struct {
  int start, end;
} Span;

/* Queries of one kv head, not decreasing by row. Beyond `count` they repeat the first, up to a width that has a kernel. */
typedef struct {
  int count, width;
  const float *q[QUERIES]; /* words: [D], or [D/2] pairs of bf16 */
  float *out[QUERIES]; /* partial results: top splat[BLOCK], total[BLOCK] (LANES of each in use), sum[D] */
  int row_of[QUERIES]; /* in the segment */
} Queries;

INLINE int partial_size(int dim) { return 2 * BLOCK + dim; }

INLINE Span span_of(const Segment *s, const AttentionSpec *a, int row) {
  Span span = {0, s->base + row + 1};
  if (s->is_tree) span.end = s->base + __builtin_popcountll(a->ancestors[s->first_row + row]);
  int first = a->positions[s->first_row + row] - s->shift - a->window + 1;
  if (a->window && first > 0) span.start = first < span.end ? first : span.end - 1;
  return span;
}

/* Vectors that `rows` queries meet at once: their sums are to stay in registers, of which there are 32 with AVX-512, else 16. */
#define SUMS 24
INLINE int side_by_side(const int rows) {
  if (HAVE_AVX512) return rows <= 6 ? 4 : 2;
  return rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
}

INLINE vec load_words(const uint8_t *p, size_t word) { return load((const float *)p + word); }
INLINE vec multiply_words(vec acc, vec a, vec b, const int f32) {
  if (f32) return FMA(a, b, acc);
  return dot2(acc, (veci)a, (veci)b);
}
INLINE size_t words_of(const Segment *s, int dim, int f32) { return (size_t)s->capacity * dim >> !f32; } /* of a region */

/* Places of one number of a key or a value in its region, counted in numbers. */
INLINE size_t key_at(int dim, int slot, int i, int f32) {
  if (f32) return ((size_t)(slot / BLOCK) * dim + i) * BLOCK + slot % BLOCK;
  return (((size_t)(slot / BLOCK) * (dim / 2) + i / 2) * BLOCK + slot % BLOCK) * 2 + i % 2;
}
INLINE size_t value_at(int dim, int slot, int i, int f32) {
  return f32 ? (size_t)slot * dim + i : ((size_t)(slot / 2) * dim + i) * 2 + slot % 2;
}

static void write_key(Segment *s, size_t region, int dim, int slot, const float *key, int f32) {
  size_t at = region * (size_t)s->capacity * dim;
  for (int i = 0; i < dim; i += LANES) {
    uint16_t half[LANES];
    store_bf16(half, load(key + i));
    for (int j = 0; j < LANES; j++) {
      size_t to = at + key_at(dim, slot, i + j, f32);
      if (f32) ((float *)s->keys)[to] = key[i + j];
      else ((uint16_t *)s->keys)[to] = half[j];
    }
  }
}

/* Values are made finite: a later row's value counts zero times in an earlier row, which must be zero. */
static void write_value(Segment *s, size_t region, int dim, int slot, const float *value, int f32) {
  size_t at = region * (size_t)s->capacity * dim;
  vec limit = splat(3.3e38f);
  for (int i = 0; i < dim; i += LANES) {
    vec v = vmin(vmax(load(value + i), -limit), limit);
    uint16_t half[LANES];
    store_bf16(half, v);
    for (int j = 0; j < LANES; j++) {
      size_t to = at + value_at(dim, slot, i + j, f32);
      if (f32) ((float *)s->values)[to] = v[j];
      else ((uint16_t *)s->values)[to] = half[j];
    }
  }
}

/* scores[r][LANES j ..] of `count` vectors of keys from vector `first` on: each a sum over D in order. On the way it asks memory for
 * the values of these slots, and the values' sums ask for the keys of the next chunk: a long context does not fit the caches. */
INLINE void score_vectors(const Queries *b, const Segment *s, size_t at, const AttentionSpec *a, const int rows, const int count,
                          int first, float *scores, int stride, const int f32) {
  vec acc[SUMS];
  size_t word[4];
  int words = f32 ? a->dim : a->dim / 2;
  UNROLL for (int i = 0; i < rows * count; i++) acc[i] = splat(0);
  UNROLL for (int j = 0; j < count; j++)
    word[j] = at + ((size_t)((first + j) / PARTS) * words) * BLOCK + (size_t)((first + j) % PARTS) * LANES;
  for (int d = 0; d < words; d++)
    UNROLL for (int j = 0; j < count; j++) {
      vec k = load_words(s->keys, word[j] + (size_t)d * BLOCK);
      __builtin_prefetch(s->values + 4 * (word[j] + (size_t)d * BLOCK), 0, 2);
      UNROLL for (int r = 0; r < rows; r++) acc[r * count + j] = multiply_words(acc[r * count + j], k, splat(b->q[r][d]), f32);
    }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int j = 0; j < count; j++) store(scores + (size_t)r * stride + LANES * j, acc[r * count + j]);
}

/* Scores of key blocks [block, last). */
INLINE void score_rows(const Queries *b, const Segment *s, size_t at, const AttentionSpec *a, const int rows, int block, int last,
                       float *scores, int stride, const int f32) {
  const int wide = side_by_side(rows);
  int first = block * PARTS, end = last * PARTS;
  for (; first + wide <= end; first += wide, scores += LANES * wide)
    score_vectors(b, s, at, a, rows, wide, first, scores, stride, f32);
  for (; first < end; first++, scores += LANES) score_vectors(b, s, at, a, rows, 1, first, scores, stride, f32);
}

/* out[r] sum = weights[r][i] * value word i over i in order. */
INLINE void sum_columns(const Queries *b, const Segment *s, size_t at, int dim, const int rows, const int count, int column,
                        int n, const float *weights, const int f32) {
  vec acc[SUMS];
  UNROLL for (int i = 0; i < rows * count; i++) acc[i] = splat(0);
  for (int i = 0; i < n; i++) {
    vec v[4];
    UNROLL for (int c = 0; c < count; c++) {
      size_t word = at + (size_t)i * dim + column + LANES * c;
      v[c] = load_words(s->values, word);
      __builtin_prefetch(s->keys + 4 * (word + ((size_t)CHUNK * dim >> !f32)), 0, 2);
    }
    UNROLL for (int r = 0; r < rows; r++) {
      vec weight = splat(weights[r * (f32 ? CHUNK : CHUNK / 2) + i]);
      UNROLL for (int c = 0; c < count; c++) acc[r * count + c] = multiply_words(acc[r * count + c], v[c], weight, f32);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int c = 0; c < count; c++) store(b->out[r] + 2 * BLOCK + column + LANES * c, acc[r * count + c]);
}

INLINE void sum_rows(const Queries *b, const Segment *s, size_t at, int dim, const int rows, int n, const float *weights,
                     const int f32) {
  const int wide = side_by_side(rows);
  int column = 0;
  for (; column + LANES * wide <= dim; column += LANES * wide) sum_columns(b, s, at, dim, rows, wide, column, n, weights, f32);
  for (; column < dim; column += LANES) sum_columns(b, s, at, dim, rows, 1, column, n, weights, f32);
}

/* Numbers of queries are constants inside, so that sums stay in registers. */
#define EACH_WIDTH(X) X(1) X(2) X(3) X(4) X(6) X(8) X(9) X(12)

static void score(const Queries *b, const Segment *s, size_t at, const AttentionSpec *a, int block, int last, float *scores, int stride) {
#define SCORE(N)                                                                    \
  case N:                                                                           \
    if (a->kv_f32) score_rows(b, s, at, a, N, block, last, scores, stride, 1);      \
    else score_rows(b, s, at, a, N, block, last, scores, stride, 0);                \
    break;
  switch (b->width) { EACH_WIDTH(SCORE) }
}

static void sum_values(const Queries *b, const Segment *s, size_t at, const AttentionSpec *a, int n, const float *weights) {
#define SUM(N)                                                               \
  case N:                                                                    \
    if (a->kv_f32) sum_rows(b, s, at, a->dim, N, n, weights, 1);     \
    else sum_rows(b, s, at, a->dim, N, n, weights, 0);               \
    break;
  switch (b->width) { EACH_WIDTH(SUM) }
}

static void pad_queries(Queries *b, float *spare) {
#define PAD(N) if (b->count <= N && !b->width) b->width = N;
  b->width = 0;
  EACH_WIDTH(PAD)
  for (int i = b->count; i < b->width; i++) b->q[i] = b->q[0], b->out[i] = spare;
}

/* Which lanes of a vector from slot `at` lie in [from, to). */
INLINE veci lanes_within(int at, int from, int to) {
  veci slot = splat_i(at);
  for (int i = 0; i < LANES; i++) slot[i] += i;
  return (slot >= splat_i(from)) & (slot < splat_i(to));
}

/* w[0 .. n), n a multiple of BLOCK, becomes exp(scale * w - top), zero outside [from, to); half the same as bf16. Leaves top and
 * the lanes of the total in out. */
static void softmax(float *w, uint16_t *half, int n, int from, int to, float scale, float *out) {
  vec top = splat(-1e30f), total = splat(0);
  for (int i = 0; i < n; i += LANES) {
    vec x = load(w + i) * splat(scale);
    if (i < from || i + LANES > to) {
      veci seen = lanes_within(i, from, to);
      x = (vec)(((veci)x & seen) | ((veci)splat(-1e30f) & ~seen));
    }
    top = vmax(top, x);
  }
  vec largest = splat(hmax(top));
  for (int i = 0; i < n; i += LANES) {
    vec e = vexp(load(w + i) * splat(scale) - largest);
    if (i < from || i + LANES > to) e = (vec)((veci)e & lanes_within(i, from, to));
    store(w + i, e);
    store_bf16(half + i, e);
    total = total + e;
  }
  store(out, largest);
  store(out + BLOCK, total);
}

/* The rows of the segment that a tree's row sees, in order. */
static int path_of(uint64_t ancestors, uint8_t *path) {
  int n = 0;
  for (; ancestors; ancestors &= ancestors - 1) path[n++] = (uint8_t)__builtin_ctzll(ancestors);
  return n;
}

/* The word of values, columns c .. c + LANES, of the path's slots `slot` and (in pairs) slot + 1, wherever these lie. */
INLINE veci path_values(const Segment *s, size_t at, const AttentionSpec *a, const uint8_t *path, int slot, int to, int c, const int f32) {
  int real[2];
  for (int j = 0; j < 2; j++) {
    int wanted = slot + j < to ? slot + j : slot; /* beyond the end the weight is zero */
    real[j] = wanted < s->base ? wanted : s->base + path[wanted - s->base];
  }
  veci low = (veci)load_words(s->values, at + (size_t)(real[0] >> !f32) * a->dim + c);
  if (f32) return low;
  veci high = (veci)load_words(s->values, at + (size_t)(real[1] >> 1) * a->dim + c);
  if (real[0] % 2) low = low >> 16;
  if (real[1] % 2 == 0) high = high << 16;
  return (low & splat_i(0xffff)) | (high & splat_i((int32_t)0xffff0000));
}

/* Slots of a path from `from`, which lie on a branch, are added to a query's sum: as the value kernels do, wherever the slots are. */
INLINE void sum_branch(const Segment *s, size_t at, const AttentionSpec *a, const uint8_t *path, int from, int to, const float *weights,
                       float *sum, const int f32) {
  for (int slot = from, i = 0; slot < to; slot += 2 - f32, i++)
    for (int c = 0; c < a->dim; c += LANES) {
      veci v = path_values(s, at, a, path, slot, to, c, f32);
      store(sum + c, multiply_words(load(sum + c), (vec)v, splat(weights[i]), f32));
    }
}

/* As sum_branch, as the matrix unit adds: `from` is the first slot of a tile. */
static void sum_branch_tiled(const Segment *s, size_t at, const AttentionSpec *a, const uint8_t *path, int from, int to,
                             const float *weights, float *sum) {
  unsigned before = flush_denormals();
  for (; from < to; from += TILE_INPUTS, weights += TILE_INPUTS / 2)
    for (int c = 0; c < a->dim; c += LANES) {
      vec even = splat(0), odd = splat(0);
      for (int i = 0; i < TILE_INPUTS / 2 && from + 2 * i < to; i++) {
        veci v = path_values(s, at, a, path, from + 2 * i, to, c, 0), w = (veci)splat(weights[i]);
        even = FMA(bf16_low(w), bf16_low(v), even);
        odd = FMA(bf16_high(w), bf16_high(v), odd);
      }
      store(sum + c, load(sum + c) + (even + odd));
    }
  restore_denormals(before);
}

/* Scores of key blocks [block, last). queries: side by side, for the matrix unit. */
static void score_any(const Queries *b, const uint16_t *queries, const Segment *s, size_t at, const AttentionSpec *a, int block,
                      int last, float *scores, int stride) {
  size_t from = 4 * (at + (size_t)block * a->dim * 8);
  if (a->tiled) tile_scores(queries, s->keys + from, s->values + from, a->dim, last - block, scores, stride);
  else score(b, s, at, a, block, last, scores, stride);
}

/* out[r] sum = weights times values of `tiles` tiles of 32 slots from word `at`, through the matrix unit. */
static void sum_values_tiled(const Queries *b, const Segment *s, size_t at, int dim, int tiles, const uint16_t *weights, float *sums) {
  for (int column = 0; column < dim; column += 64) {
    const uint8_t *ahead = s->keys + 4 * (at + (size_t)CHUNK * dim / 2);
    tile_values(weights, CHUNK, s->values + 4 * at, ahead, dim, column, tiles, sums);
    for (int r = 0; r < b->count; r++)
      for (int c = 0; c < 64 && column + c < dim; c += LANES) store(b->out[r] + 2 * BLOCK + column + c, load(sums + 64 * r + c));
  }
}

/* The partial results of all queries over the chunk from slot `first`; of use where a query's span meets it.
 * scratch: ATTENTION_SCRATCH + partial_size floats; its first [QUERIES][CHUNK] are left as exp(score - top). */
static void attend_chunk(const Segment *s, size_t region, const AttentionSpec *a, Queries *b, int first, float *scratch) {
  float *tail = scratch + QUERIES * CHUNK, *halves = tail + QUERIES * TAIL, *sums = halves + QUERIES * CHUNK / 2;
  uint16_t *queries = (uint16_t *)(sums + 64 * QUERIES);
  int pair = 2 - a->kv_f32, stride = CHUNK / pair, unit = a->tiled ? TILE_INPUTS : BLOCK, branch_unit = a->tiled ? TILE_INPUTS : pair;
  const float *weights = a->kv_f32 ? scratch : halves;
  size_t at = region * words_of(s, a->dim, a->kv_f32);
  int low = first + CHUNK, high = first, end = 0; /* of all queries: slots in the chunk, end of the longest path */
  Span span[QUERIES];
  if (a->tiled)
    for (int r = 0; r < b->count; r++) memcpy(queries + r * a->dim, b->q[r], (size_t)a->dim * 2);
  else pad_queries(b, scratch + ATTENTION_SCRATCH);
  for (int r = 0; r < b->count; r++) {
    span[r] = span_of(s, a, b->row_of[r]);
    if (span[r].start < low) low = span[r].start;
    if (span[r].end > end) end = span[r].end;
  }
  low = low < first ? first : low - (low - first) % unit;
  high = end < first + CHUNK ? end : first + CHUNK;
  int branches = s->is_tree && high > s->base; /* slots of a path from `base` on are not slots of the cache */
  int trunk = branches ? s->base : high;
  if (trunk > low) score_any(b, queries, s, at, a, low / BLOCK, (trunk + BLOCK - 1) / BLOCK, scratch + low - first, CHUNK);
  uint8_t path[QUERIES][MAX_TREE];
  if (branches) {
    score_any(b, queries, s, at, a, s->base / BLOCK, (s->base + s->num_rows + BLOCK - 1) / BLOCK, tail, TAIL);
    for (int r = 0; r < b->count; r++) {
      int n = path_of(a->ancestors[s->first_row + b->row_of[r]], path[r]);
      for (int i = 0; i < n; i++) {
        int slot = s->base + i - first;
        if (slot >= 0 && slot < CHUNK) scratch[r * CHUNK + slot] = tail[r * TAIL + s->base % BLOCK + path[r][i]];
      }
    }
  }
  for (int r = 0; r < b->count; r++) {
    int to = span[r].end < high ? span[r].end : high;
    softmax(scratch + r * CHUNK + low - first, (uint16_t *)(halves + r * CHUNK / 2) + low - first,
            (high - low + unit - 1) / unit * unit, span[r].start - low, to - low, a->scale, b->out[r]);
  }
  if (branches) trunk -= (trunk - first) % branch_unit;
  size_t values = at + (size_t)(low / pair) * a->dim;
  if (a->tiled) {
    int tiles = trunk > low ? (trunk - low + TILE_INPUTS - 1) / TILE_INPUTS : 0;
    sum_values_tiled(b, s, values, a->dim, tiles, (uint16_t *)halves + low - first, sums);
  } else {
    sum_values(b, s, values, a, trunk > low ? (trunk - low + pair - 1) / pair : 0, weights + (low - first) / pair);
  }
  for (int r = 0; branches && r < b->count; r++) {
    int from = trunk > low ? trunk : low, to = span[r].end < high ? span[r].end : high;
    const float *w = weights + r * stride + (from - first) / pair;
    if (a->kv_f32) sum_branch(s, at, a, path[r], from, to, w, b->out[r] + 2 * BLOCK, 1);
    else if (a->tiled) sum_branch_tiled(s, at, a, path[r], from, to, w, b->out[r] + 2 * BLOCK);
    else sum_branch(s, at, a, path[r], from, to, w, b->out[r] + 2 * BLOCK, 0);
  }
}

/* Join the result of the next chunk to that of the chunks before it. */
static void join(float *all, const float *next, int dim) {
  vec top = vmax(load(all), load(next)), old = vexp(load(all) - top), new = vexp(load(next) - top);
  store(all, top);
  for (int i = BLOCK; i < partial_size(dim); i += LANES) store(all + i, FMA(load(next + i), new, load(all + i) * old));
}

static void finish(const float *all, int dim, float *out) {
  vec inverse = splat(1.0f / hsum(load(all + BLOCK)));
  for (int i = 0; i < dim; i += LANES) store(out + i, load(all + 2 * BLOCK + i) * inverse);
}
#endif
