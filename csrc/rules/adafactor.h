/* Adafactor over one tile.
 * Shazeer & Stern, ICML 2018, Algorithms 4 and 5, as in torch: the rate is relative to the size of
 * the parameter, and the whole update is limited.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT, FO_EPSILON), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adafactor.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. Of matrices state[0] and state[1] are
 * the factors of each element, found before (factors.inc), else state[2] is the second moment. */
#undef ADAFACTOR_SCALARS
#define ADAFACTOR_SCALARS(F)                                                                       \
    F(weight) /* t^beta2_decay, of the new squares */                                              \
    F(eps1)   /* least estimate, squared, and mean; negative: that of the type */                  \
    F(keep)   /* 1 - lr * weight_decay */                                                          \
    F(rate)   /* min(lr, 1 / sqrt(t)) */                                                           \
    F(eps2)   /* least size of the parameter */                                                    \
    F(d)      /* largest size of an update */

FO_INLINE REAL FO_TYPED(least_estimate)(double eps)
{
    eps = eps < 0 ? (double)FO_EPSILON : eps;
    return (REAL)(eps * eps);
}

FO_INLINE REAL FO_TYPED(by_estimate)(REAL g, REAL estimate, REAL least)
{
    return g / FO_SQRT(estimate < least ? least : estimate); /* a NaN stays */
}

FO_INLINE REAL FO_TYPED(by_factors)(REAL g, REAL row, REAL column, REAL most)
{
    const REAL factor = row * column;
    return g * (factor > most ? most : factor);
}

FO_INLINE REAL FO_TYPED(most_factor)(double eps)
{
    return (REAL)(1 / (eps < 0 ? (double)FO_EPSILON : eps));
}

FO_INLINE void FO_RULE(adafactor_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                            const REAL *grad, REAL *const *state, REAL *out)
{
    FO_PLACES(ADAFACTOR_SCALARS)
    const REAL weight = (REAL)h[at_weight], least = FO_TYPED(least_estimate)(h[at_eps1]);
    const REAL most = FO_TYPED(most_factor)(h[at_eps1]);
    const REAL *restrict g = grad, *restrict rows = state[0], *restrict columns = state[1];
    const REAL *restrict v = state[2];
    REAL *restrict u = out;

    (void)param;
    if (v == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            u[i] = FO_TYPED(by_factors)(g[i], rows[i], columns[i], most);
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            u[i] = FO_TYPED(by_estimate)(g[i], v[i] + weight * (g[i] * g[i] - v[i]), least);
    }
}

FO_INLINE double FO_RULE(adafactor_trust)(const double *h, double count, double params,
                                          double directions)
{
    FO_PLACES(ADAFACTOR_SCALARS)
    const double size = sqrt(params / count), change = sqrt(directions / count) / h[at_d];
    return h[at_rate] * (size > h[at_eps2] ? size : h[at_eps2]) / (change > 1 ? change : 1);
}

FO_INLINE void FO_RULE(adafactor)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                  REAL *const *state)
{
    FO_PLACES(ADAFACTOR_SCALARS)
    const REAL weight = (REAL)h[at_weight], least = FO_TYPED(least_estimate)(h[at_eps1]);
    const REAL most = FO_TYPED(most_factor)(h[at_eps1]);
    const REAL keep = (REAL)h[at_keep], size = (REAL)h[FO_TRUST];
    const REAL *restrict g = grad, *restrict rows = state[0], *restrict columns = state[1];
    REAL *restrict p = param, *restrict v = state[2];

    if (v == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] * keep - size * FO_TYPED(by_factors)(g[i], rows[i], columns[i], most);
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL square = v[i] + weight * (g[i] * g[i] - v[i]);
            p[i] = p[i] * keep - size * FO_TYPED(by_estimate)(g[i], square, least);
            v[i] = square;
        }
    }
}
