/* Adagrad over one tile: each element's step divided by the root of all its squared gradients.
 * Duchi, Hazan & Singer, JMLR 12, 2011, with diagonal matrices; in torch's form: epsilon is added
 * to the root; or in Keras's, where it is under the root.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adagrad.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef ADAGRAD_SCALARS
#define ADAGRAD_SCALARS(F)                                                                         \
    F(step_size) /* lr / (1 + (t - 1) * lr_decay) */                                               \
    F(eps)       /* added to the root, or under it */                                              \
    F(inside)    /* 1 in Keras's form, 0 in torch's */

FO_INLINE void FO_RULE(adagrad)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                REAL *const *state)
{
    FO_SCALARS(ADAGRAD_SCALARS)
    REAL *restrict p = param, *restrict s = state[0];
    const REAL *restrict g = grad;

    if (inside != 0) { /* in a loop of its own, so that torch's form does not pay for it */
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL sum = s[i] + g[i] * g[i];
            p[i] = p[i] - (step_size * g[i]) / FO_SQRT(sum + eps);
            s[i] = sum;
        }
        return;
    }
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL sum = s[i] + g[i] * g[i];
        p[i] = p[i] - (step_size * g[i]) / (FO_SQRT(sum) + eps);
        s[i] = sum;
    }
}
