/* What `core.py` hands over, and what a call answers. */

#ifndef PACELINE_PACER_CORE_H
#define PACELINE_PACER_CORE_H

#include "pacer_state.h"

enum { MOST_DRAFT = EXACT_ROWS - 1 };

/* A drafter in a task. */
typedef struct {
    PositionTable *pools[NUM_BUCKETS];
    ProbeState *probes[NUM_BUCKETS];
    Line *line;
    Shift *level;
    Width *width;
    ChanceTable *chances;
    Rests *rests;
    const double *prior; /* [NUM_BUCKETS][POSITIONS] */
} Standing;

typedef struct {
    const Standing *standing;
    WatchedShift *own;
    int64_t available, signal;
    const double *chances; /* null: the drafter does not know */
} Look;

typedef struct {
    const Lane *lane;
    int64_t context, max_draft, count;
    Look looks[MOST_LOOKS];
} Query;

typedef struct {
    Lane *lane;
    const Standing *standing; /* null: a plain round */
    WatchedShift *own;
    int64_t context, planned, drafted, accepted, emitted, signal, rows, levels, flags;
    int64_t num_labels; /* or chances of its nodes */
    uint64_t path;      /* which of those nodes were accepted */
    double draft, verify, control, round, expected;
} Finished;

/* Measured seconds of forwards over 1, 2, ... rows at about a context. */
typedef struct {
    int64_t context, count;
    double seconds[EXACT_ROWS];
} Curve;

typedef struct {
    TimeBank *bank;
    Costs *costs;
    double *told; /* expected tokens and seconds of the plan */
    double margin;
    int64_t tokens; /* emitted so far */
    int64_t wanted_context, wanted_rows;
    Query query;
    Finished finished[MOST_FINISHED];
    double labels[MOST_LABELS];
    Curve curves[NUM_CURVES];
} Core;

/* Null where Python must fill it first. */
static const double *measured(Core *core, int64_t context, int64_t rows) {
    context >>= CONTEXT_SHIFT;
    const Curve *curve = &core->curves[context % NUM_CURVES];
    if (curve->context == context && curve->count >= rows) return curve->seconds;
    core->wanted_context = context;
    core->wanted_rows = rows;
    return 0;
}

#endif
