/* One forward of a Llama-like decoder on a CPU: every layer, norm, rotary embedding, cache write and attention in one call,
 * over a ragged batch of chains and trees, on a small pool of threads that meet at barriers.
 *
 * The readable reference is execution/lean.py; a test holds the two together. */
#include <math.h>
#include <stdlib.h>

#include "draw.h"
#include "heads.h"
#include "layer.h"

#define ABI_VERSION 10

static void embed(Worker *w) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  int from, to, half = m->dim / 2;
  share(w, e->batch->rows, 1, &from, &to);
  for (int row = from; row < to; row++) {
    float *x = e->x + (size_t)row * m->hidden;
    unpack_row(&m->embed, e->batch->tokens[row], x);
    for (int i = 0; i < m->hidden; i++) x[i] *= m->embed_scale;
    for (int table = 0; table < m->tables; table++)
      for (int i = 0; i < half; i++) {
        float angle = (float)e->positions[row] * m->inv_freq[table][i];
        size_t at = ((size_t)table * m->max_rows + row) * half + i;
        e->rope_cos[at] = cosf(angle) * m->rope_scale[table];
        e->rope_sin[at] = sinf(angle) * m->rope_scale[table];
      }
  }
}

static void run_layer(Worker *w, int l, int skip) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  const Layer *layer = m->layer + l;
  const Acts *acts;
  if (!(skip & 1)) {
    acts = normed(w, layer->norm_in);
    project_heads(w, l, choose(w, l, QKV, &layer->qkv, acts), acts);
    barrier(w);
    warm_up(w, &layer->o, 1);
    attention(w, l);
    barrier(w);
    acts = attended(w, l);
    project_back(w, choose(w, l, O, &layer->o, acts), acts, layer->norm_attn_out);
    warm_up(w, &layer->gate_up, 4);
    barrier(w);
  }
  if (!(skip & 2)) {
    acts = normed(w, layer->norm_mlp_in);
    gate_up(w, choose(w, l, GATE_UP, &layer->gate_up, acts), acts);
    warm_up(w, &layer->down, 1);
    barrier(w);
    project_back(w, choose(w, l, DOWN, &layer->down, &e->inner), &e->inner, layer->norm_mlp_out);
    if (l + 1 < m->layers) warm_up(w, &m->layer[l + 1].qkv, owns_heads(e) ? m->dim / BLOCK : 1);
    else warm_up(w, &m->head, 1);
    barrier(w);
  }
}

/* The largest of n values, the first of equals; its place is -1 where a value is not finite. */
static Top top_of(const float *x, int n) {
  vec top = splat(-INFINITY), sum = splat(0);
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec v = load(x + i);
    top = vmax(top, v);
    sum = sum + (v - v); /* NaN as soon as one value is not finite */
  }
  float largest = hmax(top), faulty = hsum(sum);
  for (; i < n; i++) {
    largest = x[i] > largest ? x[i] : largest;
    faulty += x[i] - x[i];
  }
  if (!(faulty == 0)) return (Top){INFINITY, -1};
  for (i = 0; i < n && x[i] != largest; i++) {}
  return (Top){largest, i};
}

/* The best token of a row, from what each worker found among its own. */
static int32_t best_of(const Engine *e, int row) {
  Top best = {-INFINITY, -1};
  for (int i = 0; i < e->pool.threads; i++) {
    const Top *top = e->worker[i].top + row;
    if (top->at < 0) return -1;
    if (i == 0 || top->value > best.value) best = *top;
  }
  return best.at;
}

/* Logits of the worker's share of the vocabulary, and the largest of them. */
static void logits_of_share(Worker *w, const Acts *acts) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  int rows = e->batch->logit_rows, from, to;
  multiply(w, (Choice){&m->head, NULL, NULL}, acts, rows, e->batch->logits, m->vocab, 0);
  share(w, (m->vocab + BLOCK - 1) / BLOCK, 1, &from, &to);
  from = BLOCK * from < m->vocab ? BLOCK * from : m->vocab;
  to = BLOCK * to < m->vocab ? BLOCK * to : m->vocab;
  for (int row = 0; row < rows; row++) {
    float *x = e->batch->logits + (size_t)row * m->vocab;
    if (m->logit_cap > 0)
      for (int i = from; i < to; i++) x[i] = m->logit_cap * tanhf(x[i] / m->logit_cap);
    w->top[row] = top_of(x + from, to - from);
    if (w->top[row].at >= 0) w->top[row].at += from;
  }
}

static void logits(Worker *w) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  Batch *b = e->batch;
  int from, to, alone = b->logit_rows <= ALONE;
  Acts *acts = alone ? &w->own : &e->acts;
  share(w, b->logit_rows, 1, &from, &to);
  for (int i = alone ? 0 : from; i < (alone ? b->logit_rows : to); i++) {
    rms_norm(e->x + (size_t)(b->logit_row ? b->logit_row[i] : i) * m->hidden, m->final_norm, m->hidden, m->eps, w->scratch);
    if (b->hidden && i >= from && i < to) memcpy(b->hidden + (size_t)i * m->hidden, w->scratch, (size_t)m->hidden * 4);
    put_acts(acts, m->act_kind, m->hidden, i, 0, w->scratch, m->hidden);
  }
  if (!alone) barrier(w);
  logits_of_share(w, acts);
  barrier(w);
  for (int i = 0; w->id == 0 && i < b->logit_rows; i++) b->best[i] = best_of(e, i);
}

/* Hand out the rows that enter layer l. */
static void tap(Worker *w, int l) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  Batch *b = e->batch;
  for (int t = 0; t < b->num_taps; t++) {
    if (b->tap_layer[t] != l) continue;
    int from, to;
    share(w, b->rows, 1, &from, &to);
    for (int row = from; row < to; row++) {
      const float *x = e->x + (size_t)row * m->hidden;
      float *out = b->taps + ((size_t)row * b->num_taps + t) * m->hidden;
      if (l == m->layers) rms_norm(x, m->final_norm, m->hidden, m->eps, out);
      else memcpy(out, x, (size_t)m->hidden * 4);
    }
  }
}

static void run(Worker *w) {
  Engine *e = w->engine;
  uint64_t started = ticks();
  w->waited = 0;
  if (e->tiled) open_tiles(most_queries(e));
  embed(w);
  barrier(w);
  for (int l = 0; l < e->batch->run_layers; l++) {
    tap(w, l);
    run_layer(w, l, e->batch->skip ? e->batch->skip[l] : 0);
  }
  tap(w, e->batch->run_layers);
  if (e->batch->logit_rows) logits(w);
  if (e->tiled) close_tiles();
  w->busy = ticks() - started - w->waited;
  barrier(w);
}

static void *worker_main(void *arg) {
  Worker *w = arg;
  Engine *e = w->engine;
  for (int seen = 0;;) {
    await(&e->pool, &e->pool.job, seen, 4000, 6000); /* the caller samples and drafts for up to a millisecond or two; another model's threads may need the core */
    seen = atomic_load(&e->pool.job);
    if (e->pool.stop) return NULL;
    run(w);
  }
}

/* ---------- entry points ---------- */

static void *floats(size_t n) {
  void *p = NULL;
  return posix_memalign(&p, 64, n * 4 + 4096) ? NULL : p;
}

int paceline_abi(void) { return ABI_VERSION; }
int paceline_lanes(void) { return LANES; }
int paceline_tiled(const Engine *e) { return e->tiled; }
size_t paceline_tile_bytes(int kind, int k) { return tile_bytes(kind, k); }

static void open_acts(Acts *a, const Model *m, size_t values) {
  if (m->act_kind == FP32 || (m->act_kind == BF16 && !HAVE_PAIRS)) a->x = floats(values);
  else if (m->act_kind == BF16) a->half = floats(values / 2);
  else {
    a->q = floats(values / 4);
    a->scale = floats(values / 32);
    a->sum = floats(values / 32);
    a->isum = floats(values / 32);
    if (m->graded) a->energy = floats(values / 32);
  }
}

static void close_acts(const Acts *a) {
  void *owned[] = {a->x, a->half, a->q, a->scale, a->sum, a->isum, a->energy};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

Engine *paceline_open(const Model *model, int threads, int max_slots) {
  Engine *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  const Model *m = &e->model;
  e->model = *model;
  e->pool.threads = threads;
  e->tiled = !m->kv_f32 && m->dim % TILE_INPUTS == 0 && m->dim <= WIDEST_TILED && allow_tiles();
  e->queries = e->tiled ? QUERIES : VECTOR_QUERIES;
  int qkv = (m->heads + 2 * m->kv_heads) * m->dim, widest = m->heads * m->dim;
  if (m->intermediate > widest) widest = m->intermediate;
  if (m->hidden > widest) widest = m->hidden;
  if (m->hidden > qkv) qkv = m->hidden;
  size_t rows = (size_t)m->max_rows, tables = rows * m->tables * (m->dim / 2);
  size_t chunks = (size_t)(max_slots + MAX_TREE) / CHUNK + 2;
  e->positions = (int32_t *)floats(rows);
  e->ancestors = (uint64_t *)floats(2 * rows);
  e->x = floats(rows * m->hidden);
  e->qkv = floats(rows * qkv);
  e->attn = floats(rows * m->heads * m->dim);
  e->rope_cos = floats(tables);
  e->rope_sin = floats(tables);
  e->partials = floats(chunks * UNITS_PER_THREAD * threads * QUERIES * partial_size(m->dim));
  open_acts(&e->acts, m, rows * widest);
  open_acts(&e->inner, m, rows * widest);
  e->bound = e->bounds = floats(2 * ((size_t)threads + 1));
  for (int i = 0; i <= threads; i++) e->bounds[i] = e->bounds[threads + 1 + i] = (float)i / (float)threads;
  e->thread = calloc((size_t)threads, sizeof *e->thread);
  e->worker = calloc((size_t)threads, sizeof *e->worker);
  pthread_mutex_init(&e->pool.lock, NULL);
  pthread_cond_init(&e->pool.wake, NULL);
  for (int i = 0; i < threads; i++) {
    size_t scratch = ATTENTION_SCRATCH + (2 * QUERIES + 1) * (size_t)partial_size(m->dim);
    if ((size_t)widest + partial_size(m->dim) > scratch) scratch = (size_t)widest + partial_size(m->dim);
    e->worker[i] = (Worker){e, i, floats(scratch), calloc(rows, 1), calloc(rows, sizeof(Top)), .busy = 0};
    open_acts(&e->worker[i].own, m, (size_t)ALONE * widest);
    if (i) pthread_create(&e->thread[i], NULL, worker_main, &e->worker[i]);
  }
  return e;
}

/* Where the rows of the batch stand: behind their parents. */
static void place_rows(Engine *e) {
  const Batch *b = e->batch;
  for (int i = 0; i < b->segments; i++) {
    const Segment *s = b->segment + i;
    int32_t *position = e->positions + s->first_row;
    uint64_t *ancestors = e->ancestors + s->first_row;
    for (int row = 0; row < s->num_rows; row++) {
      int parent = s->is_tree ? b->parents[s->first_row + row] : row - 1;
      position[row] = parent < 0 ? s->base + s->shift : position[parent] + 1;
      if (s->is_tree) ancestors[row] = (parent < 0 ? 0 : ancestors[parent]) | (uint64_t)1 << row;
    }
  }
}

void paceline_forward(Engine *e, Batch *batch) {
  e->batch = batch;
  place_rows(e);
  balance(e);
  e->bound = e->bounds + (batch->rows > ALONE ? e->pool.threads + 1 : 0);
  announce(&e->pool, &e->pool.job);
  run(&e->worker[0]);
}

size_t paceline_draw_bytes(int vocab) { return draw_bytes(vocab); }

int paceline_draw(const float *logits, const Law *law, uint64_t number, void *work, Drawn *drawn) {
  return draw(logits, law, number, work, drawn);
}

double paceline_mass(const float *logits, const Law *law, const Drawn *drawn, const int32_t *tokens, int count) {
  return mass_of(logits, law, drawn, tokens, count);
}

/* Move one slot of a region. size: bytes of a number. */
INLINE void move_in_region(uint8_t *keys, uint8_t *values, int dim, int from, int to, const int f32, const size_t size) {
  for (int i = 0; i < dim; i++) {
    memcpy(keys + key_at(dim, to, i, f32) * size, keys + key_at(dim, from, i, f32) * size, size);
    memcpy(values + value_at(dim, to, i, f32) * size, values + value_at(dim, from, i, f32) * size, size);
  }
}

/* Move slot `from` to slot `to` in every region (to compact the accepted path of a tree). */
void paceline_move_slot(const Engine *e, Segment *s, int from, int to) {
  const Model *m = &e->model;
  for (size_t region = 0; region < (size_t)m->layers * m->kv_heads; region++) {
    size_t at = region * (size_t)s->capacity * m->dim;
    if (m->kv_f32) move_in_region(s->keys + 4 * at, s->values + 4 * at, m->dim, from, to, 1, 4);
    else move_in_region(s->keys + 2 * at, s->values + 2 * at, m->dim, from, to, 0, 2);
  }
}

void paceline_close(Engine *e) {
  e->pool.stop = 1;
  announce(&e->pool, &e->pool.job);
  for (int i = 1; i < e->pool.threads; i++) pthread_join(e->thread[i], NULL);
  for (int i = 0; i < e->pool.threads; i++) {
    free(e->worker[i].scratch);
    free(e->worker[i].is_wide);
    free(e->worker[i].top);
    close_acts(&e->worker[i].own);
  }
  close_acts(&e->acts);
  close_acts(&e->inner);
  void *owned[] = {e->positions, e->ancestors, e->x, e->qkv, e->attn, e->rope_cos, e->rope_sin, e->partials, e->bounds, e->thread,
                   e->worker};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
  free(e);
}
