/* Steps leaves of rows, and compares each with a leaf of the same rows, gathered here, whose
 * gradient is added up here, or of rows with constants of their own with a leaf for each row: of
 * every rule that takes rows, on each instruction set, on one thread and on several. Arrays are no
 * larger than they must be, for AddressSanitizer to see.
 *
 *     rows [rounds] */
#include "lists.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* An array of n elements at an address that is not aligned to cache lines. */
static void *make(ptrdiff_t n, size_t size)
{
    void *memory = calloc((size_t)n + 1, size);
    if (memory == NULL)
        abort();
    return memory;
}

static void fill(source *s, void *data, ptrdiff_t n, int is_double)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double x = (double)(random_bits(s) % 2001) / 1000 - 1;
        if (is_double)
            ((double *)data)[i] = x;
        else
            ((float *)data)[i] = (float)x;
    }
}

/* Copies rows between arrays of which one has them all. */
static void copy_rows(void *some, void *all, const int64_t *rows, ptrdiff_t n, size_t bytes,
                      int back)
{
    for (ptrdiff_t j = 0; j < n; j++) {
        char *a = (char *)some + (size_t)j * bytes, *b = (char *)all + (size_t)rows[j] * bytes;
        memcpy(back ? b : a, back ? a : b, bytes);
    }
}

static void add(void *to, const void *from, ptrdiff_t n, int is_double)
{
    for (ptrdiff_t i = 0; i < n; i++)
        if (is_double)
            ((double *)to)[i] += ((const double *)from)[i];
        else
            ((float *)to)[i] += ((const float *)from)[i];
}

/* Whether both ways give the same bytes and sums. */
static int agrees(source *s, int rule, int is_double, int threads)
{
    enum { ARRAYS = 1 + FO_MAX_STATES };
    const fo_format format = is_double ? FO_F64 : FO_F32;
    const size_t size = is_double ? sizeof(double) : sizeof(float);
    const ptrdiff_t length = 1 + choose(s, 1200), count = 1 + choose(s, 90), k = choose(s, 150);
    const size_t bytes = (size_t)length * size;
    int64_t *indices = make(k, 8), *rows = make(k, 8), *scratch = make(2 * k, 8);
    ptrdiff_t *starts = make(k + 1, sizeof *starts), *order = make(k, sizeof *order);
    for (ptrdiff_t i = 0; i < k; i++)
        indices[i] = choose(s, count);
    const ptrdiff_t n = fo_sort_rows(indices, k, count, rows, starts, order, scratch);
    const fo_row_look look = fo_look_at_rows(rows, n, count);
    int same = look.bad < 0 && look.ascends;
    same = same && (n == 0 || fo_look_at_rows(rows, n, rows[n - 1]).bad == n - 1);

    void *given = make(k * length, size), *grad = make(n * length, size);
    fill(s, given, k * length, is_double);
    for (ptrdiff_t j = 0; j < n; j++)
        for (ptrdiff_t i = starts[j]; i < starts[j + 1]; i++) {
            char *to = (char *)grad + (size_t)j * bytes;
            const char *from = (char *)given + (size_t)order[i] * bytes;
            same = same && indices[order[i]] == rows[j];
            if (i == starts[j])
                memcpy(to, from, bytes);
            else
                add(to, from, length, is_double);
        }

    void *all[ARRAYS], *expected[ARRAYS], *some[ARRAYS];
    const int arrays = 1 + fo_rules()[rule].required;
    for (int a = 0; a < arrays; a++) {
        all[a] = make(count * length, size);
        expected[a] = make(count * length, size);
        some[a] = make(n * length, size);
        if (a == 0)
            fill(s, all[0], count * length, is_double);
        memcpy(expected[a], all[a], (size_t)count * bytes);
        copy_rows(some[a], expected[a], rows, n, bytes, 0);
    }
    enum { HYPERS = 3 };
    fo_hyper hypers[HYPERS] = {{.grad_scale = 0.5, .l2 = 0.1}};
    for (int h = 0; h < HYPERS; h++) {
        hypers[h] = hypers[0];
        for (int i = 0; i < FO_MAX_SCALARS; i++)
            hypers[h].scalars[i] = 0.25 * (1 + h);
    }
    fo_rows by = {.length = length, .rows = rows, .order = order, .starts = starts};
    int32_t *numbers = make(n, sizeof *numbers);
    for (ptrdiff_t j = 0; j < n; j++)
        numbers[j] = (int32_t)choose(s, HYPERS);
    const int differ = (int)choose(s, 2); /* whether rows have constants of their own */
    by.hypers = differ ? numbers : NULL;
    fo_leaf ours = {.n = n * length, .grad_scale = 1, .by_rows = &by}, theirs = ours;
    theirs.by_rows = NULL;
    for (int a = 0; a < arrays; a++) {
        *(a == 0 ? &ours.param : &ours.state[a - 1]) = (fo_array){.data = all[a], .format = format};
        *(a == 0 ? &theirs.param : &theirs.state[a - 1]) =
            (fo_array){.data = some[a], .format = format};
    }
    ours.grad = (fo_array){.data = given, .format = format};
    theirs.grad = (fo_array){.data = grad, .format = format};
    if (differ && n > 0) {
        const int32_t good = numbers[n - 1];
        numbers[n - 1] = choose(s, 2) ? HYPERS : -1;
        same = same && fo_step(rule, &ours, 1, hypers, HYPERS, NULL, threads) == FO_BAD_ARGUMENT &&
               memcmp(all[0], expected[0], (size_t)count * bytes) == 0;
        numbers[n - 1] = good;
    }
    for (ptrdiff_t j = 0; differ && j < n; j++) { /* each row is a leaf */
        fo_leaf row = theirs;
        row.n = length, row.hyper = numbers[j];
        row.grad.data = (char *)grad + (size_t)j * bytes;
        row.param.data = (char *)some[0] + (size_t)j * bytes;
        for (int a = 1; a < arrays; a++)
            row.state[a - 1].data = (char *)some[a] + (size_t)j * bytes;
        same = same && fo_step(rule, &row, 1, hypers, HYPERS, NULL, threads) == FO_OK;
    }
    fo_stats stats[2];
    memset(stats, 0, sizeof stats);
    for (int i = 0; i < 2 - differ; i++) {
        fo_leaf *leaf = i == 0 ? &ours : &theirs;
        fo_run run = {.measure = FO_MEASURE_LEAF, .stats = &stats[i]};
        run.tiles = make(fo_count_tiles(leaf, 1), sizeof *run.tiles);
        same = same && fo_measure(leaf, 1, &run, threads) == FO_OK;
        run.has_grad = 1;
        same = same && fo_step(rule, leaf, 1, hypers, HYPERS, &run, threads) == FO_OK;
        free(run.tiles);
    }
    same = same && (differ || memcmp(&stats[0], &stats[1], sizeof stats[0]) == 0);
    for (int a = 0; a < arrays; a++) {
        copy_rows(some[a], expected[a], rows, n, bytes, 1);
        same = same && memcmp(all[a], expected[a], (size_t)count * bytes) == 0;
        free(all[a]), free(expected[a]), free(some[a]);
    }
    free(indices), free(rows), free(scratch), free(starts), free(order), free(given), free(grad);
    free(numbers);
    return same;
}

int main(int count, char **arguments)
{
    const int rounds = count > 1 ? atoi(arguments[1]) : 20;
    int tried = 0, failed = 0;
    fo_force_threads(1);
    for (int rule = 0; rule < rule_count(); rule++)
        for (int i = 0; fo_rules()[rule].kind < FO_LAYERWISE && i < rounds; i++)
            for (int k = 0; tested_isas()[k] != NULL; k++) {
                source s = source_seeded((uint64_t)i);
                fo_select_isa(tested_isas()[k]);
                tried++;
                if (agrees(&s, rule, i % 3 == 0, 1 + 2 * (i % 2)))
                    continue;
                failed++;
                printf("DIFFERS: %s on %s, round %d\n", fo_rules()[rule].name, fo_isa(), i);
            }
    fprintf(stderr, "rows: %d tried, %d differ\n", tried, failed);
    return failed > 0 || tried == 0;
}
