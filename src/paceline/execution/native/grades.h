/* Which of its two precisions a matrix computes in, decided for each row from the input that it meets.
 *
 * Rounding errors of different weights are independent, nearly: so the squared length of (wide - narrow) times an input is the
 * sum, over groups of 32 inputs, of the group's squared length times the mean squared length of a column of wide - narrow there.
 * The readable reference is execution/graded.py; a test holds the two together. */
#ifndef PACELINE_GRADES_H
#define PACELINE_GRADES_H

#include <math.h>

#include "linear.h"

enum { QKV, O, GATE_UP, DOWN, MATRICES };

typedef struct {
  Matrix wide[MATRICES];
  const float *spread[MATRICES]; /* [k / 32] mean squared length of a column of wide - narrow */
  float threshold[MATRICES];     /* a row whose estimated error is above it computes with `wide` */
} Grades;

/* A matrix in the precision of each row. */
typedef struct {
  const Matrix *narrow, *wide;
  const uint8_t *is_wide; /* [rows], or NULL: all narrow */
} Choice;

INLINE float rounding_error(const float *spread, const Acts *a, int groups, int row) {
  const float *energy = a->energy + (size_t)row * groups;
  float total = 0;
  for (int g = 0; g < groups; g++) total += spread[g] * energy[g];
  return sqrtf(total);
}

/* As tile_rows. A row's bits are those that it has alone, whatever its neighbours compute with. */
INLINE void choice_rows(const Choice *c, int tile, const Acts *a, int row, int m, float *y) {
  int wide = 0;
  for (int r = 0; c->is_wide && r < m; r++) wide += c->is_wide[row + r];
  tile_rows(wide == m ? c->wide : c->narrow, tile, a, row, m, y);
  if (wide == 0 || wide == m) return;
  float other[8 * BLOCK];
  tile_rows(c->wide, tile, a, row, m, other);
  for (int r = 0; r < m; r++)
    if (c->is_wide[row + r]) memcpy(y + BLOCK * r, other + BLOCK * r, BLOCK * sizeof *y);
}
#endif
