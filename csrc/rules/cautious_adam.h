/* Cautious AdamW over one tile, also with AMSGrad: an element whose mean and gradient differ in
 * sign is decayed and not moved; the fewer the others are, the further they move. Liang et al.,
 * 2024 (arXiv 2411.16085), Algorithm 2, in timm's form (1.0.31): the share of those that move
 * counts as at least 1e-3. Signs are compared, where timm looks at the product, which may
 * underflow. Leaves of one list that are not cautious are stepped as by adam.h.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), after adam.h, so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adam.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[2] is NULL without AMSGrad. */
#undef CAUTIOUS_ADAM_SCALARS
#define CAUTIOUS_ADAM_SCALARS(F)                                                                   \
    ADAM_SCALARS(F)                                                                                \
    F(cautious) /* 0 or 1 */

/* 1 if an element moves along `way`, else 0; the product with it keeps a NaN. */
FO_INLINE REAL FO_TYPED(agrees)(REAL way, REAL g)
{
    return (g > 0 ? way : g < 0 ? -way : (REAL)0) > 0 ? (REAL)1 : (REAL)0;
}

/* The factor for those that move, of `marked` among `count` elements. */
FO_INLINE double FO_TYPED(for_the_still)(double count, double marked)
{
    const double share = count > 0 ? marked / count : 1;
    return 1 / (share > 1e-3 ? share : 1e-3);
}

FO_INLINE void FO_RULE(cautious_adam_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                                const REAL *grad, REAL *const *state, REAL *out)
{
    FO_PLACES(CAUTIOUS_ADAM_SCALARS)
    const REAL w1 = (REAL)h[at_w1];
    const REAL *restrict g = grad, *restrict m = state[0];
    REAL *restrict u = out;

    (void)param;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        u[i] = FO_TYPED(agrees)(m[i] + w1 * (g[i] - m[i]), g[i]);
}

FO_INLINE double FO_RULE(cautious_adam_trust)(const double *h, double n, double count,
                                              double marked)
{
    FO_PLACES(CAUTIOUS_ADAM_SCALARS)
    (void)n;
    return h[at_cautious] != 0 ? FO_TYPED(for_the_still)(count, marked) : 1;
}

FO_INLINE void FO_RULE(cautious_adam)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                      REAL *const *state)
{
    FO_SCALARS(CAUTIOUS_ADAM_SCALARS)
    const REAL size = (REAL)(h[at_step_size] * h[FO_TRUST]);
    const REAL least = cautious != 0 ? (REAL)0 : (REAL)1;
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    REAL *restrict x = state[2];
    const REAL *restrict g = grad;

    (void)step_size;
    if (x == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            const REAL moves = FO_TYPED(agrees)(mean, g[i]);
            const REAL way = mean * (moves > least ? moves : least);
            p[i] = p[i] * keep - (size * way) / (FO_TYPED(divide)(FO_SQRT(square), root) + eps);
            m[i] = mean;
            v[i] = square;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            const REAL most = x[i] >= square || x[i] != x[i] ? x[i] : square; /* NaN stays */
            const REAL moves = FO_TYPED(agrees)(mean, g[i]);
            const REAL way = mean * (moves > least ? moves : least);
            p[i] = p[i] * keep - (size * way) / (FO_TYPED(divide)(FO_SQRT(most), root) + eps);
            m[i] = mean;
            v[i] = square;
            x[i] = most;
        }
    }
}
