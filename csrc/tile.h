/* The way of one tile: load -> before -> rule -> after -> store.
 *
 * Included by kernels.c once per compute type (REAL, FO_TYPE, FO_NATIVE, FO_SQRT defined there), so
 * it has no guard. Nothing here depends on how the work was split: a tile is the same tile for any
 * number of threads. What a step adds around the rule (clip factor, statistics, averages, copies)
 * goes into before() or beside the stores, and no rule learns of it. */
#include "formats.h"
#include "rules/index.h"

typedef void FO_TYPED(rule)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                            REAL *const *state);

#define FO_ENTRY(rule, LIST, states, required) FO_RULE(rule),
static FO_TYPED(rule) *const FO_TYPED(rules)[] = {FO_RULES(FO_ENTRY)};
#undef FO_ENTRY

/* The gradient as the rule shall see it: g itself if nothing is asked, else `out` (which may be g).
 * Multiplying by a scale of 1 keeps the bits; adding 0 * p would not (p may be infinite), so the
 * additive terms are branches. */
static const REAL *FO_TYPED(before)(const fo_hyper *hyper, ptrdiff_t n, const REAL *p,
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

static void FO_TYPED(step)(const fo_leaf *leaf, const fo_hyper *hyper, int rule, ptrdiff_t begin,
                           ptrdiff_t end)
{
    REAL param_tile[FO_TILE], grad_tile[FO_TILE], state_tile[FO_MAX_STATES][FO_TILE];
    REAL *state[FO_MAX_STATES];

    for (ptrdiff_t at = begin; at < end; at += FO_TILE) {
        const ptrdiff_t n = end - at < FO_TILE ? end - at : FO_TILE;
        REAL *param = FO_TYPED(load)(&leaf->param, at, n, param_tile);
        const REAL *grad = FO_TYPED(load)(&leaf->grad, at, n, grad_tile);
        for (int k = 0; k < FO_MAX_STATES; k++)
            state[k] = FO_TYPED(load)(&leaf->state[k], at, n, state_tile[k]);

        grad = FO_TYPED(before)(hyper, n, param, grad, grad_tile);
        FO_TYPED(rules)[rule](hyper->scalars, n, param, grad, state);

        FO_TYPED(store)(&leaf->param, at, n, param);
        for (int k = 0; k < FO_MAX_STATES; k++)
            FO_TYPED(store)(&leaf->state[k], at, n, state[k]);
    }
}

/* x = x + tiny * g for the parameter and each state: the traffic of a step, without its arithmetic.
 */
static void FO_TYPED(touch)(ptrdiff_t n, REAL *restrict x, const REAL *restrict g)
{
    const REAL tiny = (REAL)1e-30;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = x[i] + tiny * g[i];
}

static void FO_TYPED(stream)(const fo_leaf *leaf, const fo_hyper *hyper, int rule, ptrdiff_t begin,
                             ptrdiff_t end)
{
    REAL tile[FO_TILE], grad_tile[FO_TILE];
    (void)hyper, (void)rule;

    for (ptrdiff_t at = begin; at < end; at += FO_TILE) {
        const ptrdiff_t n = end - at < FO_TILE ? end - at : FO_TILE;
        const REAL *grad = FO_TYPED(load)(&leaf->grad, at, n, grad_tile);
        for (int k = -1; k < FO_MAX_STATES; k++) {
            const fo_array *array = k < 0 ? &leaf->param : &leaf->state[k];
            REAL *x = FO_TYPED(load)(array, at, n, tile);
            if (x != NULL)
                FO_TYPED(touch)(n, x, grad);
            FO_TYPED(store)(array, at, n, x);
        }
    }
}
