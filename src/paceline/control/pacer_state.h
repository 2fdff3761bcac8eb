/* What the pacer knows, as the structures of `bank.py`, `arbiter.py`, `probing.py`, `followed.py`, `pricing.py`, `acceptance.py`,
 * `quality.py` and `offers.py` lay it out, with twins of their methods. The Python methods are the reference and work on the same memory: change both,
 * operation by operation, since they must come to the same bits. Constants in capitals come from Python as definitions. */

#ifndef PACELINE_PACER_STATE_H
#define PACELINE_PACER_STATE_H

#include <math.h>
#include <stdint.h>

typedef struct {
    double eps, start, cap, since, forgiven, opened_at, slack, granted, saving_for;
    int64_t is_open;
} TimeBank;

typedef struct {
    double value, deviation;
    int64_t known;
} Estimate;

typedef struct {
    int64_t window, dwell, retry, refresh;
    Estimate estimate;
    double rounds, worth, seconds, since_plain, plain_left, banned_for;
    int64_t against;
} Arbiter;

typedef struct {
    int64_t last, again;
    double interval;
} ProbeState;

typedef struct {
    double rows[ROW_BUCKETS], counts[ROW_BUCKETS], seen, machine, moved;
} Scales;

typedef struct {
    double last[5], value, share;
    int64_t count;
} MedianFactor;

typedef struct {
    double fixed, per_token, guess_fixed, guess_each, w, n, nn, t, nt;
} Line;

typedef struct {
    Scales scales;
    MedianFactor plain[ROW_BUCKETS];
    Line rest;
    double machine_at_plain, deviation;
    int64_t drafted_rounds;
} Costs;

typedef struct {
    double hits[POSITIONS], totals[POSITIONS], means[POSITIONS], discount;
    int64_t seen;
} PositionTable;

typedef struct {
    double discount, weight, odds, total, hits, expected;
    int64_t last;
} Shift;

typedef struct {
    double factor, log_factor, score, hits, expected;
    int64_t count;
} Run;

typedef struct {
    Shift shift;
    Run runs[2];
} WatchedShift;

typedef struct {
    double nodes;
    int64_t known;
} Width;

typedef struct {
    double accepted[NUM_SPANS], expected[NUM_SPANS];
} ChanceTable;

typedef struct {
    int64_t until[REST_SIGNALS];
} Rests;

typedef struct {
    Arbiter arbiter;
    TimeBank purse;
} Lane;

/* Python's min and max: the first of equals. */
static inline double least(double a, double b) { return b < a ? b : a; }
static inline double most(double a, double b) { return b > a ? b : a; }

static inline int64_t place_of(int64_t signal) { return signal < 0 ? 0 : signal < REST_SIGNALS ? signal : REST_SIGNALS - 1; }

static inline int64_t signal_bucket(int64_t signal) {
    return signal < 0 ? 0 : signal <= 8 ? signal : signal <= 16 ? 9 : 10;
}

/* ---------- TimeBank ---------- */

static inline int bank_is_short(const TimeBank *bank) { return bank->slack < 0.25 * bank->start * bank->opened_at; }

static inline int bank_is_ample(const TimeBank *bank) { return bank->slack >= 2.0 * bank->start * bank->opened_at; }

static int bank_grant(TimeBank *bank, double loss) {
    if (bank->slack < bank->granted + loss) return 0;
    bank->granted += loss;
    return 1;
}

static void bank_save_for(TimeBank *bank, double goal, double plain) {
    if (goal <= least(MOST_SAVED, bank->cap) * plain) bank->saving_for = goal;
}

static void bank_gain(TimeBank *bank, double gain, double plain) {
    bank->granted = 0.0;
    bank->slack = most(least(bank->slack + gain, bank->cap * plain), -bank->start * plain);
    if (bank->slack <= 0.0)
        bank->saving_for = most(bank->saving_for, least(SAVED, bank->cap) * plain);
    else if (bank->slack >= bank->saving_for)
        bank->saving_for = 0.0;
}

static void bank_settle_plain(TimeBank *bank, double plain, double emitted, double looking, double rounds) {
    looking = least(looking, LONGEST_LOOK * plain * rounds);
    bank_gain(bank, bank->eps * plain * emitted - looking, plain);
}

static void bank_settle(TimeBank *bank, double plain, double emitted, double seconds, double ceiling) {
    bank->since += 1.0;
    if (seconds > ceiling && bank->since >= FORGIVE_EVERY) {
        seconds = ceiling;
        bank->forgiven += 1.0;
        if (bank->forgiven > 0.999) bank->since = bank->forgiven = 0.0;
    }
    bank_gain(bank, (1.0 + bank->eps) * plain * emitted - seconds, plain);
}

static void bank_correct_start(TimeBank *bank, double plain) {
    if (plain < bank->opened_at) {
        bank->slack -= bank->start * (bank->opened_at - plain);
        bank->opened_at = plain;
    }
}

/* ---------- Arbiter ---------- */

static int better(double current, double other, double current_deviation, double other_deviation) {
    return other > current + most(0.05 * current, 0.5 * (current_deviation + other_deviation));
}

static void estimate_update(Estimate *estimate, double value) {
    if (!estimate->known) {
        estimate->value = value;
        estimate->known = 1;
        return;
    }
    double error = value - estimate->value;
    estimate->value += 0.3 * error;
    estimate->deviation = 0.7 * estimate->deviation + 0.3 * fabs(error);
}

static void arbiter_close_window(Arbiter *arbiter) {
    Estimate *estimate = &arbiter->estimate;
    double value = arbiter->seconds > 0.0 ? arbiter->worth / arbiter->seconds : 1.0;
    estimate_update(estimate, value);
    arbiter->rounds = arbiter->worth = arbiter->seconds = 0.0;
    if (!(better(estimate->value, 1.0, estimate->deviation, 0.0) && better(value, 1.0, 0.0, 0.0))) {
        arbiter->against = 0;
        return;
    }
    arbiter->against += 1;
    arbiter->plain_left = RENEWAL;
    if (arbiter->against >= arbiter->dwell) {
        arbiter->banned_for = (double)arbiter->retry;
        arbiter->against = 0;
        *estimate = (Estimate){0};
    }
}

static void arbiter_observe(Arbiter *arbiter, double plain, double emitted, double seconds, int speculative, double weight) {
    if (speculative) {
        arbiter->since_plain += emitted;
        if (arbiter->since_plain >= (double)arbiter->refresh) arbiter->plain_left = most(arbiter->plain_left, 1.0);
    } else {
        arbiter->since_plain = 0.0;
        arbiter->plain_left = most(0.0, arbiter->plain_left - weight);
    }
    if (arbiter->banned_for > 0.0) {
        arbiter->banned_for -= emitted;
        return;
    }
    if (!speculative) return;
    arbiter->worth += plain * emitted;
    arbiter->seconds += seconds;
    arbiter->rounds += weight;
    if (arbiter->rounds > (double)arbiter->window - 0.001) arbiter_close_window(arbiter);
}

/* ---------- ProbeSchedule ---------- */

static void probe_meet(ProbeState *state, int64_t now) {
    if (state->interval == 0.0) {
        state->last = now;
        state->interval = PROBE_FIRST;
    }
}

static int probe_due(ProbeState *state, int64_t now, double loss, double doubt) {
    probe_meet(state, now);
    double affordable = loss / (PROBE_BUDGET * (1.0 + PROBE_BOOST * doubt));
    return state->again > 0 || (double)(now - state->last) >= least(state->interval, affordable);
}

static void probe_ran(ProbeState *state, int64_t now, int accepted) {
    probe_meet(state, now);
    state->last = now;
    state->again = accepted ? (state->again + 1) % PROBE_IN_A_ROW : 0;
    if (!state->again) state->interval = least(2 * state->interval, PROBE_LAST);
}

static void probe_pays(ProbeState *state, int64_t now) {
    state->last = now;
    state->interval = PROBE_FIRST;
    state->again = 0;
}

/* ---------- LearnedCosts ---------- */

static void median_update(MedianFactor *factor, double ratio, double weight) {
    factor->share += weight;
    if (factor->share < 0.999) return;
    factor->share = 0.0;
    factor->count += 1;
    int count = factor->count < 3 ? 3 + (int)factor->count : 5;
    if (factor->count >= 3)
        for (int i = 0; i < 4; i++) factor->last[i] = factor->last[i + 1];
    factor->last[count - 1] = ratio;
    double sorted[5];
    for (int i = 0; i < count; i++) {
        int at = i;
        for (; at > 0 && sorted[at - 1] > factor->last[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = factor->last[i];
    }
    factor->value = sorted[count / 2];
}

static void scales_update(Scales *scales, int64_t rows, double ratio, double weight) { /* rows: at most EXACT_ROWS */
    double surprise = ratio / (scales->machine * scales->rows[rows]);
    surprise = least(most(surprise, 1.0 / OUTLIER), OUTLIER);
    double common = least(weight * most(0.1, 0.6 / (1.0 + 0.25 * scales->seen)), 0.6);
    double own = least(weight * most(0.05, 0.3 / (1.0 + 0.5 * scales->counts[rows])), 0.3);
    scales->machine *= pow(surprise, common);
    scales->rows[rows] *= pow(surprise, own);
    scales->seen += weight;
    scales->counts[rows] += weight;
    scales->moved += (common + own) * fabs(surprise - 1.0);
}

static double line_worst(const Line *line, double tokens) {
    return most(line->guess_fixed + line->guess_each * tokens, line->fixed + line->per_token * tokens);
}

static void line_learn(Line *line, double tokens, double seconds) {
    if (line->w > 8.0) seconds = least(seconds, OUTLIER * (line->fixed + line->per_token * tokens) + 1e-5);
    double keep = 0.95;
    seconds = most(0.0, seconds);
    line->w = line->w * keep + 1.0;
    line->n = line->n * keep + tokens;
    line->nn = line->nn * keep + tokens * tokens;
    line->t = line->t * keep + seconds;
    line->nt = line->nt * keep + tokens * seconds;
    double spread = line->nn - line->n * line->n / line->w + 1.0;
    double slope = (line->nt - line->n * line->t / line->w + line->guess_each) / spread;
    line->per_token = slope > 0.0 ? slope : 0.0;
    line->fixed = (line->t - line->per_token * line->n) / line->w;
    if (line->fixed < 0.0) {
        line->fixed = 0.0;
        line->per_token = line->t / line->n;
    }
}

/* ---------- acceptance ---------- */

static inline double with_odds(double rate, double odds) { return odds * rate / (1.0 + (odds - 1.0) * rate); }

static double pool_rate(const PositionTable *pool, int64_t position) { /* from 0 */
    int64_t seen = pool->seen > 1 ? pool->seen : POSITIONS;
    return pool->means[position < seen ? position : seen - 1];
}

static inline int pool_is_open(const PositionTable *pool) { return pool->discount > 0.0; }

static void pool_begin(PositionTable *pool, const double *prior, double odds) {
    for (int j = 0; j < POSITIONS; j++) {
        pool->means[j] = with_odds(prior[j], odds);
        pool->hits[j] = pool->means[j] * POOL_WEIGHT;
        pool->totals[j] = POOL_WEIGHT;
    }
    pool->discount = POOL_DISCOUNT;
    pool->seen = 0;
}

static void pool_update(PositionTable *pool, const double *labels, int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        int64_t slot = j < POSITIONS ? j : POSITIONS - 1;
        pool->hits[slot] = pool->discount * pool->hits[slot] + labels[j];
        pool->totals[slot] = pool->discount * pool->totals[slot] + 1.0;
        pool->means[slot] = pool->hits[slot] / pool->totals[slot];
    }
    if (count > pool->seen) pool->seen = count < POSITIONS ? count : POSITIONS;
}

static inline double inside(double rate) { return rate < 0.002 ? 0.002 : rate > 0.998 ? 0.998 : rate; }

static void shift_update(Shift *shift, double count, double hits, double expected, int64_t now) {
    double keep = pow(shift->discount, count);
    if (now != shift->last) {
        keep *= pow(0.5, (double)(now - shift->last) / HALF_LIFE);
        shift->last = now;
    }
    shift->hits = keep * shift->hits + hits;
    shift->expected = keep * shift->expected + expected;
    double total = shift->total = keep * shift->total + count;
    double mean = inside(shift->expected / total);
    double seen = inside((shift->hits + shift->weight * mean) / (total + shift->weight));
    shift->odds = seen * (1.0 - mean) / ((1.0 - seen) * mean);
}

static int run_speaks_for_change(Run *run, int64_t count, double hits, double expected, double believed) {
    run->score += hits * run->log_factor - (double)count * log(1.0 + (run->factor - 1.0) * believed);
    if (run->score <= 0.0) {
        run->score = run->hits = run->expected = 0.0;
        run->count = 0;
        return 0;
    }
    run->hits += hits;
    run->expected += expected;
    run->count += count;
    return run->score > ALARM;
}

static void watched_update(WatchedShift *own, int64_t count, double hits, double expected, int64_t now) {
    Shift *shift = &own->shift;
    double mean = inside(expected / (double)count);
    double believed = shift->odds * mean / (1.0 + (shift->odds - 1.0) * mean);
    for (int i = 0; i < 2; i++) {
        Run *run = &own->runs[i];
        if (!run_speaks_for_change(run, count, hits, expected, believed)) continue;
        shift->hits = run->hits - hits;
        shift->expected = run->expected - expected;
        shift->total = (double)(run->count - count);
        for (int j = 0; j < 2; j++) {
            own->runs[j].score = own->runs[j].hits = own->runs[j].expected = 0.0;
            own->runs[j].count = 0;
        }
        break;
    }
    shift_update(shift, (double)count, hits, expected, now);
}

static int64_t span_of(double chance) {
    static const double ends[] = {SPAN_ENDS};
    int64_t span = 0;
    while (span < NUM_SPANS - 1 && chance >= ends[span]) span++;
    return span;
}

static void chances_believed(const ChanceTable *table, const double *chances, int64_t count, double *found) {
    double last = MOST_CHANCE;
    for (int64_t j = 0; j < count; j++) {
        int64_t span = span_of(chances[j]);
        found[j] = last = least(last, chances[j] * table->accepted[span] / table->expected[span]);
    }
}

static void chances_update(ChanceTable *table, const double *chances, int64_t count, uint64_t path) {
    for (int64_t j = 0; j < count; j++) {
        int64_t span = span_of(chances[j]);
        table->accepted[span] = CHANCE_DISCOUNT * table->accepted[span] + (path >> j & 1 ? 1.0 : 0.0);
        table->expected[span] = CHANCE_DISCOUNT * table->expected[span] + chances[j];
    }
}

static void width_update(Width *width, int64_t drafted, int64_t levels) {
    if (!((0 < levels && levels < drafted) || width->known)) return;
    double seen = (double)drafted / (double)(levels > 1 ? levels : 1);
    width->nodes = 0.9 * (width->known ? width->nodes : seen) + 0.1 * seen;
    width->known = 1;
}

#endif
