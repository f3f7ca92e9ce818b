/* Prodigy over one tile: Adam at a rate d, which it estimates.
 * Mishchenko & Defazio, ICML 2024 (arXiv 2306.06101), Algorithm 4, in the form of prodigyopt 1.1.2.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT, FO_ABS), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/prodigy.py repeats that
 * order. The arrays do not overlap and hold n <= FO_TILE elements. state[2] and state[3] may be
 * samples of the leaf's elements, with zeros between. */
#undef PRODIGY_SCALARS
#define PRODIGY_SCALARS(F)                                                                         \
    F(learns) /* 0 where lr is: moments and s stay as they are; else 1 */                          \
    F(beta1)  /* as given */                                                                       \
    F(w1)     /* d * (1 - beta1), of the new d where beta1 is 0 */                                 \
    F(beta2)  /* as given */                                                                       \
    F(w2)     /* d^2 * (1 - beta2) */                                                              \
    F(beta3)  /* of s */                                                                           \
    F(ws)     /* weight of the gradient in s */                                                    \
    F(keep)   /* 1 - size * weight_decay, if that is decoupled */                                  \
    F(size)   /* d * lr, with bias corrections if asked */                                         \
    F(eps)    /* the new d * eps */

/* Writes g * (p0 - p) and |s|, of which the new d is made. */
FO_INLINE void FO_RULE(prodigy_terms)(const double *h, ptrdiff_t n, const REAL *param,
                                      const REAL *grad, REAL *const *state, REAL *first,
                                      REAL *second)
{
    FO_PLACES(PRODIGY_SCALARS)
    const REAL learns = (REAL)h[at_learns], beta3 = (REAL)h[at_beta3], ws = (REAL)h[at_ws];
    const REAL *restrict p = param, *restrict g = grad, *restrict s = state[2];
    const REAL *restrict p0 = state[3];
    REAL *restrict dots = first, *restrict sizes = second;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        dots[i] = learns != 0 ? g[i] * (p0[i] - p[i]) : 0;
        sizes[i] = learns != 0 ? FO_ABS(s[i] * beta3 + ws * g[i]) : 0;
    }
}

FO_INLINE void FO_RULE(prodigy)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                REAL *const *state)
{
    FO_SCALARS(PRODIGY_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    REAL *restrict s = state[2];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = learns != 0 ? m[i] * beta1 + w1 * g[i] : m[i];
        const REAL square = learns != 0 ? v[i] * beta2 + (w2 * g[i]) * g[i] : v[i];
        const REAL sum = learns != 0 ? s[i] * beta3 + ws * g[i] : s[i];
        p[i] = p[i] * keep - (size * mean) / (FO_SQRT(square) + eps);
        m[i] = mean;
        v[i] = square;
        s[i] = sum;
    }
}
