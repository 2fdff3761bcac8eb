/* The pacer's usual round of one sequence: `Pacer.plan` and `Pacer._take_in` in one call each. What runs after a forward finds cold
 * caches, so the time that counts is how much different code and data is touched. `core.py` hands over addresses of the pacer's own
 * state; whatever is rare is left to Python, which goes on with the same memory. Nothing is changed before it is sure that all can be
 * done here. */

#include "pacer_state.h"

enum { ASK, NEED_CURVE, DONE, NOTHING, SAVING_UP, FORBIDDEN, RESTING, RENEW, POOR, NOT_WORTH, DRAFT, PROBE };
enum { MOST_DRAFT = EXACT_ROWS - 1 };
enum { TRUNCATED = 1, PROBING = 2, WARMUP = 4 };

/* A drafter in a task. */
typedef struct {
    PositionTable *pools[NUM_BUCKETS];
    ProbeState *probes[NUM_BUCKETS];
    Line *line;
    Shift *level;
    Width *width;
    Rests *rests;
    const double *prior; /* [NUM_BUCKETS][POSITIONS] */
} Standing;

typedef struct {
    const Standing *standing;
    WatchedShift *own;
    int64_t available, signal;
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
    int64_t context, planned, drafted, accepted, emitted, signal, rows, levels, flags, num_labels;
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

typedef struct {
    const Look *look;
    int64_t bucket, num_draft;
    double emitted, merit, rates[MOST_DRAFT], seconds[EXACT_ROWS];
} Offer;

typedef struct {
    const Finished *record; /* the last one of those alike */
    double plain, seconds, verify, emitted, rounds;
} Lesson;

/* Null where Python must fill it first. */
static const double *measured(Core *core, int64_t context, int64_t rows) {
    context >>= CONTEXT_SHIFT;
    const Curve *curve = &core->curves[context % NUM_CURVES];
    if (curve->context == context && curve->count >= rows) return curve->seconds;
    core->wanted_context = context;
    core->wanted_rows = rows;
    return 0;
}

/* ---------- plan ---------- */

static void find_rates(const Look *look, int64_t bucket, int64_t count, double *rates) {
    const Standing *standing = look->standing;
    const PositionTable *pool = standing->pools[bucket];
    const double *prior = standing->prior + bucket * POSITIONS, odds = look->own->shift.odds;
    int open = pool_is_open(pool);
    for (int64_t j = 0; j < count; j++) {
        double rate = open ? pool_rate(pool, j) : with_odds(prior[j < POSITIONS ? j : POSITIONS - 1], standing->level->odds);
        rates[j] = with_odds(rate, odds);
    }
    double width = standing->width->nodes;
    if (!(width > 1.0)) return;
    double levels[MOST_DRAFT];
    int64_t last = 0;
    for (int64_t node = 0; node < count; node++) levels[node] = rates[node];
    for (int64_t node = 0; node < count; node++) {
        int64_t level = (int64_t)((double)node / width);
        rates[node] = level > last ? levels[level] : node == 0 ? levels[0] / width : 1.0;
        last = level;
    }
}

static void make_offer(const Core *core, const Look *look, const double *raw, double plain, Offer *offer) {
    const Costs *costs = core->costs;
    const Scales *scales = &costs->scales;
    const Line *line = look->standing->line;
    int64_t limit = core->query.max_draft < look->available ? core->query.max_draft : look->available;
    offer->look = look;
    offer->bucket = signal_bucket(look->signal);
    find_rates(look, offer->bucket, limit, offer->rates);
    double fixed = scales->machine * line->fixed, per_token = scales->machine * line->per_token;
    double once = fixed + costs->rest.fixed, each = per_token + costs->rest.per_token;
    double floor = plain + fixed, floor_each = per_token + LEAST_ROW * plain;
    double survival = 1.0, emitted = 1.0, best_speed = -1.0;
    offer->num_draft = 1;
    offer->emitted = 1.0;
    for (int64_t k = 0; k <= limit; k++) {
        double cost = raw[k] * (scales->machine * scales->rows[k + 1]) + once;
        offer->seconds[k] = cost > floor ? cost : floor;
        once += each;
        floor += floor_each;
        if (k == 0) continue;
        survival *= offer->rates[k - 1];
        emitted += survival;
        if (emitted > best_speed * offer->seconds[k]) {
            offer->num_draft = k;
            offer->emitted = emitted;
            best_speed = emitted / offer->seconds[k];
        }
    }
    offer->merit = offer->emitted * plain / offer->seconds[offer->num_draft];
}

static int may_probe(const Core *core, const Offer *offer, double plain, double speed) {
    double loss = most(0.0, offer->seconds[offer->num_draft] / plain - offer->emitted / speed);
    if (core->query.lane->purse.slack < loss * plain) return 0;
    const Shift *own = &offer->look->own->shift;
    double rate = offer->rates[0], gap = loss + core->margin;
    double variance = most(rate * (1.0 - rate), 0.01) / (own->weight + own->total);
    double doubt = exp(-gap * gap / (2.0 * variance));
    return probe_due(offer->look->standing->probes[offer->bucket], core->tokens, loss, doubt);
}

/* The longest draft, up to the wanted one, whose worst loss the bank grants, as a plan. */
static int64_t grant(Core *core, const Offer *offer, const double *raw, double plain, int64_t wanted, int64_t kind) {
    const Costs *costs = core->costs;
    double margin = 1.0 + 2.0 * costs->deviation, worst = 0.0;
    int64_t k = wanted;
    for (; k > 0; k--) {
        double drafting = costs->scales.machine * line_worst(offer->look->standing->line, (double)k);
        worst = most(margin * offer->seconds[k], raw[k] + drafting + line_worst(&costs->rest, (double)k));
        if (bank_grant(core->bank, most(0.0, worst - plain))) break;
    }
    if (k == 0) {
        bank_save_for(core->bank, worst - plain + 0.25 * plain, plain);
        offer->look->standing->rests->until[place_of(offer->look->signal)] = core->tokens + REST;
        core->told[1] = plain;
        return POOR;
    }
    int64_t expected = k < offer->num_draft ? k : offer->num_draft;
    core->told[0] = offer->emitted;
    if (expected < offer->num_draft) {
        double survival = core->told[0] = 1.0;
        for (int64_t j = 0; j < expected; j++) {
            survival *= offer->rates[j];
            core->told[0] += survival;
        }
    }
    core->told[1] = offer->seconds[expected];
    return kind | k << 8 | (offer->look - core->query.looks) << 16;
}

/* Probe, draft or neither. offers: the best one first. */
static int64_t choose(Core *core, Offer **offers, int64_t count, const double *raw, double plain, double now) {
    const Lane *lane = core->query.lane;
    int pays = offers[0]->merit > 1.0 + core->margin + (lane->purse.slack <= 0.0 ? DOUBLE_PROOF : 0.0);
    for (int64_t i = pays ? 1 : 0; i < count; i++)
        if (may_probe(core, offers[i], now, pays ? offers[0]->merit : 1.0))
            return grant(core, offers[i], raw, plain, offers[i]->num_draft < 2 ? offers[i]->num_draft : 2, PROBE);
    for (int64_t i = 0; i < count; i++)
        if (offers[i]->merit < CLEARLY_NOT)
            offers[i]->look->standing->rests->until[place_of(offers[i]->look->signal)] = core->tokens + REST;
    if (pays) return grant(core, offers[0], raw, plain, offers[0]->num_draft, DRAFT);
    core->told[1] = plain;
    return NOT_WORTH;
}

/* `Pacer.plan` of the query: what to do, tokens to draft (from bit 8) and which look's drafter (from bit 16). */
int64_t paceline_pacer_plan(Core *core, int64_t tokens) {
    core->tokens = tokens;
    const Query *query = &core->query;
    const Costs *costs = core->costs;
    if (query->max_draft <= 0 || query->count == 0) return NOTHING;
    if (core->bank->saving_for > 0.0) return SAVING_UP;
    int64_t longest = 0;
    for (int64_t i = 0; i < query->count; i++) longest = longest > query->looks[i].available ? longest : query->looks[i].available;
    const double *raw = measured(core, query->context, 1 + (longest < query->max_draft ? longest : query->max_draft));
    if (!raw) return NEED_CURVE;
    if (query->lane->arbiter.banned_for > 0.0) return FORBIDDEN;
    const MedianFactor *price = &costs->plain[1];
    int known = price->count >= TRUSTED, rest = 1;
    for (int64_t i = 0; i < query->count && rest; i++)
        rest = core->tokens < query->looks[i].standing->rests->until[place_of(query->looks[i].signal)];
    if (rest) return RESTING;
    if (query->lane->arbiter.plain_left > 0.001) return RENEW;
    if ((core->tokens >= TRIAL || bank_is_short(core->bank)) && !known) return RENEW;
    double plain = raw[0] * price->value, change = costs->scales.machine / costs->machine_at_plain;
    double now = plain * (change < 0.5 ? 0.5 : change > 2.0 ? 2.0 : change);
    Offer offers[MOST_LOOKS], *order[MOST_LOOKS];
    int64_t count = 0;
    for (int64_t i = 0; i < query->count; i++) {
        const Look *look = &query->looks[i];
        if (core->tokens < look->standing->rests->until[place_of(look->signal)]) continue;
        Offer *offer = &offers[count];
        make_offer(core, look, raw, now, offer);
        if (count && offer->merit > order[0]->merit) {
            order[count] = order[0];
            order[0] = offer;
        } else {
            order[count] = offer;
        }
        count++;
    }
    return choose(core, order, count, raw, plain, now);
}

/* The same of one look, in arguments: writing them down would take longer. */
int64_t paceline_pacer_plan_one(
    Core *core, int64_t tokens, const Lane *lane, const Standing *standing, WatchedShift *own, int64_t context, int64_t max_draft,
    int64_t available, int64_t signal) {
    core->query.lane = lane;
    core->query.context = context;
    core->query.max_draft = max_draft;
    core->query.count = 1;
    core->query.looks[0] = (Look){standing, own, available, signal};
    return paceline_pacer_plan(core, tokens);
}

/* ---------- take in ---------- */

static int64_t rows_of(const Finished *record) { return record->rows ? record->rows : record->drafted + 1; }

static double plain_step(Core *core, int64_t context) { return measured(core, context, 1)[0] * core->costs->plain[1].value; }

static int same_kind(const Finished *one, const Finished *other) {
    return !one->standing && !other->standing && one->lane == other->lane && (one->flags & WARMUP) == (other->flags & WARMUP);
}

/* Whether everything that the rounds need is here. */
static int64_t check(Core *core, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const Finished *record = &core->finished[i];
        if (rows_of(record) > EXACT_ROWS || record->accepted >= MOST_DRAFT) return ASK;
        if (!measured(core, record->context, rows_of(record))) return NEED_CURVE;
    }
    return DONE;
}

/* Seconds beyond which a round was interrupted rather than dear: the worst that its plan was granted. */
static double ceiling_of(Core *core, const Finished *record) {
    if (record->round <= SUSPECT * record->expected) return INFINITY;
    const Costs *costs = core->costs;
    int64_t rows = rows_of(record);
    double worst = most(measured(core, record->context, rows)[rows - 1], record->expected);
    worst += line_worst(&costs->rest, (double)record->drafted);
    worst += costs->scales.machine * line_worst(record->standing->line, (double)record->drafted);
    return worst > 0.0 ? most(1.0 + 2.0 * costs->deviation, SUSPECT) * worst : INFINITY;
}

static void settle(Core *core, const Finished *record, Lesson *lesson) {
    double plain = plain_step(core, record->context), emitted = (double)record->emitted;
    double seconds = record->round != 0.0 ? record->round : record->verify + record->draft;
    double ceiling = ceiling_of(core, record), bounded = least(seconds, ceiling);
    bank_settle(core->bank, plain, emitted, record->flags & WARMUP ? bounded : seconds, ceiling);
    bank_settle(&record->lane->purse, plain, emitted, bounded, INFINITY);
    *lesson = (Lesson){record, plain, seconds, record->verify, emitted, 1.0};
}

static void settle_plain(Core *core, const Finished *records, int64_t count, Lesson *lesson) {
    const Finished *last = &records[count - 1];
    double rounds = (double)count, emitted = 0.0, looking = 0.0, verify = 0.0, whole = 0.0;
    double plain = plain_step(core, last->context);
    for (int64_t i = 0; i < count; i++) {
        emitted += (double)records[i].emitted;
        looking += records[i].draft + records[i].control;
        verify += records[i].verify;
        whole += records[i].round != 0.0 ? records[i].round : records[i].verify + records[i].draft;
    }
    bank_settle_plain(core->bank, plain, emitted, looking, rounds);
    bank_settle_plain(&last->lane->purse, plain, emitted, 0.0, 1.0);
    verify /= rounds;
    whole /= rounds;
    *lesson = (Lesson){last, plain, most(whole - looking / rounds, verify), verify, emitted, rounds};
}

/* Labels of a round, which lie in `given` where the rule told them. Returns how many. */
static int64_t labels_of(const Finished *record, const double *given, double *labels) {
    if (record->flags & TRUNCATED) return 0;
    for (int64_t j = 0; j < record->num_labels; j++) labels[j] = given[j];
    if (record->num_labels) return record->num_labels;
    for (int64_t j = 0; j < record->accepted; j++) labels[j] = 1.0;
    if (record->accepted >= (record->levels ? record->levels : record->drafted)) return record->accepted;
    labels[record->accepted] = 0.0;
    return record->accepted + 1;
}

/* What rounds of one request and drafter tell of its drafts. Returns the labels behind theirs. */
static const double *learn_quality(Core *core, const Lesson *lessons, int64_t count, const double *given) {
    const Finished *first = lessons[0].record;
    const Standing *standing = first->standing;
    double labels[MOST_GIVEN], hits = 0.0, expected = 0.0, expected_before = 0.0;
    int64_t now = core->tokens, total = 0, tells[MOST_FINISHED];
    for (int64_t i = 0; i < count; i++) {
        const Finished *record = lessons[i].record;
        int64_t bucket = signal_bucket(record->signal), known = tells[i] = labels_of(record, given, labels);
        given += record->num_labels;
        if (!known) continue;
        PositionTable *pool = standing->pools[bucket];
        const double *prior = standing->prior + bucket * POSITIONS;
        if (!pool_is_open(pool)) pool_begin(pool, prior, standing->level->odds);
        double sum = 0.0, rates = 0.0, before = 0.0;
        for (int64_t j = 0; j < known; j++) {
            sum += labels[j];
            rates += pool_rate(pool, j);
            if (j < POSITIONS) before += prior[j];
        }
        hits += sum;
        expected += rates;
        expected_before += before + prior[POSITIONS - 1] * (double)(known > POSITIONS ? known - POSITIONS : 0);
        total += known;
        pool_update(pool, labels, known);
    }
    if (total) {
        watched_update(first->own, total, hits, expected, now);
        shift_update(standing->level, (double)total, hits, expected_before, 0);
    }
    for (int64_t i = 0; i < count; i++) {
        const Finished *record = lessons[i].record;
        ProbeState *probe = standing->probes[signal_bucket(record->signal)];
        width_update(standing->width, record->drafted, record->levels);
        if (!(record->flags & PROBING))
            probe_pays(probe, now);
        else if (tells[i])
            probe_ran(probe, now, record->accepted > 0);
    }
    return given;
}

static void learn_verify(Costs *costs, int64_t rows, double ratio, double weight) {
    if (ratio > 0.0) scales_update(&costs->scales, rows, ratio, weight);
}

static void learn_plain(Core *core, const Lesson *lesson) {
    Costs *costs = core->costs;
    double raw = measured(core, lesson->record->context, 1)[0];
    if (raw > 0.0) {
        median_update(&costs->plain[1], lesson->seconds / raw, least(lesson->rounds, 1.0));
        learn_verify(costs, 1, lesson->verify / raw, lesson->rounds);
        costs->machine_at_plain = costs->scales.machine;
    }
    line_learn(&costs->rest, 0.0, lesson->seconds - lesson->verify);
    if (costs->plain[1].count >= TRUSTED) bank_correct_start(core->bank, plain_step(core, lesson->record->context));
}

static void learn_speculative(Core *core, const Lesson *lesson) {
    Costs *costs = core->costs;
    const Finished *record = lesson->record;
    int64_t rows = rows_of(record);
    double raw = measured(core, record->context, rows)[rows - 1], drafted = (double)record->drafted;
    if (raw > 0.0) learn_verify(costs, rows, record->verify / raw, 1.0);
    line_learn(record->standing->line, drafted, record->draft / costs->scales.machine);
    line_learn(&costs->rest, drafted, lesson->seconds - record->verify - record->draft);
    if (record->expected > 0.0 && record->drafted == record->planned) {
        double off = least(fabs(lesson->seconds / record->expected - 1.0), 1.0);
        costs->deviation += 0.05 * (off - costs->deviation);
    }
    int stale = fabs(costs->scales.machine / costs->machine_at_plain - 1.0) > OTHER_MACHINE;
    if (bank_is_short(core->bank) && stale) record->lane->arbiter.plain_left = RENEWAL;
}

static int teaches_costs(Costs *costs, int speculative) {
    if (!speculative) return 1;
    costs->drafted_rounds += 1;
    return costs->drafted_rounds % LESSON == 0 || costs->drafted_rounds <= SETTLED;
}

static void learn(Core *core, const Lesson *lessons, int64_t count) {
    const double *given = core->labels;
    for (int64_t i = 0, end; i < count; i = end) {
        const Finished *first = lessons[i].record;
        for (end = i + 1; end < count && lessons[end].record->own == first->own; end++) {}
        if (first->standing) given = learn_quality(core, lessons + i, end - i, given);
    }
    for (int64_t i = 0; i < count; i++) {
        const Lesson *lesson = &lessons[i];
        const Finished *record = lesson->record;
        if (record->flags & WARMUP) continue;
        int speculative = record->standing != 0;
        if (teaches_costs(core->costs, speculative)) speculative ? learn_speculative(core, lesson) : learn_plain(core, lesson);
        arbiter_observe(&record->lane->arbiter, lesson->plain, lesson->emitted, lesson->seconds, speculative, lesson->rounds);
    }
}

/* `Pacer._take_in` of the first finished rounds. */
int64_t paceline_pacer_take_in(Core *core, int64_t tokens, int64_t count) {
    core->tokens = tokens;
    int64_t ready = check(core, count), num_lessons = 0;
    if (ready != DONE) return ready;
    Lesson lessons[MOST_FINISHED];
    for (int64_t i = 0, end; i < count; i = end) {
        const Finished *first = &core->finished[i];
        for (end = i + 1; end < count && same_kind(&core->finished[end], first); end++) {}
        if (first->standing)
            settle(core, first, &lessons[num_lessons++]);
        else
            settle_plain(core, first, end - i, &lessons[num_lessons++]);
    }
    learn(core, lessons, num_lessons);
    return DONE;
}

/* Sizes of the structures, for a test that Python lays them out alike. */
int64_t paceline_pacer_size(int which) {
    const int64_t sizes[] = {sizeof(Core), sizeof(Standing), sizeof(Lane), sizeof(Costs), sizeof(PositionTable), sizeof(WatchedShift)};
    return sizes[which];
}

int paceline_pacer_abi(void) { return 1; }
