/* The most probable tokens of rows of logits, and the logarithm of the sum of all their exponentials.
 *
 * The readable reference is drafting/rows.py; a test holds the two together. */
#include <math.h>
#include <stddef.h>

#include "../execution/native/vec.h"

#define ABI_VERSION 1
#define BLOCK 64
#define AHEAD 2048

INLINE float largest_of(const float *x) {
  v16 top = vmax(load16(x), load16(x + 16));
  return hmax(vmax(top, vmax(load16(x + 32), load16(x + 48))));
}

/* Take x in if it is among the `count` largest so far; of equals the first stays ahead. */
INLINE void take(float x, int32_t id, int count, int32_t *ids, float *values) {
  int at = count - 1;
  for (; at > 0 && x > values[at - 1]; at--) {
    values[at] = values[at - 1];
    ids[at] = ids[at - 1];
  }
  values[at] = x;
  ids[at] = id;
}

static void top_of(const float *x, int n, int count, int32_t *ids, float *values) {
  for (int i = 0; i < count; i++) {
    values[i] = -INFINITY;
    ids[i] = -1;
  }
  for (int from = 0; from < n; from += BLOCK) {
    for (int line = 0; line < BLOCK; line += 16) __builtin_prefetch(x + from + AHEAD + line); /* other cores wrote them just now */
    int to = from + BLOCK <= n ? from + BLOCK : n;
    if (to - from == BLOCK && !(largest_of(x + from) > values[count - 1])) continue;
    for (int i = from; i < to; i++)
      if (x[i] > values[count - 1]) take(x[i], i, count, ids, values);
  }
}

static float log_total(const float *x, int n, float largest) {
  v16 sum = splat(0);
  float rest = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16) sum = sum + vexp(load16(x + i) - splat(largest));
  for (; i < n; i++) rest += expf(x[i] - largest);
  return largest + logf(hsum(sum) + rest);
}

int paceline_rows_abi(void) { return ABI_VERSION; }

/* logits: rows of n floats, `stride` apart, of which row[0..rows) are wanted. ids, values: [rows][count], best first, the lowest
 * token of equals. totals: [rows], or NULL. Returns 0 when a row has fewer than `count` tokens that are not impossible. */
int paceline_top_rows(const float *logits, ptrdiff_t stride, const int32_t *row, int rows, int n, int count, int32_t *ids,
                      float *values, float *totals) {
  for (int r = 0; r < rows; r++) {
    const float *x = logits + row[r] * stride;
    top_of(x, n, count, ids + r * count, values + r * count);
    if (ids[r * count + count - 1] < 0) return 0;
    if (totals) totals[r] = log_total(x, n, values[r * count]);
  }
  return 1;
}
