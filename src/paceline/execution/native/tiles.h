/* Products of bf16 pairs by a processor's matrix unit (AMX), for the queries of one kv head at once.
 *
 * A tile of 32 inputs adds to each sum in one fixed order: the products of its even inputs one after another, those of its odd
 * inputs likewise, then both together. `tile_sum` is the same in vectors, for slots that do not lie side by side. */
#ifndef PACELINE_TILES_H
#define PACELINE_TILES_H

#include "vec.h"

#if HAVE_AVX512 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAVE_TILES 0
#endif

#define TILE_ROWS 16
#define TILE_INPUTS 32

#if HAVE_TILES
/* Whether the system lets this process use tiles. */
static int allow_tiles(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Tiles 0, 1 and 4 to 7 for up to `queries` rows, 2 and 3 for what these are multiplied by. */
static void open_tiles(int queries) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = (uint8_t)(i / 2 == 1 ? TILE_ROWS : queries);
  _tile_loadconfig(&config);
}

static void close_tiles(void) { _tile_release(); }

/* scores[r][16 j ..] of TILE_ROWS queries [dim] side by side and `blocks` blocks of 16 keys. values: asked for on the way. */
static void tile_scores(const uint16_t *queries, const uint8_t *keys, const uint8_t *values, int dim, int blocks, float *scores,
                        int stride) {
  _tile_loadd(0, queries, 2 * dim);
  if (dim == 2 * TILE_INPUTS) _tile_loadd(1, queries + TILE_INPUTS, 2 * dim);
  for (int j = 0; j < blocks; j++, keys += 32 * dim, values += 32 * dim) {
    for (int i = 0; i < 32 * dim; i += 64) __builtin_prefetch(values + i, 0, 2);
    _tile_zero(4);
    if (dim == 2 * TILE_INPUTS) {
      _tile_loadd(2, keys, 64);
      _tile_loadd(3, keys + 1024, 64);
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(4, 1, 3);
    } else {
      for (int d = 0; d < dim; d += TILE_INPUTS) {
        _tile_loadd(0, queries + d, 2 * dim);
        _tile_loadd(2, keys + 32 * d, 64);
        _tile_dpbf16ps(4, 0, 2);
      }
    }
    _tile_stored(4, scores + 16 * j, 4 * stride);
  }
}

/* sums[r][64] = weights[r][..] times columns column .. column + 64 of `tiles` tiles of values; columns beyond dim are left out.
 * ahead: what to ask for on the way. */
static void tile_values(const uint16_t *weights, int stride, const uint8_t *values, const uint8_t *ahead, int dim, int column, int tiles,
                        float *sums) {
  int columns = dim - column < 64 ? dim - column : 64;
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int i = 0; i < tiles; i++, weights += TILE_INPUTS, values += 64 * dim, ahead += 64 * dim) {
    const uint8_t *from = values + 4 * column;
    for (int j = 0; j < 64 * columns; j += 64) __builtin_prefetch(ahead + 64 * column + j, 0, 2);
    _tile_loadd(0, weights, 2 * stride);
    _tile_loadd(2, from, 4 * dim);
    _tile_dpbf16ps(4, 0, 2);
    if (columns > 16) {
      _tile_loadd(3, from + 64, 4 * dim);
      _tile_dpbf16ps(5, 0, 3);
    }
    if (columns > 32) {
      _tile_loadd(2, from + 128, 4 * dim);
      _tile_dpbf16ps(6, 0, 2);
    }
    if (columns > 48) {
      _tile_loadd(3, from + 192, 4 * dim);
      _tile_dpbf16ps(7, 0, 3);
    }
  }
  _tile_stored(4, sums, 256);
  if (columns > 16) _tile_stored(5, sums + 16, 256);
  if (columns > 32) _tile_stored(6, sums + 32, 256);
  if (columns > 48) _tile_stored(7, sums + 48, 256);
}

/* As the matrix unit: numbers too small to be normal count as zero. */
INLINE unsigned flush_denormals(void) {
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
static int allow_tiles(void) { return 0; }
static void open_tiles(int queries) {}
static void close_tiles(void) {}
static void tile_scores(const uint16_t *queries, const uint8_t *keys, const uint8_t *values, int dim, int blocks, float *scores,
                        int stride) {}
static void tile_values(const uint16_t *weights, int stride, const uint8_t *values, const uint8_t *ahead, int dim, int column, int tiles,
                        float *sums) {}
INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) {}
#endif
#endif
