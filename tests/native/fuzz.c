/* Compares steps of random work lists with the same arithmetic in its simplest form: kernels.c
 * compiled without SIMD and with little optimisation, one leaf after the other, in one thread.
 * Tests that tiles, splits, threads, instruction sets, formats, odd addresses and files change
 * nothing, and that no other memory is written. (The tests against NumPy show that the arithmetic
 * is right.)
 *
 * With libFuzzer, a coverage-guided fuzzer; without it
 *
 *     fuzz [lists] [seed]
 *
 * tries that many random lists. */
#include "factors.h"
#include "lists.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __unix__
#include <unistd.h>
#endif

extern const fo_kernels fo_kernels_plain;

static long steps, refused, shards, streamed;

static void fail(const char *what, const list *l)
{
    fprintf(stderr, "fuzz: %s; rule %d, %td leaves, instruction set %s\n", what, l->rule, l->n,
            fo_isa());
    abort();
}

/* Steps a list by the simple kernels. Takes the tiles' indices and the trust ratios from the list
 * that the library has stepped. */
static void plain_step(list *l, const list *stepped)
{
    const fo_task task = {.rule = l->rule, .hypers = l->hypers, .run = &l->run};
    const fo_kernels *k = &fo_kernels_plain;
    const fo_kind kind = fo_rules()[l->rule].kind;
    for (ptrdiff_t i = 0; i < l->n; i++) {
        fo_leaf *leaf = &l->leaves[i];
        leaf->tile = stepped->leaves[i].tile;
        leaf->trust = stepped->leaves[i].trust;
        if (leaf->grad.data != NULL && leaf->n > 0) {
            const int type = fo_compute_type(leaf);
            const int factored = kind == FO_FACTORED && fo_is_factored(leaf);
            const fo_shape *shape = factored ? leaf->state[0].extra : NULL;
            if (factored) {
                k->sum_factors[type](&task, leaf, 0, fo_parts(shape));
                k->fold_factors[type](&task, leaf, 0, shape->matrices);
            }
            if (kind >= FO_LAYERWISE)
                k->direct[type](&task, leaf, 0, leaf->n);
            k->step[type](&task, leaf, 0, leaf->n);
            if (factored)
                k->keep_factors[type](&task, leaf, 0, shape->matrices);
        } else if (leaf->copy.data != NULL && leaf->n > 0)
            k->copy[fo_compute_type(leaf)](&task, leaf, 0, leaf->n);
    }
}

/* Makes a valid list that is not empty invalid in one way; fails unless the library refuses it. */
static void step_spoilt(source *s, list *l, int threads)
{
    fo_leaf *leaf = &l->leaves[choose(s, l->n)];
    const fo_leaf whole = *leaf;
    int rule = l->rule;
    switch (choose(s, 6)) {
    case 0:
        rule = rule_count() + (int)choose(s, 100);
        break;
    case 1:
        leaf->n = -1 - choose(s, 1000);
        break;
    case 2:
        leaf->grad = leaf->grad.data ? leaf->grad : leaf->param;
        leaf->hyper = choose(s, 2) ? -1 : l->n_hypers;
        break;
    case 3:
        leaf->param.format = (fo_format)(FO_FORMATS + choose(s, 1000));
        break;
    case 4: /* a leaf without gradient needs no state */
        leaf->grad = leaf->grad.data ? leaf->grad : leaf->param;
        leaf->hyper = 0;
        for (int k = 0; k < fo_rules()[rule].required; k++)
            leaf->state[k].data = NULL;
        break;
    default:
        rule = -1 - (int)choose(s, 100);
    }
    leaf->n += leaf->n == 0; /* a leaf without elements needs neither format nor state */
    if (fo_rules()[l->rule].required == 0 && leaf->n > 0 && rule == l->rule)
        rule = -1; /* case 4 changed nothing */
    if (fo_step(rule, l->leaves, l->n, l->hypers, l->n_hypers, &l->run, threads) == FO_OK)
        fail("a spoilt list was not refused", l);
    *leaf = whole;
}

/* Points an array of a shard at elements [at, at + n) of the whole one's. */
static void cut_array(fo_array *array, ptrdiff_t at)
{
    if (array->data == NULL)
        return;
    array->extra = fo_extra_at(array, at);
    array->data = fo_data_at(array, at);
}

/* Steps each leaf of a list as two shards, the second of which begins on a block. */
static fo_status step_shards(source *s, const list *l, int threads)
{
    fo_leaf *shards = calloc(2 * (size_t)l->n + 1, sizeof *shards);
    fo_run run = l->run;
    run.measure = FO_MEASURE_NOTHING;
    if (shards == NULL)
        abort();
    for (ptrdiff_t i = 0; i < l->n; i++) {
        fo_leaf *first = &shards[2 * i], *second = first + 1;
        const ptrdiff_t cut = FO_BLOCK * choose(s, l->leaves[i].n / FO_BLOCK + 1);
        *first = *second = l->leaves[i];
        first->n = cut;
        second->n -= cut;
        second->origin += cut;
        cut_array(&second->param, cut);
        cut_array(&second->grad, cut);
        cut_array(&second->ema, cut);
        cut_array(&second->copy, cut);
        for (int k = 0; k < FO_MAX_STATES; k++)
            cut_array(&second->state[k], cut);
    }
    const fo_status status =
        fo_step(l->rule, shards, 2 * l->n, l->hypers, l->n_hypers, &run, threads);
    free(shards);
    return status;
}

/* Shards get the bits of the whole, by rules that need no sum over a leaf. */
static void try_shards(source s, wish w, int threads)
{
    source a = s, b = s;
    w.rule = (int)choose(&s, rule_count());
    if (fo_rules()[w.rule].kind >= FO_LAYERWISE)
        return;
    list whole = make_list(&a, w), cut = make_list(&b, w);
    for (ptrdiff_t i = 0; i < whole.n; i++)
        whole.leaves[i].origin = cut.leaves[i].origin &= -FO_BLOCK;
    for (int step = 0; step < 2; step++) {
        whole.run.measure = FO_MEASURE_NOTHING;
        const fo_status status = fo_step(whole.rule, whole.leaves, whole.n, whole.hypers,
                                         whole.n_hypers, &whole.run, threads);
        if (step_shards(&s, &cut, threads) != status)
            fail("shards of a leaf were not stepped as the whole", &whole);
        shards += status == FO_OK;
        next_step(&a, &whole, w.hostile);
        next_step(&b, &cut, w.hostile);
    }
    const char *wrong = difference(&whole, &cut);
    if (wrong != NULL)
        fail(wrong, &whole);
    free_list(&whole);
    free_list(&cut);
}

#ifdef __unix__
enum { PAGE = 4096, FILE_SIZE = 64 << 20, MOST_PARTS = 12 * 2 * (FO_MAX_STATES + 2) };
static fo_region file;
static void *places[MOST_PARTS]; /* of what is in the file, in memory */

/* Moves a part of an array into the file, or back; returns where the next one goes. */
static char *move(void **part, ptrdiff_t bytes, char *at, int *count, int back)
{
    if (*part == NULL || bytes == 0)
        return at;
    if (back) {
        memcpy(places[*count], at, (size_t)bytes);
        *part = places[*count];
    } else {
        memcpy(at, *part, (size_t)bytes);
        places[*count] = *part;
        *part = at;
    }
    *count += 1;
    return at + (bytes + PAGE - 1) / PAGE * PAGE;
}

/* Moves all that may be on disk there, or back. */
static void move_all(const list *l, int back)
{
    const fo_rule *rule = &fo_rules()[l->rule];
    const int direction = rule->kind == FO_MATRIX ? rule->states + 1 : -1; /* it is in memory */
    char *at = file.start;
    int count = 0;
    for (ptrdiff_t i = 0; i < l->n; i++) {
        fo_leaf *leaf = &l->leaves[i];
        fo_array *arrays[FO_MAX_STATES + 2] = {&leaf->param, &leaf->ema};
        for (int k = 0; k < FO_MAX_STATES; k++)
            arrays[2 + k] = &leaf->state[k];
        for (int k = 0; k < FO_MAX_STATES + 2; k++) {
            if (arrays[k]->data == NULL || arrays[k]->map != FO_EACH || k == direction)
                continue;
            if (k > 0)
                at = move(&arrays[k]->data, fo_data_bytes(arrays[k], leaf->n), at, &count, back);
            at = move(&arrays[k]->extra, fo_extra_bytes(arrays[k], leaf->n), at, &count, back);
        }
    }
    if (at > file.start + FILE_SIZE)
        abort();
}

static void open_file(void)
{
    char name[] = "/tmp/fuzz-XXXXXX";
    file = (fo_region){.bytes = FILE_SIZE, .file = mkstemp(name)};
    if (file.file < 0 || unlink(name) != 0 || ftruncate(file.file, FILE_SIZE) != 0 ||
        fo_map_file(&file) != 0)
        abort();
}

/* State on disk gets the bits of state in memory. */
static void try_disk(source s, wish w, int threads)
{
    source a = s, b = s;
    if (file.start == NULL)
        open_file();
    list ours = make_list(&a, w), theirs = make_list(&b, w);
    for (int step = 0; step < 2; step++) {
        const fo_status status =
            fo_step(ours.rule, ours.leaves, ours.n, ours.hypers, ours.n_hypers, &ours.run, threads);
        fo_disk disk = {.regions = &file, .n = 1};
        fo_run run = theirs.run;
        run.disk = &disk;
        move_all(&theirs, 0);
        const fo_status other = fo_step(theirs.rule, theirs.leaves, theirs.n, theirs.hypers,
                                        theirs.n_hypers, &run, threads);
        move_all(&theirs, 1);
        if (other != status || disk.error != 0)
            fail("state on disk was not stepped as that in memory", &ours);
        streamed += status == FO_OK;
        next_step(&a, &ours, w.hostile);
        next_step(&b, &theirs, w.hostile);
    }
    const char *wrong = difference(&ours, &theirs);
    if (wrong != NULL)
        fail(wrong, &ours);
    free_list(&ours);
    free_list(&theirs);
}
#else
static void try_disk(source s, wish w, int threads)
{
    (void)s, (void)w, (void)threads;
    streamed++;
}
#endif

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    fo_force_threads(1);
    source s = source_from(bytes, size);
    const int large = choose(&s, 16) == 0, count = 1 + (int)choose(&s, 3);
    const int threads = (int)choose(&s, 7) - 1;
    const int spoilt = choose(&s, 16) == 0, zeroed = choose(&s, 16) == 0;
    const wish w = {-1, -1, -1, -1, large ? 3 : 12, large ? 70000 : 1100, choose(&s, 3) == 0};
    int isas = 0;
    while (tested_isas()[isas] != NULL)
        isas++;
    fo_select_isa(tested_isas()[choose(&s, isas)]);

    try_shards(s, w, threads);
    if (choose(&s, 4) == 0)
        try_disk(s, w, threads);
    source a = s, b = s; /* the same choices for both */
    list ours = make_list(&a, w), theirs = make_list(&b, w);
    for (int step = 0; step < count; step++) {
        if (fo_step(ours.rule, ours.leaves, ours.n, ours.hypers, ours.n_hypers, &ours.run,
                    threads) == FO_OK) {
            plain_step(&theirs, &ours);
            steps++;
        } else
            refused++; /* formats that are not supported: nothing may be written */
        next_step(&a, &ours, w.hostile);
        next_step(&b, &theirs, w.hostile);
    }
    if (spoilt && ours.n > 0)
        step_spoilt(&a, &ours, threads);
    const char *wrong = difference(&ours, &theirs);
    if (wrong != NULL)
        fail(wrong, &ours);
    if (zeroed) {
        fo_stream(ours.leaves, ours.n, (int)choose(&a, FO_STREAMS), threads);
        if (difference(&ours, &theirs) != NULL)
            fail("fo_stream changed something", &ours);
        fo_zero_state(ours.leaves, ours.n, threads);
        if (!states_are_zero(&ours))
            fail("fo_zero_state left something", &ours);
        if (difference(&ours, &ours) != NULL)
            fail(difference(&ours, &ours), &ours);
    }
    free_list(&ours);
    free_list(&theirs);
    return 0;
}

#ifndef FO_LIBFUZZER
int main(int count, char **arguments)
{
    const long lists = count > 1 ? atol(arguments[1]) : 2000;
    const long seed = count > 2 ? atol(arguments[2]) : 1;
    for (long i = 0; i < lists; i++) {
        source s = source_seeded((uint64_t)(seed * 1000000007 + i));
        uint64_t bytes = random_bits(&s);
        LLVMFuzzerTestOneInput((const uint8_t *)&bytes, sizeof bytes);
    }
    fprintf(stderr,
            "fuzz: %ld lists from seed %ld: %ld steps equal, %ld of shards, %ld from disk, %ld "
            "refused\n",
            lists, seed, steps, shards, streamed, refused);
    return steps < lists / 4 || shards < lists / 8 || streamed < lists / 16;
}
#endif
