/* Cautious Lion over one tile: an element whose direction and gradient differ in sign is decayed
 * and not moved; the fewer the others are, the further they move. Liang et al., 2024 (arXiv
 * 2411.16085); see cautious_adam.h, whose functions it uses.
 *
 * Included once per compute type (REAL, FO_RULE), after lion.h and cautious_adam.h, so it has no
 * guard.
 * Contract: one rounding per operator, in the order written; reference/lion.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef CAUTIOUS_LION_SCALARS
#define CAUTIOUS_LION_SCALARS(F)                                                                   \
    LION_SCALARS(F)                                                                                \
    F(cautious) /* 0 or 1 */

FO_INLINE void FO_RULE(cautious_lion_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                                const REAL *grad, REAL *const *state, REAL *out)
{
    FO_PLACES(CAUTIOUS_LION_SCALARS)
    const REAL beta1 = (REAL)h[at_beta1], w1 = (REAL)h[at_w1];
    const REAL *restrict g = grad, *restrict m = state[0];
    REAL *restrict u = out;

    (void)param;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        u[i] = FO_TYPED(agrees)(beta1 * m[i] + w1 * g[i], g[i]);
}

FO_INLINE double FO_RULE(cautious_lion_trust)(const double *h, double n, double count,
                                              double marked)
{
    FO_PLACES(CAUTIOUS_LION_SCALARS)
    (void)n;
    return h[at_cautious] != 0 ? FO_TYPED(for_the_still)(count, marked) : 1;
}

FO_INLINE void FO_RULE(cautious_lion)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                      REAL *const *state)
{
    FO_SCALARS(CAUTIOUS_LION_SCALARS)
    const REAL size = (REAL)(h[at_lr] * h[FO_TRUST]);
    const REAL least = cautious != 0 ? (REAL)0 : (REAL)1;
    REAL *restrict p = param, *restrict m = state[0];
    const REAL *restrict g = grad;

    (void)lr;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL way = beta1 * m[i] + w1 * g[i];
        const REAL sign = FO_TYPED(sign_or_nan)(way);
        const REAL mean = beta2 * m[i] + w2 * g[i];
        const REAL moves = FO_TYPED(agrees)(way, g[i]);
        p[i] = p[i] * keep - size * (sign * (moves > least ? moves : least));
        m[i] = mean;
    }
}
