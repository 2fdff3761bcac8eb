/* One forward of a Llama-like decoder on a CPU: every layer, norm, rotary embedding, cache write and attention in one call,
 * over a ragged batch of chains and trees, on a small pool of threads that meet at barriers.
 *
 * The readable reference is execution/lean.py; a test holds the two together. Structs mirror execution/native/binding.py. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "attention.h"
#include "grades.h"

#define ABI_VERSION 5

typedef struct {
  Matrix qkv, o, gate_up, down;
  const float *norm_in, *norm_attn_out, *norm_mlp_in, *norm_mlp_out; /* the two *_out are NULL without sandwich norms */
  const float *qkv_bias, *q_norm, *k_norm;                           /* NULL where absent */
  int32_t window;                                                    /* 0: full attention */
  int32_t rope;                                                      /* which rotary table */
  const Grades *grades;                                              /* a second precision, chosen row by row; or NULL */
} Layer;

typedef struct {
  int32_t layers, hidden, heads, kv_heads, dim, intermediate, vocab, act_kind; /* act_kind: form of activations */
  int32_t gelu, kv_f32, max_rows, tables, graded; /* graded: whether layers may have `grades` */
  float eps, attention_scale, embed_scale, logit_cap;
  Matrix embed, head;
  const Layer *layer;
  const float *final_norm;
  const float *inv_freq[2];
  float rope_scale[2];
} Model;

typedef struct {
  int32_t rows, segments, logit_rows, run_layers; /* run_layers: leave after this many layers (early exit) */
  const int32_t *tokens, *positions;
  const uint64_t *ancestors;
  Segment *segment;
  const int32_t *logit_row; /* [logit_rows] */
  float *logits;            /* [logit_rows][vocab] */
  float *hidden;            /* [logit_rows][hidden] after the final norm, or NULL */
  int32_t *best;            /* [logit_rows] most probable token, the lowest of equals; -1 where a logit is not finite */
  const uint8_t *skip;      /* [layers] bit 0: skip attention, bit 1: skip the MLP; or NULL */
  float *mass;              /* [layers * kv heads][mass_stride]: attention of a chain's rows is added here; or NULL */
  const int32_t *tap_layer; /* [num_taps] layers whose entering states are handed out; `layers`: the last state, normed */
  float *taps;              /* [rows][num_taps][hidden] */
  int32_t mass_stride, num_taps;
  float *errors;            /* [rows][layers][MATRICES] estimated rounding errors of graded layers; or NULL */
} Batch;

typedef struct Engine Engine;
typedef struct {
  Engine *engine;
  int id;
  float *scratch;
  int stride;
  uint8_t *is_wide; /* [max_rows] of its latest choice */
} Worker;

struct Engine {
  Model model;
  Batch *batch;
  int threads, stop;
  pthread_t *thread;
  Worker *worker;
  atomic_int arrived, phase, job, sleeping;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  float *x, *qkv, *attn, *mid, *rope_cos, *rope_sin; /* [rows][...] work space */
  Acts acts;                                         /* form of `x` or of the MLP's middle, by phase */
};

/* ---------- threads ---------- */

/* Wait until *word differs from `old`: spin, then offer the core to others, then sleep.
 *
 * Offering comes before sleeping because two threads that wake each other in turn stay on one core for seconds: the scheduler
 * sees one of them runnable at a time. Two runnable ones it moves apart. */
static void await(Engine *e, atomic_int *word, int old, int spins, int offers) {
  for (int i = 0; i < spins + offers; i++) {
    if (atomic_load(word) != old) return;
    if (i >= spins) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
  }
  pthread_mutex_lock(&e->lock);
  atomic_fetch_add(&e->sleeping, 1);
  while (atomic_load(word) == old) pthread_cond_wait(&e->wake, &e->lock);
  atomic_fetch_sub(&e->sleeping, 1);
  pthread_mutex_unlock(&e->lock);
}

/* Advance *word and wake whoever sleeps on it. A waiter counts itself before it looks again, so none is missed. */
static void announce(Engine *e, atomic_int *word) {
  atomic_fetch_add(word, 1);
  if (!atomic_load(&e->sleeping)) return;
  pthread_mutex_lock(&e->lock);
  pthread_cond_broadcast(&e->wake);
  pthread_mutex_unlock(&e->lock);
}

static void barrier(Engine *e) {
  if (e->threads == 1) return;
  int phase = atomic_load(&e->phase);
  if (atomic_fetch_add(&e->arrived, 1) == e->threads - 1) {
    atomic_store(&e->arrived, 0);
    announce(e, &e->phase);
  } else {
    await(e, &e->phase, phase, 2000, 20000);
  }
}

/* The worker's share of n items, as even as it gets, in blocks of `block`. */
INLINE void share(const Worker *w, int n, int block, int *from, int *to) {
  int blocks = (n + block - 1) / block, t = w->engine->threads;
  *from = blocks * w->id / t * block;
  *to = blocks * (w->id + 1) / t * block;
  if (*to > n) *to = n;
}

/* ---------- pieces of a layer ---------- */

static void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
  v16 total = splat(0);
  for (int i = 0; i < n; i += 16) total = FMA(load16(x + i), load16(x + i), total);
  v16 factor = splat(1.0f / sqrtf(hsum(total) / (float)n + eps));
  for (int i = 0; i < n; i += 16) store16(out + i, load16(x + i) * factor * load16(weight + i));
}

static void norm_rows(Worker *w, const float *weight) {
  Engine *e = w->engine;
  int hidden = e->model.hidden, from, to;
  share(w, e->batch->rows, 1, &from, &to);
  for (int row = from; row < to; row++) {
    rms_norm(e->x + (size_t)row * hidden, weight, hidden, e->model.eps, w->scratch);
    put_acts(&e->acts, e->model.act_kind, hidden, row, 0, w->scratch, hidden);
  }
}

/* Ask for the start of this worker's share of the next matrix (in blocks of `block` tiles), before it waits for the others. */
static void warm_up(const Worker *w, const Matrix *next, int block) {
  int from, to;
  share(w, (next->n + 15) / 16, block, &from, &to);
  const uint8_t *p = next->data + tile_bytes(next->kind, next->k) * from;
  for (int i = 0; i < AHEAD; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* The precision of each row for a matrix of layer l. Every worker finds it for itself, with the same bits: no barrier is due. */
static Choice choose(Worker *w, int l, int which, const Matrix *narrow) {
  const Engine *e = w->engine;
  const Batch *b = e->batch;
  const Grades *grades = e->model.layer[l].grades;
  if (!grades) return (Choice){narrow, NULL, NULL};
  for (int row = 0; row < b->rows; row++) {
    float error = rounding_error(grades->spread[which], &e->acts, narrow->k / 32, row);
    w->is_wide[row] = error > grades->threshold[which];
    if (b->errors && w->id == 0) b->errors[((size_t)row * e->model.layers + l) * MATRICES + which] = error;
  }
  return (Choice){narrow, &grades->wide[which], w->is_wide};
}

/* out[row][feature] (+)= matrix times activations; out has `width` floats a row, of which the matrix writes the first n. */
static void multiply(Worker *w, Choice choice, int rows, float *out, int width, int add) {
  int n = choice.narrow->n, from, to;
  share(w, (n + 15) / 16, 1, &from, &to);
  for (int tile = from; tile < to; tile++)
    for (int row = 0; row < rows; row += 8) {
      v16 y[8];
      int m = rows - row < 8 ? rows - row : 8, lanes = n - 16 * tile;
      choice_rows(&choice, tile, &w->engine->acts, row, m, y);
      for (int r = 0; r < m; r++) {
        float *dst = out + (size_t)(row + r) * width + 16 * tile;
        if (lanes < 16)
          for (int i = 0; i < lanes; i++) dst[i] = (add ? dst[i] : 0.0f) + y[r][i];
        else if (add) store16(dst, load16(dst) + y[r]);
        else store16(dst, y[r]);
      }
    }
}

INLINE v16 activate(v16 gate, int gelu) {
  if (!gelu) return gate / (splat(1.0f) + vexp(-gate));
  v16 inner = splat(0.7978845608f) * (gate + splat(0.044715f) * gate * gate * gate);
  v16 e = vexp(inner + inner); /* tanh(u) = 1 - 2 / (exp(2u) + 1) */
  return gate * (splat(1.0f) - splat(1.0f) / (e + splat(1.0f)));
}

/* Gate and up lie in the matrix as tiles g0 g1 u0 u1 for each 32 features, so that one worker finishes a whole group. */
static void gate_up(Worker *w, Choice choice) {
  Engine *e = w->engine;
  int features = e->model.intermediate, from, to, rows = e->batch->rows;
  share(w, features / 32, 1, &from, &to);
  for (int group = from; group < to; group++)
    for (int row = 0; row < rows; row += 8) {
      v16 y[4][8];
      float middle[32];
      int m = rows - row < 8 ? rows - row : 8;
      for (int t = 0; t < 4; t++) choice_rows(&choice, 4 * group + t, &e->acts, row, m, y[t]);
      for (int r = 0; r < m; r++) {
        store16(middle, activate(y[0][r], e->model.gelu) * y[2][r]);
        store16(middle + 16, activate(y[1][r], e->model.gelu) * y[3][r]);
        memcpy(e->mid + (size_t)(row + r) * features + 32 * group, middle, sizeof middle);
      }
    }
}

static void rotate(float *x, const float *cosine, const float *sine, int dim) {
  int half = dim / 2;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

static int segment_of(const Batch *b, int row) {
  int s = 0;
  while (row >= b->segment[s].first_row + b->segment[s].num_rows) s++;
  return s;
}

static void rope_and_cache(Worker *w, int l) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  const Layer *layer = m->layer + l;
  int dim = m->dim, heads = m->heads + 2 * m->kv_heads, from, to;
  share(w, e->batch->rows * (m->heads + m->kv_heads), 1, &from, &to);
  for (int item = from; item < to; item++) {
    int row = item / (m->heads + m->kv_heads), head = item % (m->heads + m->kv_heads), is_key = head >= m->heads;
    float *x = e->qkv + ((size_t)row * heads + head) * dim;
    const float *norm = is_key ? layer->k_norm : layer->q_norm;
    size_t table = ((size_t)layer->rope * m->max_rows + row) * (dim / 2);
    if (layer->qkv_bias)
      for (int i = 0; i < dim; i++) x[i] += layer->qkv_bias[head * dim + i];
    if (norm) rms_norm(x, norm, dim, m->eps, x);
    rotate(x, e->rope_cos + table, e->rope_sin + table, dim);
    if (!is_key) continue;
    float *value = x + (size_t)m->kv_heads * dim;
    if (layer->qkv_bias)
      for (int i = 0; i < dim; i++) value[i] += layer->qkv_bias[(head + m->kv_heads) * dim + i];
    Segment *s = e->batch->segment + segment_of(e->batch, row);
    size_t region = (size_t)l * m->kv_heads + (head - m->heads);
    write_kv(s, region, dim, s->base + row - s->first_row, x, value, m->kv_f32);
  }
}

static void attention(Worker *w, int l) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  Batch *b = e->batch;
  AttentionSpec spec = {m->dim, m->layer[l].window, m->attention_scale, b->ancestors, b->positions, b->mass, b->mass_stride};
  int width = m->heads + 2 * m->kv_heads, group = m->heads / m->kv_heads, from, to;
  for (int si = 0; si < b->segments; si++) {
    Segment *s = b->segment + si;
    int queries = s->num_rows * group; /* of one kv head, row by row: they share its keys and values */
    share(w, (queries + 3) / 4 * m->kv_heads, 1, &from, &to);
    if (b->mass) from = 0, to = (queries + 3) / 4 * m->kv_heads;
    for (int item = from; item < to; item++) {
      int kv_head = item % m->kv_heads, first = item / m->kv_heads * 4;
      if (b->mass && kv_head % e->threads != w->id) continue; /* one worker adds up a head's mass, in order */
      int count = queries - first < 4 ? queries - first : 4, row_of[4];
      const float *q[4];
      float *out[4];
      for (int i = 0; i < count; i++) {
        row_of[i] = (first + i) / group;
        size_t row = (size_t)s->first_row + row_of[i], head = (size_t)kv_head * group + (first + i) % group;
        q[i] = e->qkv + (row * width + head) * m->dim;
        out[i] = e->attn + (row * m->heads + head) * m->dim;
      }
      attend(s, (size_t)l * m->kv_heads + kv_head, &spec, q, out, row_of, count, m->kv_f32, w->scratch, w->stride);
    }
  }
}

/* Put rows [rows][k] into matrix form; a barrier before and after makes them common property. */
static void form_rows(Worker *w, const float *src, int k) {
  int from, to;
  share(w, w->engine->batch->rows * (k / 32), 1, &from, &to);
  for (int g = from; g < to; g++) {
    int row = g / (k / 32), at = g % (k / 32) * 32;
    put_acts(&w->engine->acts, w->engine->model.act_kind, k, row, at, src + (size_t)row * k + at, 32);
  }
}

/* x += (sandwich norm of) matrix times activations. */
static void project_back(Worker *w, Choice choice, const float *norm_out) {
  Engine *e = w->engine;
  int hidden = e->model.hidden, rows = e->batch->rows, from, to;
  if (!norm_out) {
    multiply(w, choice, rows, e->x, hidden, 1);
    return;
  }
  multiply(w, choice, rows, e->qkv, hidden, 0);
  barrier(e);
  share(w, rows, 1, &from, &to);
  for (int row = from; row < to; row++) {
    rms_norm(e->qkv + (size_t)row * hidden, norm_out, hidden, e->model.eps, w->scratch);
    for (int i = 0; i < hidden; i++) e->x[(size_t)row * hidden + i] += w->scratch[i];
  }
}

/* ---------- the forward ---------- */

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
    barrier(e);
    multiply(w, choose(w, l, QKV, &layer->qkv), rows, e->qkv, (m->heads + 2 * m->kv_heads) * m->dim, 0);
    barrier(e);
    rope_and_cache(w, l);
    barrier(e);
    warm_up(w, &layer->o, 1);
    attention(w, l);
    barrier(e);
    form_rows(w, e->attn, m->heads * m->dim);
    barrier(e);
    project_back(w, choose(w, l, O, &layer->o), layer->norm_attn_out);
    warm_up(w, &layer->gate_up, 4);
    barrier(e);
  }
  if (!(skip & 2)) {
    norm_rows(w, layer->norm_mlp_in);
    barrier(e);
    gate_up(w, choose(w, l, GATE_UP, &layer->gate_up));
    warm_up(w, &layer->down, 1);
    barrier(e);
    form_rows(w, e->mid, m->intermediate);
    barrier(e);
    project_back(w, choose(w, l, DOWN, &layer->down), layer->norm_mlp_out);
    warm_up(w, l + 1 < m->layers ? &m->layer[l + 1].qkv : &m->head, 1);
    barrier(e);
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
  barrier(e);
  multiply(w, (Choice){&m->head, NULL, NULL}, b->logit_rows, b->logits, m->vocab, 0);
  if (m->logit_cap > 0) {
    barrier(e);
    share(w, b->logit_rows * m->vocab, 16, &from, &to);
    for (int i = from; i < to; i++) b->logits[i] = m->logit_cap * tanhf(b->logits[i] / m->logit_cap);
  }
  barrier(e);
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
  barrier(e);
  for (int l = 0; l < e->batch->run_layers; l++) {
    tap(w, l);
    run_layer(w, l, e->batch->skip ? e->batch->skip[l] : 0);
  }
  tap(w, e->batch->run_layers);
  if (e->batch->logit_rows) logits(w);
  barrier(e);
}

static void *worker_main(void *arg) {
  Worker *w = arg;
  Engine *e = w->engine;
  for (int seen = 0;;) {
    await(e, &e->job, seen, 4000, 6000); /* the caller samples and drafts for up to a millisecond or two; another model's threads may need the core */
    seen = atomic_load(&e->job);
    if (e->stop) return NULL;
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

Engine *paceline_open(const Model *model, int threads, int max_slots) {
  Engine *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  const Model *m = &e->model;
  e->model = *model;
  e->threads = threads;
  int qkv = (m->heads + 2 * m->kv_heads) * m->dim, widest = m->heads * m->dim;
  if (m->intermediate > widest) widest = m->intermediate;
  if (m->hidden > widest) widest = m->hidden;
  if (m->hidden > qkv) qkv = m->hidden;
  size_t rows = (size_t)m->max_rows, tables = rows * m->tables * (m->dim / 2);
  e->x = floats(rows * m->hidden);
  e->qkv = floats(rows * qkv);
  e->attn = floats(rows * m->heads * m->dim);
  e->mid = floats(rows * m->intermediate);
  e->rope_cos = floats(tables);
  e->rope_sin = floats(tables);
  e->acts.x = e->acts.scale = NULL;
  if (m->act_kind == FP32) e->acts.x = floats(rows * widest);
  else if (m->act_kind == BF16) e->acts.half = floats(rows * widest / 2);
  else {
    e->acts.q = floats(rows * widest / 4);
    e->acts.scale = floats(rows * widest / 32);
    e->acts.sum = floats(rows * widest / 32);
    e->acts.isum = floats(rows * widest / 32);
    if (m->graded) e->acts.energy = floats(rows * widest / 32);
  }
  e->thread = calloc((size_t)threads, sizeof *e->thread);
  e->worker = calloc((size_t)threads, sizeof *e->worker);
  pthread_mutex_init(&e->lock, NULL);
  pthread_cond_init(&e->wake, NULL);
  for (int i = 0; i < threads; i++) {
    int stride = max_slots + 128;
    size_t scratch = (size_t)stride * 4;
    e->worker[i] = (Worker){e, i, floats(scratch > (size_t)widest ? scratch : (size_t)widest), stride, calloc(rows, 1)};
    if (i) pthread_create(&e->thread[i], NULL, worker_main, &e->worker[i]);
  }
  return e;
}

void paceline_forward(Engine *e, Batch *batch) {
  e->batch = batch;
  announce(e, &e->job);
  run(&e->worker[0]);
}

/* Move slot `from` to slot `to` in every region (to compact the accepted path of a tree). */
void paceline_move_slot(const Engine *e, Segment *s, int from, int to) {
  const Model *m = &e->model;
  size_t size = m->kv_f32 ? 4 : 2, dim = (size_t)m->dim;
  for (size_t region = 0; region < (size_t)m->layers * m->kv_heads; region++) {
    size_t at = region * (size_t)s->capacity * dim;
    uint8_t *k = s->keys + at * size, *v = s->values + at * size;
    memcpy(v + (size_t)to * dim * size, v + (size_t)from * dim * size, dim * size);
    for (size_t d = 0; d < dim; d++)
      memcpy(k + (((size_t)(to / 16) * dim + d) * 16 + to % 16) * size, k + (((size_t)(from / 16) * dim + d) * 16 + from % 16) * size,
             size);
  }
}

void paceline_close(Engine *e) {
  e->stop = 1;
  announce(e, &e->job);
  for (int i = 1; i < e->threads; i++) pthread_join(e->thread[i], NULL);
  for (int i = 0; i < e->threads; i++) {
    free(e->worker[i].scratch);
    free(e->worker[i].is_wide);
  }
  void *owned[] = {e->x, e->qkv, e->attn, e->mid, e->rope_cos, e->rope_sin, e->acts.x, e->acts.half, e->acts.q,
                   e->acts.scale, e->acts.sum, e->acts.isum, e->acts.energy, e->thread, e->worker};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
  free(e);
}
