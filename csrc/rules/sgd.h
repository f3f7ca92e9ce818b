/* Gradient descent, with momentum and Nesterov's form of it, over one tile.
 * Sutskever et al., ICML 2013, in torch's parametrisation: the rate multiplies the buffer.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/sgd.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[0] is NULL without momentum. */
#undef SGD_SCALARS
#define SGD_SCALARS(F)                                                                             \
    F(lr)       /* as given */                                                                     \
    F(momentum) /* as given */                                                                     \
    F(w)        /* 1 - dampening */                                                                \
    F(nesterov) /* 1 or 0 */                                                                       \
    F(first)    /* 1 in the first step: the buffer becomes the gradient, undamped */

FO_INLINE void FO_RULE(sgd)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                            REAL *const *state)
{
    FO_SCALARS(SGD_SCALARS)
    REAL *restrict p = param, *restrict b = state[0];
    const REAL *restrict g = grad;

    if (b == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] - lr * g[i];
        return;
    }
    if (first != 0)
        memcpy(b, g, (size_t)n * sizeof *b);
    else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            b[i] = momentum * b[i] + w * g[i];
    }
    if (nesterov != 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] - lr * (g[i] + momentum * b[i]);
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] - lr * b[i];
    }
}
