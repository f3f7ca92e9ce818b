/* Adamax over one tile: Adam with the largest of the decaying gradients instead of the root.
 * Kingma & Ba, ICLR 2015, Algorithm 2, in torch's form: epsilon is added to the new gradient.
 *
 * Included once per compute type (REAL, FO_RULE, FO_ABS), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adamax.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef ADAMAX_SCALARS
#define ADAMAX_SCALARS(F)                                                                          \
    F(w1)        /* 1 - beta1 */                                                                   \
    F(beta2)     /* as given */                                                                    \
    F(eps)       /* added to |g| */                                                                \
    F(step_size) /* lr / (1 - beta1^t) */

FO_INLINE void FO_RULE(adamax)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                               REAL *const *state)
{
    FO_SCALARS(ADAMAX_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict u = state[1];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL old = u[i] * beta2, new = FO_ABS(g[i]) + eps;
        const REAL most = old >= new || old != old ? old : new; /* NaN stays */
        p[i] = p[i] - (step_size * mean) / most;
        m[i] = mean;
        u[i] = most;
    }
}
