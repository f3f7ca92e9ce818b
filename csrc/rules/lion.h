/* Lion over one tile: the sign of an interpolated momentum.
 * Chen et al., NeurIPS 2023, Algorithm 2; the order of operations is lion-pytorch's (0.2.5).
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/lion.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef LION_SCALARS
#define LION_SCALARS(F)                                                                            \
    F(lr)    /* as given */                                                                        \
    F(beta1) /* of the direction */                                                                \
    F(w1)    /* 1 - beta1 */                                                                       \
    F(beta2) /* of the momentum */                                                                 \
    F(w2)    /* 1 - beta2 */                                                                       \
    F(keep)  /* 1 - lr * weight_decay */

FO_INLINE void FO_RULE(lion)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(LION_SCALARS)
    REAL *restrict p = param, *restrict m = state[0];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL way = beta1 * m[i] + w1 * g[i];
        const REAL mean = beta2 * m[i] + w2 * g[i];
        p[i] = p[i] * keep - lr * FO_TYPED(sign_or_nan)(way);
        m[i] = mean;
    }
}
