/* Who does what: each worker's share of a step. No result depends on it. */
#ifndef PACELINE_SHARE_H
#define PACELINE_SHARE_H

#include <math.h>

#include "model.h"

/* Wait for all workers. */
static void barrier(Worker *w) {
  uint64_t before = ticks();
  meet(&w->engine->pool);
  w->waited += ticks() - before;
}

/* The worker's share of n items, in blocks of `block`. */
INLINE void share(const Worker *w, int n, int block, int *from, int *to) {
  int blocks = (n + block - 1) / block;
  const float *bound = w->engine->bound + w->id;
  *from = (int)ceilf((float)blocks * bound[0]) * block;
  *to = (int)ceilf((float)blocks * bound[1]) * block;
  if (*from > n) *from = n;
  if (*to > n) *to = n;
}

/* Let shares follow how fast each worker was in the latest pass: cores differ, and others use them, too. Call between passes, and
 * before the bounds of the next one are chosen. */
static void balance(Engine *e) {
  int threads = e->pool.threads;
  float *bound = e->bound, step = bound == e->bounds ? 1.0f / 16 : 1.0f / 4, total = 0, from = 0, at = 0; /* long passes are rare */
  for (int i = 0; i < threads; i++) {
    if (!e->worker[i].busy) return;
    total += (bound[i + 1] - bound[i]) / (float)e->worker[i].busy;
  }
  for (int i = 0; i + 1 < threads; i++) {
    float mine = bound[i + 1] - from, fair = mine / (float)e->worker[i].busy / total;
    from = bound[i + 1];
    at += mine + (fair - mine) * step;
    bound[i + 1] = at;
  }
}

/* Rows up to which every worker norms and rounds all of them for itself: that takes less time than a barrier and fetching what
 * others have written. */
#define ALONE 8

/* Whether workers multiply whole heads, which they can finish without a barrier: unless some would have too little to do. */
INLINE int owns_heads(const Engine *e) {
  int heads = e->model.heads + 2 * e->model.kv_heads, threads = e->pool.threads;
  return (heads + threads - 1) / threads * threads * 4 <= 5 * heads;
}
#endif
