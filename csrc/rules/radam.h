/* RAdam over one tile: Adam whose rate of a step is rectified, and which steps along the mean of
 * the gradients alone as long as the mean of squares is of too few gradients.
 * Liu et al., ICLR 2020, Algorithm 2, in torch's form: epsilon is added to the uncorrected root.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/radam.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef RADAM_SCALARS
#define RADAM_SCALARS(F)                                                                           \
    F(keep)      /* 1 - lr * weight_decay if the decay is decoupled, else 1 */                     \
    F(w1)        /* 1 - beta1 */                                                                   \
    F(beta2)     /* as given */                                                                    \
    F(w2)        /* 1 - beta2 */                                                                   \
    F(eps)       /* added to sqrt(v) */                                                            \
    F(step_size) /* lr / (1 - beta1^t); if rectified, times sqrt(1 - beta2^t) * rectification */   \
    F(rectified) /* 1, or 0: the mean of squares has no effect yet */

FO_INLINE void FO_RULE(radam)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                              REAL *const *state)
{
    FO_SCALARS(RADAM_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    if (rectified != 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            p[i] = p[i] * keep - (step_size * mean) / (FO_SQRT(square) + eps);
            m[i] = mean;
            v[i] = square;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            p[i] = p[i] * keep - step_size * mean;
            m[i] = mean;
            v[i] = square;
        }
    }
}
