/* SignSGD over one tile, and Signum, its form with momentum: every element moves by the rate.
 * Bernstein et al., ICML 2018, Algorithms 1 and 2; the order of operations is pytorch_optimizer's
 * (4.1.0).
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/signsgd.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[0] is NULL without momentum. The
 * sign of NaN is 0, as in torch. */
#undef SIGNSGD_SCALARS
#define SIGNSGD_SCALARS(F)                                                                         \
    F(keep) /* 1 - lr * weight_decay if the decay is decoupled, else 1 */                          \
    F(lr)   /* as given */                                                                         \
    F(w)    /* 1 - momentum */

FO_INLINE void FO_RULE(signsgd)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                REAL *const *state)
{
    FO_SCALARS(SIGNSGD_SCALARS)
    REAL *restrict p = param, *restrict b = state[0];
    const REAL *restrict g = grad;

    if (b == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] * keep - lr * FO_TYPED(sign_or_zero)(g[i]);
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = b[i] + w * (g[i] - b[i]);
            p[i] = p[i] * keep - lr * FO_TYPED(sign_or_zero)(mean);
            b[i] = mean;
        }
    }
}
