/* Whether a layer-wise step in two calls, fo_direct and then fo_step on its sums, is that of one
 * call, and whether sums of parts of a tensor, added by the caller, give the whole's trust ratio.
 * For a matrix rule, whether fo_step goes along what the caller put in the place of the direction.
 *
 *     direct [lists] [seed] */
#include "lists.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ratios of sums in another order; a difference in a divisor may lose most digits. */
static int is_close(double a, double b)
{
    return a == b || (a != a && b != b) || fabs(a - b) <= 1e-6 * fabs(b);
}

/* One step in one call, and in two; whether both wrote the same and fo_direct wrote sums alone. */
static int is_same_in_two_calls(int rule, uint64_t seed, long *stepped)
{
    const wish w = {rule, -1, -1, -1, 6, 3000, seed % 3 == 0};
    source a = source_seeded(seed), b = source_seeded(seed);
    list one = make_list(&a, w), two = make_list(&b, w);
    const int threads = 1 + (int)(seed % 3);
    one.run.measure = two.run.measure = FO_MEASURE_LEAF;
    for (ptrdiff_t i = 0; i < two.n; i++)
        two.run.stats[i] = (fo_stats){1, 2, 3, 4, 5, 6, 7};

    const fo_status status =
        fo_direct(rule, two.leaves, two.n, two.hypers, two.n_hypers, &two.run, threads);
    memset(two.run.tiles, 0, (size_t)fo_count_tiles(two.leaves, two.n) * sizeof *two.run.tiles);
    int same = fo_rules()[rule].kind == FO_MATRIX ||
               difference(&one, &two) == NULL; /* it writes a state */
    for (ptrdiff_t i = 0; i < two.n && status == FO_OK; i++) {
        fo_stats untouched = two.run.stats[i];
        untouched.param = 2, untouched.update = 3;
        const fo_stats before = {1, 2, 3, 4, 5, 6, 7};
        same &= memcmp(&untouched, &before, sizeof before) == 0;
    }
    two.run.has_direction = 1;
    same &= status == fo_step(rule, one.leaves, one.n, one.hypers, one.n_hypers, &one.run, threads);
    same &= status == fo_step(rule, two.leaves, two.n, two.hypers, two.n_hypers, &two.run, threads);
    if (status == FO_OK) {
        *stepped += one.n > 0;
        same &= digest(&one, 0) == digest(&two, 0);
    }
    same &= difference(&one, &two) == NULL;
    free_list(&one);
    free_list(&two);
    return same;
}

/* A tensor as one leaf, and as two whose sums are added as ranks would. */
static int is_whole_of_parts(int rule, uint64_t seed)
{
    const wish w = {rule, FO_F32, FO_F32, FO_F32, 1, 3000, 0};
    source a = source_seeded(seed), b = source_seeded(seed);
    list one = make_list(&a, w), two = make_list(&b, w);
    const ptrdiff_t n = one.leaves[0].n, at = n / 3;
    fo_leaf parts[2] = {two.leaves[0], two.leaves[0]};
    fo_array *arrays[] = {&parts[1].param, &parts[1].grad, &parts[1].ema};
    parts[0].n = at, parts[1].n = n - at;
    parts[0].copy.data = parts[1].copy.data = NULL;
    for (size_t k = 0; k < sizeof arrays / sizeof *arrays; k++)
        if (arrays[k]->data != NULL)
            arrays[k]->data = (float *)arrays[k]->data + at;
    for (int k = 0; k < FO_MAX_STATES; k++)
        if (parts[1].state[k].data != NULL)
            parts[1].state[k].data = (float *)parts[1].state[k].data + at;

    fo_stats tiles[16], stats[2];
    fo_run run = two.run;
    run.tiles = tiles, run.stats = stats;
    int right = fo_direct(rule, parts, 2, two.hypers, two.n_hypers, &run, 1) == FO_OK;
    stats[0].param = stats[1].param = stats[0].param + stats[1].param;
    stats[0].update = stats[1].update = stats[0].update + stats[1].update;
    run.has_direction = 1;
    right &= fo_step(rule, parts, 2, two.hypers, two.n_hypers, &run, 1) == FO_OK;
    right &= fo_step(rule, one.leaves, 1, one.hypers, one.n_hypers, &one.run, 1) == FO_OK;
    if (fo_rules()[rule].kind >= FO_FACTORED) /* no trust ratio, or not of sums alone */
        parts[0].trust = parts[1].trust = one.leaves[0].trust;
    right &= n == 0 || is_close(parts[0].trust, one.leaves[0].trust);
    right &= n == 0 || is_close(parts[1].trust, one.leaves[0].trust);
    free_list(&one);
    free_list(&two);
    return right;
}

/* Whether a step along no direction at all changes parameters as one with a gradient and a state of
 * zeros; and whether a direction in another format than the compute type's is refused. */
static int is_replaced(int rule, uint64_t seed)
{
    const wish w = {rule, FO_F32, FO_F32, FO_F32, 1, 3000, 0};
    const int last = fo_rules()[rule].states - 1;
    source a = source_seeded(seed), b = source_seeded(seed);
    list one = make_list(&a, w), two = make_list(&b, w);
    fo_leaf *leaf = &one.leaves[0], *other = &two.leaves[0];
    const size_t bytes = (size_t)leaf->n * sizeof(float);
    fo_hyper hyper = {.grad_scale = 1, .ema_weight = 0.5};
    for (int k = 0; k < FO_MAX_SCALARS; k++)
        hyper.scalars[k] = 0.25 * (1 + k);
    leaf->hyper = other->hyper = 0;
    leaf->grad_scale = other->grad_scale = 1;
    int right = fo_direct(rule, leaf, 1, &hyper, 1, &one.run, 1) == FO_OK;
    one.run.has_direction = 1;
    memset(leaf->state[last].data, 0, bytes);
    right &= fo_step(rule, leaf, 1, &hyper, 1, &one.run, 1) == FO_OK;
    memset(other->grad.data, 0, bytes);
    for (int k = 0; k < last; k++)
        memset(other->state[k].data, 0, bytes);
    right &= fo_step(rule, other, 1, &hyper, 1, &two.run, 1) == FO_OK;
    right &= memcmp(leaf->param.data, other->param.data, bytes) == 0;
    leaf->state[last].format = FO_BF16;
    right &= fo_step(rule, leaf, 1, &hyper, 1, &one.run, 1) == FO_BAD_ARGUMENT || leaf->n == 0;
    free_list(&one);
    free_list(&two);
    return right;
}

/* A rule that is not layer-wise has no direction. */
static int is_refused(int rule)
{
    source s = source_seeded(1);
    list l = make_list(&s, (wish){rule, FO_F32, FO_F32, FO_F32, 2, 1000, 0});
    const fo_status status = fo_direct(rule, l.leaves, l.n, l.hypers, l.n_hypers, &l.run, 1);
    free_list(&l);
    return status == FO_BAD_ARGUMENT;
}

int main(int count, char **arguments)
{
    const long lists = count > 1 ? atol(arguments[1]) : 1000;
    const long seed = count > 2 ? atol(arguments[2]) : 1;
    long stepped = 0, failed = 0;
    for (int rule = 0; rule < rule_count(); rule++) {
        if (fo_rules()[rule].kind < FO_LAYERWISE) {
            failed += !is_refused(rule);
            continue;
        }
        for (long i = 0; i < lists; i++) {
            const uint64_t number = (uint64_t)(seed * 1000000007 + i);
            failed += !is_same_in_two_calls(rule, number, &stepped);
            failed += !is_whole_of_parts(rule, number);
            failed += fo_rules()[rule].kind == FO_MATRIX && !is_replaced(rule, number);
        }
    }
    fprintf(stderr, "direct: %ld lists stepped in two calls, %ld failures\n", stepped, failed);
    return failed != 0 || stepped < lists / 2;
}
