// The index of suffix_index.py and the search of speculation.py once more, compiled: the same places, shares and scores. Read those
// first, they are the reference. Nothing here is thread-safe. Every function is short, so callers keep the interpreter's lock.
#include "suffix_walks.h"

int paceline_suffix_abi(void) { return ABI; }

static uint64_t bucket(const Entry *entry, int32_t size, uint64_t mask) {
    uint64_t hash = 0;
    for (int32_t i = 0; i < size; i++) hash = hash * 0x9E3779B97F4A7C15u + (uint64_t)(entry[i].token + 1);
    return (hash ^ hash >> 32) & mask;
}

// ---------- the index ----------

void paceline_suffix_close(Index *index) {
    free(index->entries);
    free(index->starts);
    free(index->heads);
    free(index);
}

Index *paceline_suffix_open(int table_bits) {
    Index *index = calloc(1, sizeof *index);
    if (!index) return NULL;
    index->mask = ((uint64_t)1 << table_bits) - 1;
    index->heads = calloc(SIZES * (index->mask + 1), sizeof *index->heads);
    index->starts = calloc(1, sizeof *index->starts);
    index->num_starts = index->start_capacity = 1;
    if (!index->heads || !index->starts) {
        paceline_suffix_close(index);
        return NULL;
    }
    return index;
}

int64_t paceline_suffix_length(const Index *index) { return index->length; }

int64_t paceline_suffix_bytes(const Index *index) {
    return index->capacity * (int64_t)sizeof(Entry) + index->start_capacity * (int64_t)sizeof(int32_t)
           + SIZES * (int64_t)(index->mask + 1) * (int64_t)sizeof(int32_t) + (int64_t)sizeof *index;
}

static int reserve(Index *index, int64_t wanted) {
    if (wanted <= index->capacity) return 1;
    int64_t capacity = index->capacity + index->capacity / 4 + 256;
    if (capacity < wanted) capacity = wanted;
    Entry *grown = realloc(index->entries, (size_t)capacity * sizeof(Entry));
    if (!grown) return 0;
    index->entries = grown;
    index->capacity = capacity;
    return 1;
}

// Appends to the last sequence; 0 when memory ran out.
int paceline_suffix_extend(Index *index, const int32_t *tokens, int64_t count) {
    if (!reserve(index, index->length + count)) return 0;
    int64_t start = index->starts[index->num_starts - 1];
    for (int64_t i = 0; i < count; i++) {
        Entry *entry = &index->entries[index->length++];
        entry->token = tokens[i];
        for (int s = 0; s < SIZES; s++) {
            entry->link[s] = 0;
            if (GRAM[s] > index->length - start) continue;
            int32_t *head = &index->heads[s * (index->mask + 1) + bucket(entry + 1 - GRAM[s], GRAM[s], index->mask)];
            entry->link[s] = *head;
            *head = (int32_t)index->length;
        }
    }
    return 1;
}

// What follows belongs to another sequence; 0 when memory ran out.
int paceline_suffix_end_sequence(Index *index) {
    if (index->num_starts == index->start_capacity) {
        int64_t capacity = 2 * index->start_capacity;
        int32_t *grown = realloc(index->starts, (size_t)capacity * sizeof *grown);
        if (!grown) return 0;
        index->starts = grown;
        index->start_capacity = capacity;
    }
    if (!reserve(index, index->length + 1)) return 0;
    index->entries[index->length++] = (Entry){.token = BREAK};
    index->starts[index->num_starts++] = (int32_t)index->length;
    return 1;
}

static void shift(int32_t *place, int32_t excess) { *place = *place > excess ? *place - excess : 0; }

// Forgets whole sequences, oldest first, until at most `num_tokens` are left or one sequence.
void paceline_suffix_drop_to(Index *index, int64_t num_tokens) {
    int64_t dropped = 0;
    while (dropped + 1 < index->num_starts && index->length - index->starts[dropped] > num_tokens) dropped++;
    int32_t excess = index->starts[dropped];
    index->length -= excess;
    index->num_starts -= dropped;
    memmove(index->entries, index->entries + excess, (size_t)index->length * sizeof(Entry));
    memmove(index->starts, index->starts + dropped, (size_t)index->num_starts * sizeof *index->starts);
    for (int64_t i = 0; i < index->num_starts; i++) index->starts[i] -= excess;
    for (uint64_t i = 0; i < SIZES * (index->mask + 1); i++) shift(&index->heads[i], excess);
    for (int64_t i = 0; i < index->length; i++)
        for (int s = 0; s < SIZES; s++) shift(&index->entries[i].link[s], excess);
}

// ---------- places ----------

// How many tokens before position `at` agree with the end of a text.
static int32_t agreement(const Index *index, int32_t at, const Entry *text_end, int32_t longest) {
    int32_t matched = 0;
    if (longest > at) longest = at;
    while (matched < longest && index->entries[at - 1 - matched].token == text_end[-1 - matched].token) matched++;
    return matched;
}

// Appends the new places of one size of n-gram, longest matches first; returns their number.
static int find_places(const Index *index, int s, const Entry *text_end, int32_t tail, int32_t limit, Place *places, int known) {
    if (GRAM[s] > tail) return 0;
    int found = 0;
    int32_t at = index->heads[s * (index->mask + 1) + bucket(text_end - GRAM[s], GRAM[s], index->mask)];
    for (int32_t steps = 2 * limit; at > 0 && steps && known + found < limit; steps--) {
        int seen = 0;
        for (int i = 0; i < known + found && !seen; i++) seen = places[i].start == at;
        if (!seen) {
            int32_t matched = agreement(index, at, text_end, tail);
            if (matched >= GRAM[s]) {  // else a collision of hashes
                int slot = known + found++;
                for (; slot > known && places[slot - 1].matched < matched; slot--) places[slot] = places[slot - 1];
                places[slot] = (Place){matched, at};
            }
        }
        at = index->entries[at - 1].link[s];
    }
    return found;
}

// ---------- the search ----------

static int budget_of(const Query *query, int32_t matched, int max_tokens) {
    double allowed = matched * query->factor + query->offset + 1e-6;
    if (max_tokens > MOST_TOKENS) max_tokens = MOST_TOKENS;
    return allowed < max_tokens ? (int)allowed : max_tokens;
}

// The chain that `index` proposes after the end of `text` and that scores above `to_beat`: 1 and `found`, or 0.
int paceline_suffix_search(const Index *index, const Index *text, const Query *query, int max_tokens, double to_beat, Found *found) {
    Place places[MOST_PLACES];
    Found trial;
    Walk walk = {.query = query, .found = &trial, .text = text};
    int known = 0, better = 0;
    int32_t tail = text->length < query->max_match ? (int32_t)text->length : query->max_match;
    const Entry *text_end = text->entries + text->length;
    for (int s = 0; s < SIZES; s++) {
        int last = known + find_places(index, s, text_end, tail, query->max_places, places, known);
        for (int i = known; i < last; i++) {
            if (i + 1 < last && places[i + 1].matched == places[i].matched) continue;
            walk.budget = budget_of(query, places[i].matched, max_tokens);
            if (walk.budget <= to_beat) return better;
            walk.places = 0;
            for (int j = 0; j <= i; j++) add_place(&walk, index, places[j].start, 1.0);
            trial.count = 0;
            trial.score = 0.0;
            path_walk(&walk);
            if (trial.score <= to_beat) continue;
            trial.matched = places[i].matched;
            *found = trial;
            to_beat = trial.score;
            better = 1;
        }
        known = last;
    }
    return better;
}

// The tree of what followed the end of `text`, there and in `past`, and of what the table says, by votes.
void paceline_suffix_vote(const Index *text, const Index *past, const Query *query, int max_tokens, Found *found) {
    Place places[MOST_PLACES];
    Walk walk;  // most of it is never used, and to clear it takes long
    walk.query = query, walk.found = found, walk.text = text, walk.places = 0;
    int32_t tail = text->length < query->max_match ? (int32_t)text->length : query->max_match, longest = 0;
    found->count = 0;
    found->score = 0.0;
    for (int pass = 0; pass < 2; pass++) {
        const Index *index = pass ? past : text;
        int known = 0;
        for (int s = 0; s < SIZES; s++)
            known += find_places(index, s, text->entries + text->length, tail, query->max_places, places, known);
        for (int i = 0; i < known; i++) {
            if (index == text && places[i].start == text->length) continue;  // the end itself
            int32_t matched = places[i].matched;
            add_place(&walk, index, places[i].start, (pass ? query->past_weight : 1.0) * (matched * matched));
            if (matched > longest) longest = matched;
        }
    }
    walk.budget = max_tokens < MOST_TOKENS ? max_tokens : MOST_TOKENS;
    tree_walk(&walk, query->unknown * (longest < query->most_unknown ? longest : query->most_unknown));
    found->matched = longest;
}

// Appends tokens to `text`, and searches it and then `past`. Returns -1 when memory ran out, 0 for no proposal, else the number of
// tokens in bits 0-7, and above: of a tree the estimate of its first token in 255ths, of a chain in bits 8-9 one more than whether
// the places agree on its first token, and the tokens that matched above.
int paceline_suffix_look(Index *text, const int32_t *tokens, int64_t count, const Index *past, const Query *query, int max_tokens,
                         Found *found) {
    found->count = 0;
    found->score = 0.0;
    if (!paceline_suffix_extend(text, tokens, count)) return -1;
    if (query->tree) {
        paceline_suffix_vote(text, past, query, max_tokens, found);
    } else {
        paceline_suffix_search(text, text, query, max_tokens, 0.0, found);
        paceline_suffix_search(past, text, query, max_tokens, found->score / query->past_weight, found);
    }
    if (!found->count) return 0;
    if (query->tree) return found->count | (int)(found->confidences[0] * 255.0) << 8;
    int agrees = (found->confidences[0] > query->agreed) - (found->confidences[0] < query->contested);
    return found->count | (agrees + 1) << 8 | found->matched << 10;
}
