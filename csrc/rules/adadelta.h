/* Adadelta over one tile: the gradient times the ratio of two roots, of the mean squares of past
 * updates and of gradients.
 * Zeiler, 2012 (arXiv 1212.5701), Algorithm 1, in torch's form: a rate multiplies the update.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adadelta.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef ADADELTA_SCALARS
#define ADADELTA_SCALARS(F)                                                                        \
    F(lr)  /* as given */                                                                          \
    F(rho) /* as given */                                                                          \
    F(w)   /* 1 - rho */                                                                           \
    F(eps) /* inside both roots */

FO_INLINE void FO_RULE(adadelta)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                 REAL *const *state)
{
    FO_SCALARS(ADADELTA_SCALARS)
    REAL *restrict p = param, *restrict v = state[0], *restrict a = state[1];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL square = v[i] * rho + (w * g[i]) * g[i];
        const REAL delta = FO_SQRT(a[i] + eps) / FO_SQRT(square + eps) * g[i];
        const REAL sum = a[i] * rho + (w * delta) * delta;
        p[i] = p[i] - lr * delta;
        v[i] = square;
        a[i] = sum;
    }
}
