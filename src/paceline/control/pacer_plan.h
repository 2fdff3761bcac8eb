/* `Pacer.plan`: the offers of drafters, and the choice among them. */

#ifndef PACELINE_PACER_PLAN_H
#define PACELINE_PACER_PLAN_H

#include "pacer_core.h"

typedef struct {
    const Look *look;
    int64_t bucket, num_draft;
    double emitted, merit, rates[MOST_DRAFT], seconds[EXACT_ROWS];
} Offer;

static void find_rates(const Look *look, int64_t bucket, int64_t count, double *rates) {
    const Standing *standing = look->standing;
    const PositionTable *pool = standing->pools[bucket];
    const double *prior = standing->prior + bucket * POSITIONS, odds = look->own->shift.odds;
    if (look->chances) {
        double last = 1.0, chance;
        chances_believed(standing->chances, look->chances, count, rates);
        for (int64_t j = 0; j < count; j++, last = chance) {
            chance = with_odds(rates[j], odds);
            rates[j] = last > 0.0 ? chance / last : 0.0;
        }
        return;
    }
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
    offer->bucket = look->chances ? 0 : signal_bucket(look->signal);
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
    if (core->bank->saving_for > 0.0) return SAVING;
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
    int64_t available, int64_t signal, const double *chances) {
    core->query.lane = lane;
    core->query.context = context;
    core->query.max_draft = max_draft;
    core->query.count = 1;
    core->query.looks[0] = (Look){standing, own, available, signal, chances};
    return paceline_pacer_plan(core, tokens);
}

#endif
