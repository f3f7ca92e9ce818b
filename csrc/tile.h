/* The way of one tile: load -> before -> rule -> after -> store.
 *
 * Included by kernels.c once per compute type (REAL, FO_TYPE, FO_NATIVE, FO_SQRT defined there), so
 * it has no guard. Nothing here depends on how the work was split: a tile is the same tile for any
 * number of threads. What a step does around the rule (scale, clip, statistics, averages, copies)
 * is in before() and after(), and no rule learns of it. */
#include "divide.h"
#include "formats.h"
#include "rules/index.h"
#include "sums.h"

/* What a leaf needs in a call, in the compute type: made once for a range of it. */
typedef struct FO_TYPED(plan) {
    const fo_leaf *leaf;
    double scalars[FO_MAX_SCALARS + 1]; /* the last is h[FO_TRUST] */
    REAL scale, clip, l2, l1, ema_weight;
    int changes_grad, measures_grad, measures_param, measures_step, measures, zeroes, has_after;
    fo_stats *tiles; /* of the leaf */
} FO_TYPED(plan);

static FO_TYPED(plan) FO_TYPED(make_plan)(const fo_task *task, const fo_leaf *leaf)
{
    static const fo_run nothing;
    const fo_hyper *hyper = &task->hypers[leaf->hyper];
    const fo_run *run = task->run != NULL ? task->run : &nothing;
    FO_TYPED(plan)
    it = {
        .leaf = leaf,
        .scale = (REAL)(hyper->grad_scale * leaf->grad_scale),
        .clip = (REAL)run->clip_value,
        .l2 = (REAL)hyper->l2,
        .l1 = (REAL)hyper->l1,
        .ema_weight = (REAL)hyper->ema_weight,
        .measures_grad = run->measure == FO_MEASURE_LEAF && !run->has_grad,
        .measures_param = run->measure == FO_MEASURE_PARAM,
        .measures_step = run->measure == FO_MEASURE_LEAF,
        .zeroes = run->zero_grads,
        .tiles = run->tiles != NULL ? run->tiles + leaf->tile : NULL,
    };
    memcpy(it.scalars, hyper->scalars, sizeof hyper->scalars);
    it.scalars[FO_TRUST] = leaf->trust;
    it.changes_grad = it.scale != 1 || it.clip != 0 || it.l2 != 0 || it.l1 != 0;
    it.measures = it.measures_param || it.measures_step;
    it.has_after = it.measures || it.zeroes || leaf->ema.data != NULL || leaf->copy.data != NULL;
    return it;
}

/* The gradient as the rule shall see it: g itself if nothing is asked, else `out` (which may be g).
 * Multiplying by a scale of 1 keeps the bits; adding 0 * p would not (p may be infinite), so the
 * additive terms are branches. */
FO_INLINE const REAL *FO_TYPED(before)(const FO_TYPED(plan) * plan, ptrdiff_t n, const REAL *p,
                                       const REAL *g, REAL *out)
{
    const REAL scale = plan->scale, clip = plan->clip, l2 = plan->l2, l1 = plan->l1;
    const int has_l2 = plan->l2 != 0, has_l1 = plan->l1 != 0;
    if (!plan->changes_grad)
        return g;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = scale * g[i];
    if (clip != 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) /* a NaN stays */
            out[i] = out[i] > clip ? clip : out[i] < -clip ? -clip : out[i];
    }
    if (has_l2) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            out[i] = out[i] + l2 * p[i];
    }
    if (has_l1) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            REAL sign = p[i] > 0 ? (REAL)1 : p[i] < 0 ? (REAL)-1 : p[i] == 0 ? (REAL)0 : p[i];
            out[i] = out[i] + l1 * sign;
        }
    }
    return out;
}

/* Statistics of elements [at, at + n) of a leaf: a tile, or a block of one. `old` is the parameter
 * before the step. */
FO_INLINE void FO_TYPED(measure_piece)(const FO_TYPED(plan) * plan, ptrdiff_t at, ptrdiff_t n,
                                       const REAL *param, const REAL *grad, const REAL *old,
                                       FO_TYPED(tally) * tally)
{
    fo_stats *tile = &plan->tiles[at / FO_TILE];
    const int ends = (at + n) % FO_TILE == 0 || at + n == plan->leaf->n;
    if (at % FO_TILE == 0)
        memset(tally, 0, sizeof *tally);
    if (plan->measures_grad || plan->measures_param) {
        FO_TYPED(add_grad)(tally, n, plan->measures_param ? param : grad);
        if (ends)
            FO_TYPED(finish_grad)(tally, tile);
    }
    if (plan->measures_step) {
        FO_TYPED(add_step)(tally, n, param, old);
        if (ends)
            FO_TYPED(finish_step)(tally, tile);
    }
}

/* Writes elements [at, at + n) of a leaf's copy, at most a block, from those of the parameter. */
FO_INLINE void FO_TYPED(copy_block)(const fo_leaf *leaf, ptrdiff_t at, ptrdiff_t n, const REAL *p)
{
    FO_ROOM room;
    memset(&room, 0, sizeof room);
    memcpy(room.f, p, (size_t)n * sizeof *p);
    FO_TYPED(store)(&leaf->copy, at, n, 0, room.f, 0);
}

/* What is done beside the rule once it has stepped elements [at, at + n), a tile or a block; `grad`
 * is as it was given. Not inlined: one copy for all rules, out of the way of those that need none.
 */
static __attribute__((noinline)) void FO_TYPED(after)(const FO_TYPED(plan) * plan, ptrdiff_t at,
                                                      ptrdiff_t n, const REAL *param,
                                                      const REAL *grad, const REAL *old,
                                                      FO_TYPED(tally) * tally)
{
    const fo_leaf *leaf = plan->leaf;
    FO_ROOM room;
    if (plan->measures)
        FO_TYPED(measure_piece)(plan, at, n, param, grad, old, tally);
    for (ptrdiff_t from = 0; from < n; from += FO_BLOCK) {
        const ptrdiff_t count = n - from < FO_BLOCK ? n - from : FO_BLOCK;
        const REAL *p = param + from;
        if (leaf->ema.data != NULL) {
            REAL *restrict e = FO_TYPED(load)(&leaf->ema, at + from, count, 0, &room);
            FO_SIMD
            for (ptrdiff_t i = 0; i < count; i++)
                e[i] = e[i] + plan->ema_weight * (p[i] - e[i]);
            FO_TYPED(store)(&leaf->ema, at + from, count, 0, e, 0);
        }
        if (leaf->copy.data != NULL)
            FO_TYPED(copy_block)(leaf, at + from, count, p);
    }
    if (plan->zeroes)
        memset(fo_data_at(&leaf->grad, at), 0, (size_t)fo_data_bytes(&leaf->grad, n));
}

typedef void FO_TYPED(rule)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                            REAL *const *state);

/* Where every array is native and aligned: tiles, in place. The rule is given `states` of them. */
FO_INLINE void FO_TYPED(whole)(const FO_TYPED(plan) * plan, FO_TYPED(rule) * rule, int states,
                               ptrdiff_t begin, ptrdiff_t end)
{
    const fo_leaf *leaf = plan->leaf;
    FO_TYPED(tally) tally;
    REAL scratch[FO_TILE], old[FO_TILE], *state[FO_MAX_STATES] = {NULL};
    for (ptrdiff_t at = begin; at < end; at += FO_TILE) {
        const ptrdiff_t n = end - at < FO_TILE ? end - at : FO_TILE;
        REAL *param = (REAL *)leaf->param.data + at;
        const REAL *raw = (const REAL *)leaf->grad.data + at;
        for (int k = 0; k < states; k++)
            state[k] = leaf->state[k].data ? (REAL *)leaf->state[k].data + at : NULL;
        if (plan->measures)
            memcpy(old, param, (size_t)n * sizeof *param);
        const REAL *grad = FO_TYPED(before)(plan, n, param, raw, scratch);
        rule(plan->scalars, n, param, grad, state);
        if (plan->has_after)
            FO_TYPED(after)(plan, at, n, param, raw, old, &tally);
    }
}

/* Else: blocks, with the rule compiled into the loop for their fixed length, so that the processor
 * decodes and encodes one block while its divider works on another (see CONTRIBUTING). The lists
 * are copied so that no store can seem to change them. Behind the end of an array the arithmetic
 * runs on zeros that nobody sees. `known` is NULL, or the leaf's formats, as constants: then the
 * codecs become part of the loop, and [begin, end) must be whole blocks of aligned arrays. */
#define FO_KNOW_STATE(k)                                                                           \
    if (k < states)                                                                                \
        know(&its.state[k], known->state[k]);
#define FO_LOAD_STATE(k)                                                                           \
    if (k < states)                                                                                \
        state[k] = FO_TYPED(load)(&its.state[k], at, n, is_known, &state_room[k]);
#define FO_STORE_STATE(k)                                                                          \
    if (k < states)                                                                                \
        FO_TYPED(store)(&its.state[k], at, n, is_known, state[k], keys[1 + k]);
FO_INLINE void FO_TYPED(blocks)(const FO_TYPED(plan) * plan, FO_TYPED(rule) * rule, int states,
                                ptrdiff_t begin, ptrdiff_t end, const set *known)
{
    const int is_known = known != NULL;
    FO_TYPED(tally) tally;
    REAL old[FO_BLOCK];
    FO_ROOM param_room, grad_room, state_room[FO_MAX_STATES];
    REAL scratch[FO_BLOCK], *state[FO_MAX_STATES] = {NULL};
    const FO_TYPED(plan) h = *plan;
    struct {
        fo_array param, grad, state[FO_MAX_STATES];
    } its = {.param = plan->leaf->param, .grad = plan->leaf->grad};
    for (int k = 0; k < states; k++)
        its.state[k] = plan->leaf->state[k];
    uint32_t keys[1 + FO_MAX_STATES];
    for (int slot = 0; slot < 1 + states; slot++)
        keys[slot] = (uint32_t)(fo_mix(plan->leaf->key + (uint64_t)slot) >> 32);
    if (is_known) {
        know(&its.param, known->param);
        know(&its.grad, known->grad);
        FO_EACH_STATE(FO_KNOW_STATE)
    }

    for (ptrdiff_t at = begin; at < end; at += FO_BLOCK) {
        const ptrdiff_t n = is_known || end - at >= FO_BLOCK ? FO_BLOCK : end - at;
        REAL *param = FO_TYPED(load)(&its.param, at, n, is_known, &param_room);
        const REAL *raw = FO_TYPED(load)(&its.grad, at, n, is_known, &grad_room);
        FO_EACH_STATE(FO_LOAD_STATE)

        if (h.measures)
            memcpy(old, param, sizeof old);
        const REAL *grad = FO_TYPED(before)(&h, FO_BLOCK, param, raw, scratch);
        rule(h.scalars, FO_BLOCK, param, grad, state);
        if (h.has_after)
            FO_TYPED(after)(plan, at, n, param, raw, old, &tally);

        FO_TYPED(store)(&its.param, at, n, is_known, param, keys[0]);
        FO_EACH_STATE(FO_STORE_STATE)
    }
}

#undef FO_KNOW_STATE
#undef FO_LOAD_STATE
#undef FO_STORE_STATE

/* The loops of a rule: over whole tiles, over blocks of any formats, and over blocks of each set of
 * formats that has a loop of its own. A rule takes as many states of a set as it has. */
typedef void FO_TYPED(loop)(const FO_TYPED(plan) * plan, ptrdiff_t begin, ptrdiff_t end);
typedef struct FO_TYPED(known) {
    set formats;
    FO_TYPED(loop) * loop;
} FO_TYPED(known);

#define FO_SET(rule, param, grad, m, v)                                                            \
    {                                                                                              \
        param, grad, FO_TYPED(rule##_states) < 2 ? FO_TYPED(rule##_states) : 2, { m, v }           \
    }
#define FO_KNOWN_LOOP(rule, name, ...)                                                             \
    static FO_WIDE void FO_CAT(FO_RULE(rule), name)(const FO_TYPED(plan) * plan, ptrdiff_t begin,  \
                                                    ptrdiff_t end)                                 \
    {                                                                                              \
        const set formats = FO_SET(rule, __VA_ARGS__);                                             \
        FO_TYPED(blocks)(plan, FO_RULE(rule), formats.states, begin, end, &formats);               \
    }
#define FO_KNOWN(rule, name, ...) {FO_SET(rule, __VA_ARGS__), FO_CAT(FO_RULE(rule), name)},
#define FO_LOOPS(rule, LIST, states, required, KIND)                                               \
    enum { FO_TYPED(rule##_states) = states };                                                     \
    static void FO_CAT(FO_RULE(rule), whole)(const FO_TYPED(plan) * plan, ptrdiff_t begin,         \
                                             ptrdiff_t end)                                        \
    {                                                                                              \
        FO_TYPED(whole)(plan, FO_RULE(rule), states, begin, end);                                  \
    }                                                                                              \
    static FO_WIDE void FO_CAT(FO_RULE(rule), blocks)(const FO_TYPED(plan) * plan,                 \
                                                      ptrdiff_t begin, ptrdiff_t end)              \
    {                                                                                              \
        FO_TYPED(blocks)(plan, FO_RULE(rule), states, begin, end, NULL);                           \
    }                                                                                              \
    FO_SETS(FO_KNOWN_LOOP, rule)                                                                   \
    static const FO_TYPED(known)                                                                   \
        FO_CAT(FO_RULE(rule), known)[] = {FO_SETS(FO_KNOWN, rule){.loop = NULL}};
FO_RULES(FO_LOOPS)

#define FO_ENTRY(rule, LIST, states, required, KIND)                                               \
    {FO_CAT(FO_RULE(rule), whole), FO_CAT(FO_RULE(rule), blocks), FO_CAT(FO_RULE(rule), known)},
static const struct {
    FO_TYPED(loop) * whole, *blocks;
    const FO_TYPED(known) * known; /* ended by a NULL loop */
} FO_TYPED(loops)[] = {FO_RULES(FO_ENTRY)};
#undef FO_ENTRY
#undef FO_LOOPS
#undef FO_KNOWN
#undef FO_KNOWN_LOOP
#undef FO_SET

/* The loop that was compiled for a leaf's formats, or NULL. */
static FO_TYPED(loop) * FO_TYPED(known_loop)(const fo_leaf *leaf, const FO_TYPED(known) * known)
{
    while (known->loop != NULL && !is_of(leaf, &known->formats))
        known++;
    return known->loop;
}

static void FO_TYPED(step)(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end)
{
    const FO_TYPED(plan) plan = FO_TYPED(make_plan)(task, leaf);
    int is_whole = FO_TYPED(is_whole)(&leaf->param) && FO_TYPED(is_whole)(&leaf->grad);
    for (int k = 0; k < FO_MAX_STATES; k++)
        is_whole = is_whole && FO_TYPED(is_whole)(&leaf->state[k]);
    if (is_whole) {
        FO_TYPED(loops)[task->rule].whole(&plan, begin, end);
        return;
    }
    FO_TYPED(loop) *known = FO_TYPED(known_loop)(leaf, FO_TYPED(loops)[task->rule].known);
    const ptrdiff_t unit = plan.measures ? FO_TILE : FO_BLOCK; /* sums pass from block to block */
    const ptrdiff_t full = known != NULL ? end - (end - begin) % unit : begin;
    if (full > begin)
        known(&plan, begin, full);
    if (full < end)
        FO_TYPED(loops)[task->rule].blocks(&plan, full, end);
}

/* The gradient's sums over a tile: all of them, or of its squares alone, in which what is not
 * finite shows too. */
FO_INLINE void FO_TYPED(measure_tile)(const fo_leaf *leaf, ptrdiff_t at, ptrdiff_t n, int norm_only,
                                      fo_stats *to)
{
    const int is_whole = FO_TYPED(is_whole)(&leaf->grad);
    const ptrdiff_t most = is_whole ? FO_TILE : FO_BLOCK;
    double squares[FO_LANES] = {0};
    FO_TYPED(tally) t;
    FO_ROOM room;
    if (!norm_only)
        memset(&t, 0, sizeof t);
    for (ptrdiff_t from = 0; from < n; from += most) {
        const ptrdiff_t count = n - from < most ? n - from : most;
        const REAL *g = is_whole ? (const REAL *)leaf->grad.data + at
                                 : FO_TYPED(load)(&leaf->grad, at + from, count, 0, &room);
        if (norm_only)
            FO_TYPED(add_squares)(squares, count, g);
        else
            FO_TYPED(add_grad)(&t, count, g);
    }
    if (norm_only)
        *to = (fo_stats){.grad = fo_fold(squares)};
    else
        FO_TYPED(finish_grad)(&t, to);
}

static void FO_TYPED(measure)(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin,
                              ptrdiff_t end)
{
    fo_stats *tiles = task->run->tiles + leaf->tile;
    for (ptrdiff_t at = begin; at < end; at += FO_TILE) {
        const ptrdiff_t n = end - at < FO_TILE ? end - at : FO_TILE;
        fo_stats *tile = &tiles[at / FO_TILE];
        if (task->run->norm_only)
            FO_TYPED(measure_tile)(leaf, at, n, 1, tile);
        if (!task->run->norm_only || tile->grad - tile->grad != 0)
            FO_TYPED(measure_tile)(leaf, at, n, 0, tile);
    }
}

/* The sums of the parameter and of the direction in which a layer-wise rule would go. */
typedef void FO_TYPED(direction)(const double *h, ptrdiff_t n, const REAL *param, const REAL *grad,
                                 REAL *const *state, REAL *out);
FO_INLINE void FO_TYPED(directions)(const FO_TYPED(plan) * plan, FO_TYPED(direction) * direction,
                                    ptrdiff_t begin, ptrdiff_t end)
{
    FO_ROOM param_room, grad_room, state_room[FO_MAX_STATES];
    REAL scratch[FO_BLOCK], out[FO_BLOCK], *state[FO_MAX_STATES];
    const fo_leaf *leaf = plan->leaf;
    double params[FO_LANES], outs[FO_LANES];
    for (ptrdiff_t at = begin; at < end; at += FO_BLOCK) {
        const ptrdiff_t n = end - at < FO_BLOCK ? end - at : FO_BLOCK;
        const REAL *param = FO_TYPED(load)(&leaf->param, at, n, 0, &param_room);
        const REAL *raw = FO_TYPED(load)(&leaf->grad, at, n, 0, &grad_room);
        for (int k = 0; k < FO_MAX_STATES; k++)
            state[k] = FO_TYPED(load)(&leaf->state[k], at, n, 0, &state_room[k]);
        direction(plan->scalars, FO_BLOCK, param,
                  FO_TYPED(before)(plan, FO_BLOCK, param, raw, scratch), state, out);
        if (at % FO_TILE == 0) {
            memset(params, 0, sizeof params);
            memset(outs, 0, sizeof outs);
        }
        FO_TYPED(add_squares)(params, n, param);
        FO_TYPED(add_squares)(outs, n, out);
        if ((at + n) % FO_TILE == 0 || at + n == end) {
            fo_stats *tile = &plan->tiles[at / FO_TILE];
            tile->param = fo_fold(params);
            tile->update = fo_fold(outs);
        }
    }
}

#define PLAIN_DIRECTIONS(rule)
#define INTERNAL_DIRECTIONS(rule)
#define LAYERWISE_DIRECTIONS(rule)                                                                 \
    static void FO_CAT(FO_RULE(rule), directions)(const FO_TYPED(plan) * plan, ptrdiff_t begin,    \
                                                  ptrdiff_t end)                                   \
    {                                                                                              \
        FO_TYPED(directions)(plan, FO_RULE(rule##_direction), begin, end);                         \
    }
#define FO_OWN_DIRECTIONS(rule, LIST, states, required, KIND) KIND##_DIRECTIONS(rule)
FO_RULES(FO_OWN_DIRECTIONS)
#define PLAIN_ENTRY(rule) NULL
#define INTERNAL_ENTRY(rule) NULL
#define LAYERWISE_ENTRY(rule) FO_CAT(FO_RULE(rule), directions)
#define FO_OWN_ENTRY(rule, LIST, states, required, KIND) KIND##_ENTRY(rule),
static FO_TYPED(loop) *const FO_TYPED(direction_loops)[] = {FO_RULES(FO_OWN_ENTRY)};
#undef PLAIN_DIRECTIONS
#undef INTERNAL_DIRECTIONS
#undef LAYERWISE_DIRECTIONS
#undef FO_OWN_DIRECTIONS
#undef PLAIN_ENTRY
#undef INTERNAL_ENTRY
#undef LAYERWISE_ENTRY
#undef FO_OWN_ENTRY

static void FO_TYPED(direct)(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin,
                             ptrdiff_t end)
{
    const FO_TYPED(plan) plan = FO_TYPED(make_plan)(task, leaf);
    FO_TYPED(direction_loops)[task->rule](&plan, begin, end);
}

/* The copy alone, of a leaf that is not stepped. */
static void FO_TYPED(copy)(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end)
{
    FO_ROOM room;
    (void)task;
    for (ptrdiff_t at = begin; at < end; at += FO_BLOCK) {
        const ptrdiff_t n = end - at < FO_BLOCK ? end - at : FO_BLOCK;
        FO_TYPED(copy_block)(leaf, at, n, FO_TYPED(load)(&leaf->param, at, n, 0, &room));
    }
}
