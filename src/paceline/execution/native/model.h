/* What a pass reads and writes. Structs up to Batch mirror execution/native/binding.py. */
#ifndef PACELINE_MODEL_H
#define PACELINE_MODEL_H

#include "attention.h"
#include "grades.h"
#include "pool.h"

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
  const int32_t *tokens;
  const int32_t *parents; /* of the rows of trees, counted within their segment; -1: none */
  Segment *segment;
  const int32_t *logit_row; /* [logit_rows]; NULL: the first ones */
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

typedef struct {
  float value;
  int32_t at;
} Top;

typedef struct Engine Engine;
typedef struct {
  Engine *engine;
  int id;
  float *scratch;
  uint8_t *is_wide; /* [max_rows] of its latest choice */
  Top *top;         /* [max_rows] the largest logit of its share of the vocabulary; at -1: one is not finite */
  uint64_t waited, busy; /* clock ticks of the latest pass: at barriers, and of work */
  Acts own;         /* of up to ALONE rows, where every worker prepares what it multiplies for itself */
} Worker;

struct Engine {
  Model model;
  Batch *batch;
  Pool pool;
  int tiled, queries; /* attention through the matrix unit; queries that go together at most */
  float *bound; /* [threads + 1] from 0 to 1: worker i does what lies between bound[i] and bound[i + 1] of a step's work */
  float *bounds; /* those of passes over few rows, then those of passes over many: cores may differ otherwise in each */
  pthread_t *thread;
  Worker *worker;
  int32_t *positions;  /* [rows] of the batch */
  uint64_t *ancestors; /* [rows] in trees: bit i = row i of the segment is an ancestor or itself */
  float *x, *qkv, *attn, *rope_cos, *rope_sin; /* [rows][...] work space */
  float *partials;                             /* of attention whose chunks are shared out: [unit][QUERIES][partial_size] */
  Acts acts, inner;                            /* normed x; what o and down multiply */
};

static int segment_of(const Batch *b, int row) {
  int s = 0;
  while (row >= b->segment[s].first_row + b->segment[s].num_rows) s++;
  return s;
}
#endif
