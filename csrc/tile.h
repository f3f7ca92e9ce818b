/* The way of one tile: load -> before -> rule -> after -> store.
 *
 * Included by kernels.c once per compute type (REAL, FO_TYPE, FO_NATIVE, FO_SQRT defined there), so
 * it has no guard. Nothing here depends on how the work was split: a tile is the same tile for any
 * number of threads. What a step adds around the rule (clip factor, statistics, averages, copies)
 * goes into before() or beside the stores, and no rule learns of it. */
#include "formats.h"
#include "rules/index.h"

/* The gradient as the rule shall see it: g itself if nothing is asked, else `out` (which may be g).
 * Multiplying by a scale of 1 keeps the bits; adding 0 * p would not (p may be infinite), so the
 * additive terms are branches. */
FO_INLINE const REAL *FO_TYPED(before)(const fo_hyper *hyper, ptrdiff_t n, const REAL *p,
                                       const REAL *g, REAL *out)
{
    const REAL scale = (REAL)hyper->grad_scale, l2 = (REAL)hyper->l2, l1 = (REAL)hyper->l1;
    const int has_l2 = hyper->l2 != 0, has_l1 = hyper->l1 != 0;
    if (hyper->grad_scale == 1 && !has_l2 && !has_l1)
        return g;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = scale * g[i];
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

typedef void FO_TYPED(rule)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                            REAL *const *state);

/* Where every array is native and aligned: tiles, in place. */
FO_INLINE void FO_TYPED(whole)(const fo_leaf *leaf, const fo_hyper *hyper, FO_TYPED(rule) * rule,
                               ptrdiff_t begin, ptrdiff_t end)
{
    REAL scratch[FO_TILE], *state[FO_MAX_STATES];
    for (ptrdiff_t at = begin; at < end; at += FO_TILE) {
        const ptrdiff_t n = end - at < FO_TILE ? end - at : FO_TILE;
        REAL *param = (REAL *)leaf->param.data + at;
        const REAL *grad = (const REAL *)leaf->grad.data + at;
        for (int k = 0; k < FO_MAX_STATES; k++)
            state[k] = leaf->state[k].data ? (REAL *)leaf->state[k].data + at : NULL;
        grad = FO_TYPED(before)(hyper, n, param, grad, scratch);
        rule(hyper->scalars, n, param, grad, state);
    }
}

/* Else: blocks, with the rule compiled into the loop for their fixed length, so that the processor
 * decodes and encodes one block while its divider works on another (see CONTRIBUTING). The lists
 * are copied so that no store can seem to change them. Behind the end of an array the arithmetic
 * runs on zeros that nobody sees. */
FO_INLINE void FO_TYPED(blocks)(const fo_leaf *leaf, const fo_hyper *hyper, FO_TYPED(rule) * rule,
                                ptrdiff_t begin, ptrdiff_t end)
{
    FO_ROOM param_room, grad_room, state_room[FO_MAX_STATES];
    REAL scratch[FO_BLOCK], *state[FO_MAX_STATES];
    const fo_leaf its = *leaf;
    const fo_hyper h = *hyper;
    uint32_t keys[1 + FO_MAX_STATES];
    for (int slot = 0; slot < 1 + FO_MAX_STATES; slot++)
        keys[slot] = (uint32_t)(fo_mix(its.key + (uint64_t)slot) >> 32);

    for (ptrdiff_t at = begin; at < end; at += FO_BLOCK) {
        const ptrdiff_t n = end - at < FO_BLOCK ? end - at : FO_BLOCK;
        REAL *param = FO_TYPED(load)(&its.param, at, n, &param_room);
        const REAL *grad = FO_TYPED(load)(&its.grad, at, n, &grad_room);
        for (int k = 0; k < FO_MAX_STATES; k++)
            state[k] = FO_TYPED(load)(&its.state[k], at, n, &state_room[k]);

        grad = FO_TYPED(before)(&h, FO_BLOCK, param, grad, scratch);
        rule(h.scalars, FO_BLOCK, param, grad, state);

        FO_TYPED(store)(&its.param, at, n, param, keys[0]);
        for (int k = 0; k < FO_MAX_STATES; k++)
            FO_TYPED(store)(&its.state[k], at, n, state[k], keys[1 + k]);
    }
}

#define FO_LOOPS(rule, LIST, states, required)                                                     \
    static void FO_CAT(FO_RULE(rule), whole)(const fo_leaf *leaf, const fo_hyper *hyper,           \
                                             ptrdiff_t begin, ptrdiff_t end)                       \
    {                                                                                              \
        FO_TYPED(whole)(leaf, hyper, FO_RULE(rule), begin, end);                                   \
    }                                                                                              \
    static FO_WIDE void FO_CAT(FO_RULE(rule), blocks)(const fo_leaf *leaf, const fo_hyper *hyper,  \
                                                      ptrdiff_t begin, ptrdiff_t end)              \
    {                                                                                              \
        FO_TYPED(blocks)(leaf, hyper, FO_RULE(rule), begin, end);                                  \
    }
FO_RULES(FO_LOOPS)

typedef void FO_TYPED(loop)(const fo_leaf *leaf, const fo_hyper *hyper, ptrdiff_t begin,
                            ptrdiff_t end);
#define FO_ENTRY(rule, LIST, states, required)                                                     \
    {FO_CAT(FO_RULE(rule), whole), FO_CAT(FO_RULE(rule), blocks)},
static FO_TYPED(loop) *const FO_TYPED(loops)[][2] = {FO_RULES(FO_ENTRY)};
#undef FO_ENTRY
#undef FO_LOOPS

static void FO_TYPED(step)(const fo_leaf *leaf, const fo_hyper *hyper, int rule, ptrdiff_t begin,
                           ptrdiff_t end)
{
    int is_whole = FO_TYPED(is_whole)(&leaf->param) && FO_TYPED(is_whole)(&leaf->grad);
    for (int k = 0; k < FO_MAX_STATES; k++)
        is_whole = is_whole && FO_TYPED(is_whole)(&leaf->state[k]);
    FO_TYPED(loops)[rule][!is_whole](leaf, hyper, begin, end);
}
