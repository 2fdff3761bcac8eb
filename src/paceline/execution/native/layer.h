/* Steps of a decoder layer, each over a worker's share of it. */
#ifndef PACELINE_LAYER_H
#define PACELINE_LAYER_H

#include "share.h"

static void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
  vec total = splat(0);
  for (int i = 0; i < n; i += LANES) total = FMA(load(x + i), load(x + i), total);
  vec factor = splat(1.0f / sqrtf(hsum(total) / (float)n + eps));
  for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
}

/* The rows of x, normed, in the form that matrices want. */
static const Acts *normed(Worker *w, const float *weight) {
  Engine *e = w->engine;
  int hidden = e->model.hidden, rows = e->batch->rows, alone = rows <= ALONE, from = 0, to = rows;
  Acts *acts = alone ? &w->own : &e->acts;
  if (!alone) share(w, rows, 1, &from, &to);
  for (int row = from; row < to; row++) {
    rms_norm(e->x + (size_t)row * hidden, weight, hidden, e->model.eps, w->scratch);
    put_acts(acts, e->model.act_kind, hidden, row, 0, w->scratch, hidden);
  }
  if (!alone) barrier(w);
  return acts;
}

/* Ask for the start of this worker's share of the next matrix (in blocks of `block` tiles), before it waits for the others. */
static void warm_up(const Worker *w, const Matrix *next, int block) {
  int from, to;
  share(w, (next->n + BLOCK - 1) / BLOCK, block, &from, &to);
  const uint8_t *p = next->data + tile_bytes(next->kind, next->k) * from;
  for (int i = 0; i < AHEAD; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* The precision of each row for a matrix of layer l. Every worker finds it for itself, with the same bits: no barrier is due. */
static Choice choose(Worker *w, int l, int which, const Matrix *narrow, const Acts *acts) {
  const Engine *e = w->engine;
  const Batch *b = e->batch;
  const Grades *grades = e->model.layer[l].grades;
  if (!grades) return (Choice){narrow, NULL, NULL};
  for (int row = 0; row < b->rows; row++) {
    float error = rounding_error(grades->spread[which], acts, narrow->k / 32, row);
    w->is_wide[row] = error > grades->threshold[which];
    if (b->errors && w->id == 0) b->errors[((size_t)row * e->model.layers + l) * MATRICES + which] = error;
  }
  return (Choice){narrow, &grades->wide[which], w->is_wide};
}

/* out[row][feature] (+)= tiles [from, to) of a matrix times activations; out has `width` floats a row. */
static void multiply_tiles(Choice choice, const Acts *acts, int rows, float *out, int width, int add, int from, int to) {
  int n = choice.narrow->n;
  for (int tile = from; tile < to; tile++)
    for (int row = 0; row < rows; row += 8) {
      float y[8 * BLOCK];
      int m = rows - row < 8 ? rows - row : 8, lanes = n - BLOCK * tile < BLOCK ? n - BLOCK * tile : BLOCK;
      choice_rows(&choice, tile, acts, row, m, y);
      for (int r = 0; r < m; r++) {
        float *dst = out + (size_t)(row + r) * width + BLOCK * tile;
        const float *src = y + BLOCK * r;
        if (add && lanes == BLOCK)
          for (int i = 0; i < BLOCK; i += LANES) store(dst + i, load(dst + i) + load(src + i));
        else if (add)
          for (int i = 0; i < lanes; i++) dst[i] += src[i];
        else memcpy(dst, src, (size_t)lanes * 4);
      }
    }
}

static void multiply(Worker *w, Choice choice, const Acts *acts, int rows, float *out, int width, int add) {
  int from, to;
  share(w, (choice.narrow->n + BLOCK - 1) / BLOCK, 1, &from, &to);
  multiply_tiles(choice, acts, rows, out, width, add, from, to);
}

INLINE vec activate(vec gate, int gelu) {
  if (!gelu) return gate / (splat(1.0f) + vexp(-gate));
  vec inner = splat(0.7978845608f) * (gate + splat(0.044715f) * gate * gate * gate);
  vec e = vexp(inner + inner); /* tanh(u) = 1 - 2 / (exp(2u) + 1) */
  return gate * (splat(1.0f) - splat(1.0f) / (e + splat(1.0f)));
}

/* Gate and up lie in the matrix as tiles g0 g1 u0 u1 for each 32 features, so that one worker finishes a whole group. */
static void gate_up(Worker *w, Choice choice, const Acts *acts) {
  Engine *e = w->engine;
  int features = e->model.intermediate, from, to, rows = e->batch->rows;
  share(w, features / 32, 1, &from, &to);
  for (int group = from; group < to; group++)
    for (int row = 0; row < rows; row += 8) {
      float y[4][8 * BLOCK];
      float middle[32];
      int m = rows - row < 8 ? rows - row : 8;
      for (int t = 0; t < 4; t++) choice_rows(&choice, 4 * group + t, acts, row, m, y[t]);
      for (int r = 0; r < m; r++) {
        for (int i = 0; i < 32; i += LANES) {
          int tile = i / BLOCK, at = BLOCK * r + i % BLOCK;
          store(middle + i, activate(load(y[tile] + at), e->model.gelu) * load(y[2 + tile] + at));
        }
        put_acts(&e->inner, e->model.act_kind, features, row + r, 32 * group, middle, 32);
      }
    }
}

static void rotate(float *restrict low, float *restrict high, const float *restrict cosine, const float *restrict sine, int half) {
  for (int i = 0; i < half; i++) {
    float a = low[i], b = high[i];
    low[i] = a * cosine[i] - b * sine[i];
    high[i] = b * cosine[i] + a * sine[i];
  }
}

/* A head of one row, as the matrix left it: bias, norm and rotation; keys and values go to the cache. Heads are numbered queries
 * first, then keys, then values. */
static void finish_head(Worker *w, int l, int row, int head) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  const Layer *layer = m->layer + l;
  int dim = m->dim, is_query = head < m->heads, is_value = head >= m->heads + m->kv_heads;
  float *x = e->qkv + ((size_t)row * (m->heads + 2 * m->kv_heads) + head) * dim;
  Segment *s = e->batch->segment + segment_of(e->batch, row);
  size_t region = (size_t)l * m->kv_heads + (head - m->heads) % m->kv_heads;
  int slot = s->base + row - s->first_row;
  if (layer->qkv_bias)
    for (int i = 0; i < dim; i++) x[i] += layer->qkv_bias[head * dim + i];
  if (is_value) {
    write_value(s, region, dim, slot, x, m->kv_f32);
    return;
  }
  const float *norm = is_query ? layer->q_norm : layer->k_norm;
  size_t table = ((size_t)layer->rope * m->max_rows + row) * (dim / 2);
  if (norm) rms_norm(x, norm, dim, m->eps, x);
  rotate(x, x + dim / 2, e->rope_cos + table, e->rope_sin + table, dim / 2);
  if (!is_query) {
    write_key(s, region, dim, slot, x, m->kv_f32);
  } else if (!m->kv_f32) { /* in place, as the keys are kept */
    uint16_t *half = (uint16_t *)w->scratch;
    for (int i = 0; i < dim; i += LANES) store_bf16(half + i, load(x + i));
    memcpy(x, half, (size_t)dim * 2);
  }
}

/* Queries, keys and values. A worker finishes the heads that it multiplied, where it multiplies whole ones. */
static void project_heads(Worker *w, int l, Choice choice, const Acts *acts) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  int heads = m->heads + 2 * m->kv_heads, rows = e->batch->rows, from, to;
  share(w, heads, 1, &from, &to);
  if (owns_heads(e)) {
    multiply_tiles(choice, acts, rows, e->qkv, heads * m->dim, 0, from * m->dim / BLOCK, to * m->dim / BLOCK);
  } else {
    multiply(w, choice, acts, rows, e->qkv, heads * m->dim, 0);
    barrier(w);
  }
  for (int row = 0; row < rows; row++)
    for (int head = from; head < to; head++) finish_head(w, l, row, head);
}

/* x += (sandwich norm of) matrix times activations. */
static void project_back(Worker *w, Choice choice, const Acts *acts, const float *norm_out) {
  Engine *e = w->engine;
  int hidden = e->model.hidden, rows = e->batch->rows, from, to;
  if (!norm_out) {
    multiply(w, choice, acts, rows, e->x, hidden, 1);
    return;
  }
  multiply(w, choice, acts, rows, e->qkv, hidden, 0);
  barrier(w);
  share(w, rows, 1, &from, &to);
  for (int row = from; row < to; row++) {
    rms_norm(e->qkv + (size_t)row * hidden, norm_out, hidden, e->model.eps, w->scratch);
    for (int i = 0; i < hidden; i++) e->x[(size_t)row * hidden + i] += w->scratch[i];
  }
}
#endif
