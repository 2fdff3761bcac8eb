/* The pacer's usual round of one sequence: `Pacer.plan` and `Pacer._take_in` in one call each. What runs after a forward finds cold
 * caches, so the time that counts is how much different code and data is touched. `core.py` hands over addresses of the pacer's own
 * state; whatever is rare is left to Python, which goes on with the same memory. Nothing is changed before it is sure that all can be
 * done here. */

#include "pacer_core.h"
#include "pacer_plan.h"

typedef struct {
    const Finished *record; /* the last one of those alike */
    double plain, seconds, verify, emitted, rounds;
} Lesson;

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
    double ceiling = ceiling_of(core, record), charged = seconds;
    if (record->flags & WARMUP) charged = least(seconds, record->expected != 0.0 ? record->expected : ceiling);
    bank_settle(core->bank, plain, emitted, charged, ceiling);
    bank_settle(&record->lane->purse, plain, emitted, least(charged, ceiling), INFINITY);
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

/* What rounds of one request and drafter tell where the drafter gave chances. Returns the chances behind theirs. */
static const double *learn_chances(Core *core, const Lesson *lessons, int64_t count, const double *given, int64_t *tells) {
    const Finished *first = lessons[0].record;
    ChanceTable *table = first->standing->chances;
    double hits = 0.0, expected = 0.0, believed[MOST_GIVEN];
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        const Finished *record = lessons[i].record;
        int64_t known = record->num_labels;
        tells[i] = !(record->flags & TRUNCATED);
        if (tells[i]) {
            double sum = 0.0;
            chances_believed(table, given, known, believed);
            for (int64_t j = 0; j < known; j++) sum += believed[j];
            expected += sum;
            hits += (double)__builtin_popcountll(record->path);
            total += known;
            chances_update(table, given, known, record->path);
        }
        given += known;
    }
    if (total) watched_update(first->own, total, hits, expected, core->tokens);
    return given;
}

/* As `learn_chances`, by position. Returns the labels behind theirs. */
static const double *learn_positions(Core *core, const Lesson *lessons, int64_t count, const double *given, int64_t *tells) {
    const Finished *first = lessons[0].record;
    const Standing *standing = first->standing;
    double labels[MOST_GIVEN], hits = 0.0, expected = 0.0, expected_before = 0.0;
    int64_t now = core->tokens, total = 0;
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
    for (int64_t i = 0; i < count; i++) width_update(standing->width, lessons[i].record->drafted, lessons[i].record->levels);
    return given;
}

/* What rounds of one request and drafter tell of its drafts. Returns the labels behind theirs. */
static const double *learn_quality(Core *core, const Lesson *lessons, int64_t count, const double *given) {
    const Standing *standing = lessons[0].record->standing;
    int64_t now = core->tokens, tells[MOST_FINISHED];
    int knows = 0;
    for (int64_t i = 0; i < count; i++) knows |= (lessons[i].record->flags & KNOWS) != 0;
    given = (knows ? learn_chances : learn_positions)(core, lessons, count, given, tells);
    for (int64_t i = 0; i < count; i++) {
        const Finished *record = lessons[i].record;
        ProbeState *probe = standing->probes[record->flags & KNOWS ? 0 : signal_bucket(record->signal)];
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

/* `offers.state_of`. */
static int64_t state_of(const Core *core) {
    const TimeBank *bank = core->bank;
    int64_t state = bank->saving_for > 0.0 ? SAVES : 0;
    if (bank_is_short(bank)) state |= SHORT;
    if (bank_is_ample(bank)) state |= AMPLE;
    if (core->costs->plain[1].count >= TRUSTED) state |= PRICED;
    return state;
}

/* `Pacer._take_in` of the first finished rounds; above the answer, the state afterwards. */
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
    return DONE | state_of(core) << 8;
}

/* Sizes of the structures, for a test that Python lays them out alike. */
int64_t paceline_pacer_size(int which) {
    const int64_t sizes[] = {sizeof(Core), sizeof(Standing), sizeof(Lane), sizeof(Costs), sizeof(PositionTable), sizeof(WatchedShift), sizeof(ChanceTable)};
    return sizes[which];
}

int paceline_pacer_abi(void) { return 2; }
