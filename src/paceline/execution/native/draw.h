/* A token drawn from a row of logits: the fast form of execution/draws.py, whose text says what is drawn.
 *
 * Weights are never kept: a pass sums them block by block, and those of the one block in which the token lies are computed
 * again. Filters become one limit on the distance from the largest logit. Such distances are not negative, so they have the
 * order of their bits. */
#ifndef PACELINE_DRAW_H
#define PACELINE_DRAW_H

#include <math.h>
#include <stddef.h>

#include "vec.h"

/* Distances as bits: 28, beyond which all weights are 0. */
#define FARTHEST 0x41E00000u
#define UNIT 1099511627776.f
#define NUMBER_BITS 53
#define DRAW_BLOCK 256
/* Keys are looked for by 11 bits at a time, the highest first. Neighbours count in tallies of their own: none waits for another. */
#define DIGITS 2048
#define TALLIES 4

typedef struct { /* `Law` of binding.py; fields as in DrawLaw */
  float temperature, min_p;
  double top_p;
  int32_t top_k, vocab;
} Law;

typedef struct { /* `Drawn` of binding.py: the law of a row, as far as it took time to find */
  uint64_t total;
  float peak;
  uint32_t limit;
} Drawn;

typedef struct {
  const float *logits, *far; /* far: distances, padded to whole vectors; NULL: not there yet */
  float peak, temperature, inverse;
  int vocab;
} Row;

typedef struct {
  uint64_t *sum, *weight, *tally;
  float *far;
  uint32_t *key;
} Room;

/* Places for a value of each token: whole vectors, and one more that `compress` may write. */
INLINE size_t padded(int vocab) { return ((size_t)vocab + LANES - 1) / LANES * LANES + LANES; }
INLINE size_t blocks_of(int vocab) { return ((size_t)vocab + DRAW_BLOCK - 1) / DRAW_BLOCK; }

static size_t draw_bytes(int vocab) {
  return (blocks_of(vocab) + padded(vocab) + TALLIES * DIGITS) * 8 + 2 * padded(vocab) * 4;
}

static Room room_in(void *work, int vocab) {
  Room r;
  r.sum = work;
  r.weight = r.sum + blocks_of(vocab);
  r.tally = r.weight + padded(vocab);
  r.far = (float *)(r.tally + TALLIES * DIGITS);
  r.key = (uint32_t *)(r.far + padded(vocab));
  return r;
}

/* LANES logits from token i on; those behind the last one can never be drawn. */
INLINE vec logits_at(const Row *row, int i) {
  if (i + LANES <= row->vocab) return load(row->logits + i);
  vec x = splat(-INFINITY);
  for (int lane = 0; i + lane < row->vocab; lane++) x[lane] = row->logits[i + lane];
  return x;
}

/* x / y to the last bit; r: 1 / y. A division takes as long as all else that a weight needs. Where products and sums are fused, one
 * step of correction gives the same. Distances beyond 64, whose weights are 0, become 64, since infinity cannot be corrected. */
INLINE vec ratio(vec x, float y, float r) {
#if HAVE_FMA
  x = vmin(x, splat(64 * y));
  vec q = x * splat(r);
  return FMA(FMA(-q, splat(y), x), splat(r), q);
#else
  return x / splat(y);
#endif
}

INLINE vec distances_at(const Row *row, int i) {
  return ratio(splat(row->peak) - logits_at(row, i), row->temperature, row->inverse);
}

/* Weights before they are rounded down. */
INLINE vec weights_of(vec far, float min_p) {
  vec share = vexp(-far);
  return (vec)((veci)(share * splat(UNIT)) & (veci)(share >= splat(min_p)));
}

INLINE vec within_limit(vec weights, vec far, uint32_t limit) {
  return (vec)((veci)weights & ((veci)far <= splat_i((int32_t)limit)));
}

INLINE uint64_t sum_of(vecl x) {
  uint64_t sum = 0;
  for (int i = 0; i < LANES / 2; i++) sum += (uint64_t)x[i];
  return sum;
}

/* The largest logit; infinite where one is infinite above or not a number. */
static float peak_of(const Row *row) {
  vec top[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  veci faulty = splat_i(0);
  int i = 0;
  for (; i + 4 * LANES <= row->vocab; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      vec x = load(row->logits + i + LANES * j);
      top[j] = vmax(top[j], x);
      faulty |= (veci)(x != x);
    }
  for (; i < row->vocab; i += LANES) {
    vec x = logits_at(row, i);
    top[0] = vmax(top[0], x);
    faulty |= (veci)(x != x);
  }
  return any(faulty) ? INFINITY : hmax(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

/* What all tokens weigh, in all and block by block. */
static uint64_t weigh(const Row *row, float min_p, uint64_t *sum) {
  uint64_t total = 0;
  for (int from = 0; from < row->vocab; from += DRAW_BLOCK) {
    vecl weight = {0};
    for (int i = from; i < from + DRAW_BLOCK && i < row->vocab; i += LANES) {
      vec x = weights_of(distances_at(row, i), min_p);
      weight += whole_low(x) + whole_high(x);
    }
    total += *sum++ = sum_of(weight);
  }
  return total;
}

/* The same of tokens up to a distance, of which there are few: most vectors hold none. */
static uint64_t weigh_near(const Row *row, uint32_t limit, float min_p, uint64_t *sum) {
  uint64_t total = 0;
  for (int from = 0; from < row->vocab; from += DRAW_BLOCK) {
    vecl weight = {0};
    for (int i = from; i < from + DRAW_BLOCK && i < row->vocab; i += LANES) {
      vec far = load(row->far + i);
      if (!any((veci)far <= splat_i((int32_t)limit))) continue;
      vec x = within_limit(weights_of(far, min_p), far, limit);
      weight += whole_low(x) + whole_high(x);
    }
    total += *sum++ = sum_of(weight);
  }
  return total;
}

/* The keys up to a limit, one behind another; returns how many. */
static int gather_keys(const Row *row, uint32_t limit, uint32_t *key) {
  int n = 0;
  for (int i = 0; i < row->vocab; i += LANES) {
    veci x = (veci)load(row->far + i);
    n += compress(key + n, x, x <= splat_i((int32_t)limit));
  }
  return n;
}

/* Of n keys the smallest one up to which there are `least` keys (weight NULL) or weights of that sum. There are. Keys and weights
 * are spoilt: of each digit only those stay that share it. */
static uint32_t nearest(uint32_t *key, uint64_t *weight, int n, double least, uint64_t *tally) {
  static const int shifts[] = {20, 9, 0}; /* the last digit has two bits of the one before, which say nothing new */
  uint64_t before = 0;
  uint32_t found = 0;
  for (int step = 0; step < 3; step++) {
    int shift = shifts[step], tallies = n > DIGITS ? TALLIES : 1;
    memset(tally, 0, (size_t)tallies * DIGITS * 8);
    for (int i = 0; i < n; i++)
      tally[i % tallies * DIGITS + (key[i] >> shift) % DIGITS] += weight ? weight[i] : 1;
    uint32_t digit = 0;
    for (;; digit++) {
      uint64_t own = 0;
      for (int t = 0; t < tallies; t++) own += tally[t * DIGITS + digit];
      if ((double)(before + own) >= least) break;
      before += own;
    }
    int kept = 0;
    for (int i = 0; i < n; i++) {
      uint32_t own = key[i];
      key[kept] = own;
      if (weight) weight[kept] = weight[i];
      kept += (own >> shift) % DIGITS == digit;
    }
    n = kept;
    found |= digit << shift;
  }
  return found;
}

/* The smallest distance within which there are `count` tokens. */
static uint32_t nearest_tokens(const Row *row, int count, const Room *room) {
  for (float bound = 1; bound < 28; bound *= 2) { /* few keys take less time to look through than all */
    uint32_t near;
    memcpy(&near, &bound, 4);
    int n = gather_keys(row, near, room->key);
    if (n >= count) return nearest(room->key, NULL, n, count, room->tally);
  }
  int n = gather_keys(row, FARTHEST, room->key);
  return n > count ? nearest(room->key, NULL, n, count, room->tally) : FARTHEST;
}

/* The smallest distance within which lies a share `top_p` of what tokens up to the limit weigh. */
static uint32_t nucleus(const Row *row, uint32_t limit, double top_p, const Room *room) {
  double all = (double)weigh_near(row, limit, 0, room->sum);
  /* The vocab tokens beyond a distance d weigh at most vocab e^-d; where that is less than what may be left out, d is a limit. */
  float bound = (float)log((double)row->vocab * UNIT / ((1 - top_p) * all)) + 0.01f;
  uint32_t near = limit;
  if (1 - top_p > 1e-6 && bound < 28) memcpy(&near, &bound, 4);
  int n = gather_keys(row, near < limit ? near : limit, room->key);
  for (int i = 0; i < n; i += LANES) {
    vec x = weights_of(load((const float *)room->key + i), 0);
    AT(vecl, room->weight + i) = whole_low(x);
    AT(vecl, room->weight + i + LANES / 2) = whole_high(x);
  }
  return nearest(room->key, room->weight, n, top_p * all, room->tally);
}

/* The limit that top_k and top_p set, ties with the last token included. */
static uint32_t limit_of(const Row *row, const Law *law, const Room *room) {
  uint32_t limit = FARTHEST;
  if (law->top_k > 0 && law->top_k < law->vocab) limit = nearest_tokens(row, law->top_k, room);
  return law->top_p < 1 ? nucleus(row, limit, law->top_p, room) : limit;
}

/* The first token whose running sum exceeds the place. */
static int token_at(const Row *row, uint32_t limit, float min_p, uint64_t place, const uint64_t *sum) {
  int i = 0;
  for (; *sum <= place; i += DRAW_BLOCK) place -= *sum++;
  for (;; i += LANES) {
    vec far = distances_at(row, i), x = within_limit(weights_of(far, min_p), far, limit);
    int64_t weight[LANES];
    AT(vecl, weight) = whole_low(x);
    AT(vecl, weight + LANES / 2) = whole_high(x);
    for (int lane = 0; lane < LANES; lane++) {
      if ((uint64_t)weight[lane] > place) return i + lane;
      place -= (uint64_t)weight[lane];
    }
  }
}

static Row row_of(const float *logits, const Law *law, float peak) {
  return (Row){logits, NULL, peak, law->temperature, 1 / law->temperature, law->vocab};
}

/* A token, -1 where the largest logit is not finite. */
static int draw(const float *logits, const Law *law, uint64_t number, void *work, Drawn *drawn) {
  Row row = row_of(logits, law, 0);
  row.peak = peak_of(&row);
  if (!isfinite(row.peak)) return -1;
  Room room = room_in(work, law->vocab);
  *drawn = (Drawn){0, row.peak, FARTHEST};
  if (law->top_k > 0 || law->top_p < 1) {
    for (int i = 0; i < row.vocab; i += LANES) store(room.far + i, distances_at(&row, i));
    row.far = room.far;
    drawn->limit = limit_of(&row, law, &room);
    drawn->total = weigh_near(&row, drawn->limit, law->min_p, room.sum);
  } else drawn->total = weigh(&row, law->min_p, room.sum);
  uint64_t place = (uint64_t)((unsigned __int128)number * drawn->total >> NUMBER_BITS);
  return token_at(&row, drawn->limit, law->min_p, place, room.sum);
}

/* The probability of some tokens together, under the law that a row was drawn from. */
static double mass_of(const float *logits, const Law *law, const Drawn *drawn, const int32_t *tokens, int count) {
  Row row = row_of(logits, law, drawn->peak);
  uint64_t sum = 0;
  for (int from = 0; from < count; from += LANES) {
    vec x = splat(-INFINITY);
    for (int i = 0; i < LANES && from + i < count; i++)
      if (tokens[from + i] < law->vocab) x[i] = logits[tokens[from + i]];
    vec far = ratio(splat(row.peak) - x, row.temperature, row.inverse);
    vec weight = within_limit(weights_of(far, law->min_p), far, drawn->limit);
    sum += sum_of(whole_low(weight) + whole_high(weight));
  }
  return (double)sum / (double)drawn->total;
}
#endif
