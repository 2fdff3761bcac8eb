// What suffix_index.c and suffix_walks.h speak of.
#ifndef PACELINE_SUFFIX_INDEX_H
#define PACELINE_SUFFIX_INDEX_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ngram_table.h"

enum { ABI = 4, SIZES = 3, BREAK = -1, MOST_PLACES = 64, MOST_TOKENS = 64 };
static const int32_t GRAM[SIZES] = {6, 2, 1};

typedef struct {
    int32_t token;
    int32_t link[SIZES];  // the place before this one in the chain of the n-grams that end here; 0 ends a chain
} Entry;

typedef struct {
    Entry *entries;
    int32_t *starts;       // where each sequence begins, oldest first
    int32_t *heads;        // SIZES tables of mask + 1 places: position behind the latest n-gram of a bucket, 0 for none
    int64_t length, capacity, num_starts, start_capacity;
    uint64_t mask;
} Index;

typedef struct {
    double factor, offset, min_prob, contested, agreed, past_weight, unknown;
    const int32_t *end_ids;
    const Table *table;  // NULL: none
    int32_t num_end_ids, max_match, max_places, tree, most_unknown;
} Query;

typedef struct {
    double confidences[MOST_TOKENS], chances[MOST_TOKENS], score;
    int32_t tokens[MOST_TOKENS], parents[MOST_TOKENS];
    int32_t count, matched;
} Found;

typedef struct { int32_t matched, start; } Place;
#endif
