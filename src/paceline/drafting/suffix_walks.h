// What follows several places of the index at once: a path of votes, or a tree of them.
#ifndef PACELINE_SUFFIX_WALKS_H
#define PACELINE_SUFFIX_WALKS_H

#include "suffix_index.h"

typedef struct { int32_t token, count; double weight; } Group;

enum { MOST_VOTERS = 2 * MOST_PLACES };

typedef struct {
    const Index *index[MOST_VOTERS];  // where each place is
    int32_t at[MOST_VOTERS];          // where it has come to
    int32_t owner[MOST_VOTERS];       // the node, by its number of creation, whose path it agrees with; 0 is the root
    double weight[MOST_VOTERS];       // its vote, in trees
    const Index *text;                // behind its end stands what is being proposed; NULL: nothing does
    const Query *query;
    Found *found;
    int32_t places, budget;
} Walk;

static void add_place(Walk *walk, const Index *index, int32_t start, double weight) {
    int i = walk->places++;
    walk->index[i] = index;
    walk->at[i] = start;
    walk->owner[i] = 0;
    walk->weight[i] = weight;
}

// The token that a place of the path to node `leaf`, which is `depth` deep, has come to.
static int32_t token_at(const Walk *walk, int place, int32_t leaf, int32_t depth) {
    const Index *index = walk->index[place];
    int64_t beyond = walk->at[place] - index->length;
    if (beyond < 0) return index->entries[walk->at[place]].token;
    if (index != walk->text || beyond >= depth) return BREAK;
    for (; depth > beyond + 1; depth--) leaf = walk->found->parents[leaf];
    return walk->found->tokens[leaf];
}

// Adds `weight` votes to what the table says after the path to node `leaf` of `walk`, or nothing; returns the number of groups.
static int consult(const Walk *walk, int32_t leaf, double weight, Group *groups, int count) {
    const Table *table = walk->query->table;
    int32_t latest[MOST_ORDERS], known = 0;
    for (; leaf >= 0 && known < table->orders; leaf = walk->found->parents[leaf]) latest[known++] = walk->found->tokens[leaf];
    for (int64_t at = walk->text->length; at > 0 && known < table->orders;) latest[known++] = walk->text->entries[--at].token;
    int64_t at = find_context(table, latest, known);
    for (int i = 0; at >= 0 && i < WIDTH; i++) {
        uint8_t chance = table->chances[WIDTH * at + i];
        if (!chance) continue;
        int32_t token = (int32_t)table->tokens[WIDTH * at + i];
        int g = 0;
        while (g < count && groups[g].token != token) g++;
        if (g == count) groups[count++] = (Group){token, 0, 0.0};
        groups[g].weight += weight * ((chance + 0.5) / 256.0);
    }
    return count;
}

// Groups the places of `owner` by the token they have come to, in order of first appearance; returns the number of groups.
static int group(const Walk *walk, int32_t owner, int32_t leaf, int32_t depth, Group *groups) {
    int count = 0;
    for (int i = 0; i < walk->places; i++) {
        int32_t token = walk->owner[i] == owner ? token_at(walk, i, leaf, depth) : BREAK;
        if (token == BREAK) continue;
        int g = 0;
        while (g < count && groups[g].token != token) g++;
        if (g == count) groups[count++] = (Group){token, 0, 0.0};
        groups[g].count++;
        groups[g].weight += walk->weight[i];
    }
    return count;
}

// Moves the places of `owner` that continue with `token` one on and gives them to `heir`; the others are left behind.
static void advance(Walk *walk, int32_t owner, int32_t leaf, int32_t depth, int32_t token, int32_t heir) {
    for (int i = 0; i < walk->places; i++)
        if (walk->owner[i] == owner && token_at(walk, i, leaf, depth) == token) {
            walk->at[i]++;
            walk->owner[i] = heir;
        }
}

static int is_end(const Query *query, int32_t token) {
    for (int32_t i = 0; i < query->num_end_ids; i++)
        if (query->end_ids[i] == token) return 1;
    return 0;
}

static void emit(Found *found, int32_t token, int32_t parent, double share, double path) {
    found->tokens[found->count] = token;
    found->parents[found->count] = parent;
    found->chances[found->count] = path;
    found->confidences[found->count++] = share;
    found->score += path;
}

// Follow the most frequent token from step to step.
static void path_walk(Walk *walk) {
    Group groups[MOST_PLACES];
    Found *found = walk->found;
    int32_t alive = walk->places;
    double path = 1.0;
    while (found->count < walk->budget) {
        int32_t depth = found->count, leaf = depth - 1;
        int count = group(walk, depth, leaf, depth, groups), best = 0;
        if (!count) break;
        for (int g = 1; g < count; g++)
            if (groups[g].count > groups[best].count) best = g;
        double share = (double)groups[best].count / alive;
        path *= share;
        if (path < walk->query->min_prob) break;
        advance(walk, depth, leaf, depth, groups[best].token, depth + 1);
        emit(found, groups[best].token, leaf, share, path);
        if (is_end(walk->query, groups[best].token)) break;
        alive = groups[best].count;
    }
}

typedef struct { double path, share; int32_t parent, token, owner, depth; } Node;

static int before(const Node *a, const Node *b) {
    if (a->path != b->path) return a->path > b->path;
    if (a->parent != b->parent) return a->parent < b->parent;
    if (a->share != b->share) return a->share < b->share;
    return a->token < b->token;
}

// The weight of all places of `owner`, and whether there are any.
static double weigh(const Walk *walk, int32_t owner, int *any) {
    double total = 0.0;
    *any = 0;
    for (int i = 0; i < walk->places; i++)
        if (walk->owner[i] == owner) {
            total += walk->weight[i];
            *any = 1;
        }
    return total;
}

enum { MOST_WAITING = MOST_VOTERS + WIDTH * (MOST_TOKENS + 1) };

// Emit the paths with the largest estimates first. Waiting nodes own disjoint places, or are what the table says. unknown: votes
// beside those of the places on the first token.
static void tree_walk(Walk *walk, double unknown) {
    Group groups[MOST_VOTERS + WIDTH];
    Node waiting[MOST_WAITING];
    Found *found = walk->found;
    int count = 0;
    int32_t owners = 0;
    Node from = {.path = 1.0, .parent = -1, .token = BREAK};
    for (;;) {
        int32_t leaf = found->count - 1;
        int any = 0, num_groups = 0;
        double total = 0.0;
        if (!is_end(walk->query, from.token)) {
            double weight = weigh(walk, from.owner, &any), open_votes = any ? unknown / (1.0 + 0.5 * from.depth) : 1.0;
            if (any) num_groups = group(walk, from.owner, leaf, from.depth, groups);
            if (walk->query->table && open_votes > 0.0) num_groups = consult(walk, leaf, open_votes, groups, num_groups);
            total = weight + open_votes;
        }
        for (int g = 0; g < num_groups; g++) {
            double share = groups[g].weight / total, path = from.path * share;
            if (path < walk->query->min_prob) continue;
            owners++;
            if (groups[g].count) advance(walk, from.owner, leaf, from.depth, groups[g].token, owners);
            waiting[count++] = (Node){path, share, leaf, groups[g].token, owners, from.depth + 1};
        }
        if (!count || found->count >= walk->budget) return;
        int best = 0;
        for (int i = 1; i < count; i++)
            if (before(&waiting[i], &waiting[best])) best = i;
        from = waiting[best];
        waiting[best] = waiting[--count];
        emit(found, from.token, from.parent, from.share, from.path);
    }
}
#endif
