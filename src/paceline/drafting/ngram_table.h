// The look-up of ngram_table.py once more, compiled. Read that first, it is the reference.
#include <stdint.h>

enum { WIDTH = 3, MOST_ORDERS = 8 };

typedef struct {  // as in ngram_table.py
    const uint32_t *starts;   // of each bucket
    const uint16_t *checks;
    const uint32_t *tokens;   // WIDTH for each check
    const uint8_t *chances;   // likewise, in 256ths
    int32_t orders;
} Table;

// Where the longest known context at the end of a text is in a table; -1: nowhere. latest: the text's last tokens, last one first.
// Nothing of the table is in a cache, so what all orders need is fetched at once.
static int64_t find_context(const Table *table, const int32_t *latest, int32_t count) {
    uint32_t keys[MOST_ORDERS], first[MOST_ORDERS], last[MOST_ORDERS];
    if (count > table->orders) count = table->orders;
    for (int32_t order = count; order > 0; order--) {
        uint64_t value = (uint64_t)order;
        for (int32_t i = order - 1; i >= 0; i--) value = value * 0x9E3779B97F4A7C15u + (uint64_t)(latest[i] + 1);
        value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9u;
        keys[order - 1] = (uint32_t)(value >> 32);
        __builtin_prefetch(&table->starts[keys[order - 1] >> 16]);
    }
    for (int32_t i = 0; i < count; i++) {
        first[i] = table->starts[keys[i] >> 16];
        last[i] = table->starts[(keys[i] >> 16) + 1];
        __builtin_prefetch(&table->checks[first[i]]);
    }
    for (int32_t i = count - 1; i >= 0; i--)
        for (uint32_t at = first[i]; at < last[i]; at++)
            if (table->checks[at] == (uint16_t)keys[i]) return at;
    return -1;
}
