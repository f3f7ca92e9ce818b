/* Compares steps of random work lists with the same arithmetic in its simplest form: kernels.c
 * compiled without SIMD and with little optimisation, one leaf after the other, in one thread.
 * Tests that tiles, splits, threads, instruction sets, formats and odd addresses change nothing,
 * and that no other memory is written. (The tests against NumPy show that the arithmetic is right.)
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

extern const fo_kernels fo_kernels_plain;

static long steps, refused;

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
    fprintf(stderr, "fuzz: %ld lists from seed %ld: %ld steps equal, %ld refused\n", lists, seed,
            steps, refused);
    return steps < lists / 4;
}
#endif
