/* One forward of a Llama-like decoder on a CPU: every layer, norm, rotary embedding, cache write and attention in one call,
 * over a ragged batch of chains and trees, on a small pool of threads that meet at barriers.
 *
 * The readable reference is execution/lean.py; a test holds the two together. */
#include <math.h>
#include <stdlib.h>

#include "heads.h"
#include "layer.h"

#define ABI_VERSION 6

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
        float angle = (float)e->batch->positions[row] * m->inv_freq[table][i];
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
  int rows = e->batch->rows;
  if (!(skip & 1)) {
    norm_rows(w, layer->norm_in);
    barrier(&e->pool);
    multiply(w, choose(w, l, QKV, &layer->qkv, &e->acts), &e->acts, rows, e->qkv, (m->heads + 2 * m->kv_heads) * m->dim, 0);
    barrier(&e->pool);
    rope_and_cache(w, l);
    barrier(&e->pool);
    warm_up(w, &layer->o, 1);
    attention(w, l);
    barrier(&e->pool);
    finish_attention(w, l);
    barrier(&e->pool);
    project_back(w, choose(w, l, O, &layer->o, &e->inner), layer->norm_attn_out);
    warm_up(w, &layer->gate_up, 4);
    barrier(&e->pool);
  }
  if (!(skip & 2)) {
    norm_rows(w, layer->norm_mlp_in);
    barrier(&e->pool);
    gate_up(w, choose(w, l, GATE_UP, &layer->gate_up, &e->acts));
    warm_up(w, &layer->down, 1);
    barrier(&e->pool);
    project_back(w, choose(w, l, DOWN, &layer->down, &e->inner), layer->norm_mlp_out);
    warm_up(w, l + 1 < m->layers ? &m->layer[l + 1].qkv : &m->head, 1);
    barrier(&e->pool);
  }
}

static int32_t best_of(const float *x, int n) {
  v16 top = splat(-INFINITY), sum = splat(0);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    v16 v = load16(x + i);
    top = vmax(top, v);
    sum = sum + (v - v); /* NaN as soon as one value is not finite */
  }
  float largest = hmax(top), faulty = hsum(sum);
  for (; i < n; i++) {
    largest = x[i] > largest ? x[i] : largest;
    faulty += x[i] - x[i];
  }
  if (!(faulty == 0)) return -1;
  for (i = 0; x[i] != largest; i++) {}
  return i;
}

static void logits(Worker *w) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  Batch *b = e->batch;
  int from, to;
  share(w, b->logit_rows, 1, &from, &to);
  for (int i = from; i < to; i++) {
    rms_norm(e->x + (size_t)b->logit_row[i] * m->hidden, m->final_norm, m->hidden, m->eps, w->scratch);
    if (b->hidden) memcpy(b->hidden + (size_t)i * m->hidden, w->scratch, (size_t)m->hidden * 4);
    put_acts(&e->acts, m->act_kind, m->hidden, i, 0, w->scratch, m->hidden);
  }
  barrier(&e->pool);
  multiply(w, (Choice){&m->head, NULL, NULL}, &e->acts, b->logit_rows, b->logits, m->vocab, 0);
  if (m->logit_cap > 0) {
    barrier(&e->pool);
    share(w, b->logit_rows * m->vocab, 16, &from, &to);
    for (int i = from; i < to; i++) b->logits[i] = m->logit_cap * tanhf(b->logits[i] / m->logit_cap);
  }
  barrier(&e->pool);
  share(w, b->logit_rows, 1, &from, &to);
  for (int i = from; i < to; i++) b->best[i] = best_of(b->logits + (size_t)i * m->vocab, m->vocab);
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
  embed(w);
  barrier(&e->pool);
  for (int l = 0; l < e->batch->run_layers; l++) {
    tap(w, l);
    run_layer(w, l, e->batch->skip ? e->batch->skip[l] : 0);
  }
  tap(w, e->batch->run_layers);
  if (e->batch->logit_rows) logits(w);
  barrier(&e->pool);
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
int paceline_avx512(void) { return HAVE_AVX512; }
size_t paceline_tile_bytes(int kind, int k) { return tile_bytes(kind, k); }

static void open_acts(Acts *a, const Model *m, size_t values) {
  if (m->act_kind == FP32) a->x = floats(values);
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
  int qkv = (m->heads + 2 * m->kv_heads) * m->dim, widest = m->heads * m->dim;
  if (m->intermediate > widest) widest = m->intermediate;
  if (m->hidden > widest) widest = m->hidden;
  if (m->hidden > qkv) qkv = m->hidden;
  size_t rows = (size_t)m->max_rows, tables = rows * m->tables * (m->dim / 2);
  size_t chunks = (size_t)(max_slots + MAX_TREE) / CHUNK + 2;
  e->x = floats(rows * m->hidden);
  e->qkv = floats(rows * qkv);
  e->attn = floats(rows * m->heads * m->dim);
  e->rope_cos = floats(tables);
  e->rope_sin = floats(tables);
  e->partials = floats(chunks * UNITS_PER_THREAD * threads * QUERIES * partial_size(m->dim));
  open_acts(&e->acts, m, rows * widest);
  open_acts(&e->inner, m, rows * widest);
  e->thread = calloc((size_t)threads, sizeof *e->thread);
  e->worker = calloc((size_t)threads, sizeof *e->worker);
  pthread_mutex_init(&e->pool.lock, NULL);
  pthread_cond_init(&e->pool.wake, NULL);
  for (int i = 0; i < threads; i++) {
    size_t scratch = ATTENTION_SCRATCH + (2 * QUERIES + 1) * (size_t)partial_size(m->dim);
    e->worker[i] = (Worker){e, i, floats(scratch > (size_t)widest ? scratch : (size_t)widest), calloc(rows, 1)};
    if (i) pthread_create(&e->thread[i], NULL, worker_main, &e->worker[i]);
  }
  return e;
}

void paceline_forward(Engine *e, Batch *batch) {
  e->batch = batch;
  announce(&e->pool, &e->pool.job);
  run(&e->worker[0]);
}

/* Move slot `from` to slot `to` in every region (to compact the accepted path of a tree). */
void paceline_move_slot(const Engine *e, Segment *s, int from, int to) {
  const Model *m = &e->model;
  size_t size = m->kv_f32 ? 4 : 2;
  for (size_t region = 0; region < (size_t)m->layers * m->kv_heads; region++) {
    size_t at = region * (size_t)s->capacity * m->dim;
    for (int i = 0; i < m->dim; i++) {
      memcpy(s->keys + (at + key_at(m->dim, to, i, m->kv_f32)) * size, s->keys + (at + key_at(m->dim, from, i, m->kv_f32)) * size, size);
      memcpy(s->values + (at + value_at(m->dim, to, i, m->kv_f32)) * size,
             s->values + (at + value_at(m->dim, from, i, m->kv_f32)) * size, size);
    }
  }
}

void paceline_close(Engine *e) {
  e->pool.stop = 1;
  announce(&e->pool, &e->pool.job);
  for (int i = 1; i < e->pool.threads; i++) pthread_join(e->thread[i], NULL);
  for (int i = 0; i < e->pool.threads; i++) {
    free(e->worker[i].scratch);
    free(e->worker[i].is_wide);
  }
  close_acts(&e->acts);
  close_acts(&e->inner);
  void *owned[] = {e->x, e->qkv, e->attn, e->rope_cos, e->rope_sin, e->partials, e->thread, e->worker};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
  free(e);
}
