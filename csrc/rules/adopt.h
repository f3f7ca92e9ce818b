/* ADOPT over one tile: Adam that divides a gradient by the root of those before it, and averages
 * the quotient.
 * Taniguchi et al., NeurIPS 2024, Algorithm 2, with the clip of the authors' code; the order of
 * operations is pytorch_optimizer's (4.1.0).
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adopt.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. The first step has a loop of its own:
 * with constants that leave m and p as they are, an infinite quotient times 0 would be NaN. */
#undef ADOPT_SCALARS
#define ADOPT_SCALARS(F)                                                                           \
    F(keep)  /* 1 - lr * weight_decay if the decay is decoupled, else 1 */                         \
    F(lr)    /* as given */                                                                        \
    F(w1)    /* 1 - beta1 */                                                                       \
    F(beta2) /* as given */                                                                        \
    F(w2)    /* 1 - beta2 */                                                                       \
    F(eps)   /* least divisor */                                                                   \
    F(clip)  /* bound of a quotient; infinity: none */                                             \
    F(first) /* 1 in the first step, which only begins v; else 0 */

FO_INLINE void FO_RULE(adopt)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                              REAL *const *state)
{
    FO_SCALARS(ADOPT_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    if (first != 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            p[i] = p[i] * keep;
            v[i] = v[i] + g[i] * g[i];
        }
        return;
    }
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL root = FO_SQRT(v[i]);
        const REAL ratio = g[i] / (root < eps ? eps : root); /* a NaN stays */
        const REAL low = ratio < -clip ? -clip : ratio;
        const REAL mean = m[i] + w1 * ((low > clip ? clip : low) - m[i]);
        const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
        p[i] = p[i] * keep - lr * mean;
        m[i] = mean;
        v[i] = square;
    }
}
