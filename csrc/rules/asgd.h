/* Averaged gradient descent over one tile: a shrinking rate, and a running mean of the parameter.
 * Polyak & Juditsky, SIAM J. Control Optim. 30(4), 1992; in the form of Bottou's SGD and torch.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/asgd.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. Before the mean begins, state[0] is a
 * copy of the parameter, by a loop of its own: 0 times an infinite state would be NaN. */
#undef ASGD_SCALARS
#define ASGD_SCALARS(F)                                                                            \
    F(keep) /* 1 - lambd * eta */                                                                  \
    F(eta)  /* the rate of this step, of the last step's lr */                                     \
    F(mu)   /* the parameter's weight in the mean; 1 before the mean begins */

FO_INLINE void FO_RULE(asgd)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(ASGD_SCALARS)
    REAL *restrict p = param, *restrict a = state[0];
    const REAL *restrict g = grad;

    if (mu == 1) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL now = p[i] * keep - eta * g[i];
            p[i] = now;
            a[i] = now;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL now = p[i] * keep - eta * g[i];
            const REAL mean = a[i] + (now - a[i]) * mu;
            p[i] = now;
            a[i] = mean;
        }
    }
}
