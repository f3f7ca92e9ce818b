/* Puts rows in order that were given in any, and more than once; counts the steps of rows. */
#include "flags.h"
#include "kernels.h"

#include <string.h>

fo_row_look fo_look_at_rows(const int64_t *indices, ptrdiff_t k, int64_t count)
{
    fo_row_look look = {.bad = -1, .ascends = 1};
    int64_t before = -1;
    for (ptrdiff_t i = 0; i < k; i++) {
        if (indices[i] < 0 || indices[i] >= count) {
            look.bad = i;
            break;
        }
        look.ascends &= indices[i] > before;
        before = indices[i];
    }
    return look;
}

/* A radix sort from the lowest digit up, which keeps the order of equal numbers. All digits have
 * about the same length: fewer places to write to at a time. */
enum { MOST_BITS = 11 };

ptrdiff_t fo_sort_rows(const int64_t *indices, ptrdiff_t k, int64_t count, int64_t *rows,
                       ptrdiff_t *starts, ptrdiff_t *order, int64_t *scratch)
{
    int64_t *keys = rows, *other_keys = scratch;
    ptrdiff_t *places = order, *other_places = (ptrdiff_t *)(void *)(scratch + k);
    memcpy(keys, indices, (size_t)k * sizeof *keys);
    for (ptrdiff_t i = 0; i < k; i++)
        places[i] = i;
    int bits = 0;
    while (bits < 63 && (count - 1) >> bits > 0)
        bits++;
    const int passes = (bits + MOST_BITS - 1) / MOST_BITS;
    const int digit_bits = passes > 0 ? (bits + passes - 1) / passes : 0;
    const int64_t mask = ((int64_t)1 << digit_bits) - 1;
    for (int shift = 0; shift < bits; shift += digit_bits) {
        ptrdiff_t begins[(1 << MOST_BITS) + 1] = {0};
        for (ptrdiff_t i = 0; i < k; i++)
            begins[1 + ((keys[i] >> shift) & mask)]++;
        for (int64_t digit = 0; digit < mask; digit++)
            begins[digit + 1] += begins[digit];
        for (ptrdiff_t i = 0; i < k; i++) {
            const ptrdiff_t to = begins[(keys[i] >> shift) & mask]++;
            other_keys[to] = keys[i];
            other_places[to] = places[i];
        }
        int64_t *const keys_now = other_keys;
        ptrdiff_t *const places_now = other_places;
        other_keys = keys, other_places = places;
        keys = keys_now, places = places_now;
    }
    if (places != order)
        memcpy(order, places, (size_t)k * sizeof *order);
    ptrdiff_t n = 0;
    for (ptrdiff_t i = 0; i < k; i++) {
        const int64_t row = keys[i]; /* keys may be `rows`: no place after i is written */
        if (n == 0 || row != rows[n - 1]) {
            starts[n] = i;
            rows[n++] = row;
        }
    }
    starts[n] = k;
    return n;
}

ptrdiff_t fo_number_counts(const int64_t *counts, const int64_t *rows, ptrdiff_t k, int64_t *values,
                           int32_t *numbers, int32_t *table, ptrdiff_t slots)
{
    enum { AHEAD = 16 };
    ptrdiff_t n = 0;
    int64_t before = 0;
    memset(table, 0xff, (size_t)slots * sizeof *table);
    for (ptrdiff_t i = 0; i < k; i++) {
        if (rows != NULL && i + AHEAD < k)
            __builtin_prefetch(&counts[rows[i + AHEAD]]);
        const int64_t count = counts[rows != NULL ? rows[i] : i];
        if (count == before && i > 0) {
            numbers[i] = numbers[i - 1];
            continue;
        }
        before = count;
        uint64_t slot = fo_mix((uint64_t)count) & (uint64_t)(slots - 1);
        while (table[slot] >= 0 && values[table[slot]] != count)
            slot = (slot + 1) & (uint64_t)(slots - 1);
        if (table[slot] < 0) {
            if (count < 0 || count >= (int64_t)1 << 62) {
                values[0] = count;
                return FO_NO_COUNT;
            }
            if (n == slots / 2)
                return FO_NO_ROOM;
            table[slot] = (int32_t)n;
            values[n++] = count;
        }
        numbers[i] = table[slot];
    }
    return n;
}

void fo_add_counts(int64_t *counts, const int64_t *rows, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < k; i++)
        counts[rows != NULL ? rows[i] : i]++;
}
