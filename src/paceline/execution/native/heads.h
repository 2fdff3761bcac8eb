/* A batch's attention, shared out among the workers. */
#ifndef PACELINE_HEADS_H
#define PACELINE_HEADS_H

#include "share.h"

#define UNITS_PER_THREAD 4

/* Work of one segment: blocks of up to `queries` queries for each kv head. */
typedef struct {
  Segment *segment;
  int queries, blocks, chunks;
} Part;

static Part part_of(const Engine *e, int segment) {
  Segment *s = e->batch->segment + segment;
  int queries = s->num_rows * (e->model.heads / e->model.kv_heads); /* of one kv head, row by row */
  return (Part){s, queries, (queries + e->queries - 1) / e->queries, (s->base + s->num_rows - 1) / CHUNK + 1};
}

/* Queries of the largest block. */
static int most_queries(const Engine *e) {
  int most = 1;
  for (int i = 0; i < e->batch->segments; i++) {
    int queries = part_of(e, i).queries;
    if (queries > most) most = queries;
  }
  return most < e->queries ? most : e->queries;
}

/* Few blocks do not fill the threads evenly: then their chunks are shared out, and joined after a barrier. */
static int shares_chunks(const Engine *e) {
  int units = 0;
  for (int i = 0; i < e->batch->segments; i++) units += part_of(e, i).blocks * e->model.kv_heads;
  return !e->batch->mass && units < UNITS_PER_THREAD * e->pool.threads;
}

static AttentionSpec attention_spec(const Engine *e, int l) {
  const Model *m = &e->model;
  return (AttentionSpec){m->dim, m->layer[l].window, m->kv_f32, e->tiled, m->attention_scale, e->ancestors, e->positions};
}

static Queries queries_of(const Engine *e, const Part *p, int kv_head, int block) {
  const Model *m = &e->model;
  int group = m->heads / m->kv_heads, first = block * e->queries, width = m->heads + 2 * m->kv_heads;
  Queries b = {.count = p->queries - first < e->queries ? p->queries - first : e->queries};
  for (int i = 0; i < b.count; i++) {
    b.row_of[i] = (first + i) / group;
    b.q[i] = e->qkv + ((size_t)(p->segment->first_row + b.row_of[i]) * width + kv_head * group + (first + i) % group) * m->dim;
  }
  return b;
}

/* mass[slot] += the probability that the queries give it. `all` holds what `attend_block` found. */
static void add_mass(const Segment *s, size_t region, const AttentionSpec *a, Queries *b, const float *all, float *mass, float *scratch) {
  for (int r = 0; r < b->count; r++) b->out[r] = scratch + ATTENTION_SCRATCH + partial_size(a->dim) * (1 + r);
  for (int first = 0; first < s->base + s->num_rows; first += CHUNK) {
    attend_chunk(s, region, a, b, first, scratch);
    for (int r = 0; r < b->count; r++) {
      Span span = span_of(s, a, b->row_of[r]);
      const float *joined = all + (size_t)partial_size(a->dim) * r;
      float factor = expf(b->out[r][0] - joined[0]) / hsum(load(joined + BLOCK));
      for (int i = 0; i < CHUNK; i++)
        if (first + i >= span.start && first + i < span.end) mass[first + i] += scratch[r * CHUNK + i] * factor;
    }
  }
}

/* A whole block of queries, chunk by chunk. */
static void attend_block(Worker *w, int l, const Part *p, int kv_head, int block) {
  const Engine *e = w->engine;
  const Model *m = &e->model;
  const Segment *s = p->segment;
  AttentionSpec spec = attention_spec(e, l);
  Queries b = queries_of(e, p, kv_head, block);
  size_t region = (size_t)l * m->kv_heads + kv_head;
  int size = partial_size(m->dim), group = m->heads / m->kv_heads;
  float *next = w->scratch + ATTENTION_SCRATCH + size, *all = next + QUERIES * size;
  Span span[QUERIES];
  int from = 1 << 30, to = 0;
  for (int r = 0; r < b.count; r++) {
    span[r] = span_of(s, &spec, b.row_of[r]);
    if (span[r].start < from) from = span[r].start;
    if (span[r].end > to) to = span[r].end;
  }
  for (int first = from / CHUNK * CHUNK; first < to; first += CHUNK) {
    for (int r = 0; r < b.count; r++) b.out[r] = (span[r].start >= first ? all : next) + r * size;
    attend_chunk(s, region, &spec, &b, first, w->scratch);
    for (int r = 0; r < b.count; r++)
      if (span[r].start < first && span[r].end > first) join(all + r * size, next + r * size, m->dim);
  }
  for (int r = 0; r < b.count; r++) {
    size_t head = (size_t)kv_head * group + (block * e->queries + r) % group;
    finish(all + r * size, m->dim, e->attn + ((size_t)(s->first_row + b.row_of[r]) * m->heads + head) * m->dim);
  }
  if (e->batch->mass) add_mass(s, region, &spec, &b, all, e->batch->mass + region * (size_t)e->batch->mass_stride, w->scratch);
}

/* One chunk of a block; `unit` counts chunks of all segments. */
static void attend_unit(Worker *w, int l, const Part *p, int item, int unit) {
  const Engine *e = w->engine;
  int block = item % p->blocks, chunk = item / p->blocks % p->chunks, kv_head = item / p->blocks / p->chunks;
  AttentionSpec spec = attention_spec(e, l);
  Queries b = queries_of(e, p, kv_head, block);
  for (int r = 0; r < b.count; r++) b.out[r] = e->partials + ((size_t)unit * QUERIES + r) * partial_size(e->model.dim);
  attend_chunk(p->segment, (size_t)l * e->model.kv_heads + kv_head, &spec, &b, chunk * CHUNK, w->scratch);
}

/* Slots of a chunk that attention looks at, and what it does once for each. */
static int chunk_work(const Part *p, int chunk) {
  int end = p->segment->base + p->segment->num_rows - chunk * CHUNK;
  return 16 + (end < CHUNK ? end : CHUNK);
}

static void attention(Worker *w, int l) {
  Engine *e = w->engine;
  int split = shares_chunks(e), heads = e->model.kv_heads;
  float total = 0, before = 0;
  for (int i = 0; i < e->batch->segments; i++) {
    Part p = part_of(e, i);
    for (int chunk = 0; chunk < p.chunks; chunk++) total += (float)(chunk_work(&p, chunk) * p.blocks * heads);
  }
  float from = total * e->bound[w->id], to = total * e->bound[w->id + 1];
  for (int i = 0, unit = 0; i < e->batch->segments; i++) {
    Part p = part_of(e, i);
    int items = p.blocks * heads * (split ? p.chunks : 1), whole = 0;
    for (int chunk = 0; chunk < p.chunks; chunk++) whole += chunk_work(&p, chunk);
    for (int item = 0; item < items; item++, unit++) {
      int work = split ? chunk_work(&p, item / p.blocks % p.chunks) : whole, block = item % p.blocks;
      float middle = before + (float)work / 2;
      before += (float)work;
      int mine = middle >= from && middle < to;
      if (e->batch->mass) mine = item / p.blocks % e->pool.threads == w->id; /* one worker adds up a head's mass, in order */
      if (mine && split) attend_unit(w, l, &p, item, unit);
      else if (mine) attend_block(w, l, &p, item / p.blocks, block);
    }
  }
}

/* Join a row's chunks of one head into out [D]. */
static void join_head(Worker *w, int l, int row, int head, float *out) {
  const Engine *e = w->engine;
  const Model *m = &e->model;
  int segment = segment_of(e->batch, row), group = m->heads / m->kv_heads, size = partial_size(m->dim);
  size_t unit = 0;
  for (int i = 0; i < segment; i++) {
    Part before = part_of(e, i);
    unit += (size_t)before.blocks * m->kv_heads * before.chunks;
  }
  Part p = part_of(e, segment);
  AttentionSpec spec = attention_spec(e, l);
  Span span = span_of(p.segment, &spec, row - p.segment->first_row);
  int query = (row - p.segment->first_row) * group + head % group;
  int first = span.start / CHUNK, last = (span.end - 1) / CHUNK;
  for (int chunk = first; chunk <= last; chunk++) {
    size_t of_chunk = unit + ((size_t)(head / group) * p.chunks + chunk) * p.blocks + query / e->queries;
    const float *part = e->partials + (of_chunk * QUERIES + query % e->queries) * size;
    if (chunk == first) memcpy(w->scratch, part, (size_t)size * 4);
    else join(w->scratch, part, m->dim);
  }
  finish(w->scratch, m->dim, out);
}

/* Whether every worker joins all heads for itself. With many partial results it is better to join mainly one's own, and to meet. */
static int joins_alone(const Engine *e, int split) {
  int chunks = 0;
  for (int i = 0; split && i < e->batch->segments; i++) chunks += e->batch->segment[i].num_rows * part_of(e, i).chunks;
  return e->batch->rows <= ALONE && chunks <= 4;
}

/* Attention's result in the form that o multiplies. */
static const Acts *attended(Worker *w, int l) {
  Engine *e = w->engine;
  const Model *m = &e->model;
  int split = shares_chunks(e), alone = joins_alone(e, split), heads = m->dim % 32 ? m->heads : 1; /* that fill groups of 32 */
  int rows = e->batch->rows, width = heads * m->dim, from = 0, to = rows * (m->heads / heads);
  Acts *acts = alone ? &w->own : &e->inner;
  float *joined = w->scratch + partial_size(m->dim);
  if (!alone) share(w, to, 1, &from, &to);
  for (int i = from; i < to; i++) { /* head by head, as they were shared out */
    int row = i % rows, first = i / rows * heads, at = first * m->dim;
    const float *found = e->attn + (size_t)row * m->heads * m->dim + at;
    for (int h = 0; split && h < heads; h++) join_head(w, l, row, first + h, joined + h * m->dim);
    put_acts(acts, m->act_kind, m->heads * m->dim, row, at, split ? joined : found, width);
  }
  if (!alone) barrier(w);
  return acts;
}
#endif
