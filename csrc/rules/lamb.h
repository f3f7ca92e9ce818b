/* LAMB over one tile: Adam with a rate for each leaf.
 * You et al., ICLR 2020, Algorithm 2, with phi the identity and Adam's bias corrections.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/lamb.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef LAMB_SCALARS
#define LAMB_SCALARS(F)                                                                            \
    F(lr)           /* as given */                                                                 \
    F(w1)           /* 1 - beta1 */                                                                \
    F(beta2)        /* as given */                                                                 \
    F(w2)           /* 1 - beta2 */                                                                \
    F(unbias)       /* 1 / (1 - beta1^t) */                                                        \
    F(root)         /* sqrt(1 - beta2^t) */                                                        \
    F(eps)          /* added to sqrt(v) / root */                                                  \
    F(weight_decay) /* as given */

FO_INLINE REAL FO_TYPED(lamb_ratio)(REAL p, REAL m, REAL v, REAL unbias, REAL root, REAL eps,
                                    REAL weight_decay)
{
    return (unbias * m) / (FO_TYPED(divide)(FO_SQRT(v), root) + eps) + weight_decay * p;
}

FO_INLINE void FO_RULE(lamb_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                       const REAL *grad, REAL *const *state, REAL *out)
{
    FO_SCALARS(LAMB_SCALARS)
    const REAL *restrict p = param, *restrict g = grad;
    const REAL *restrict m = state[0], *restrict v = state[1];
    REAL *restrict u = out;

    (void)lr;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
        u[i] = FO_TYPED(lamb_ratio)(p[i], mean, square, unbias, root, eps, weight_decay);
    }
}

FO_INLINE double FO_RULE(lamb_trust)(const double *h, double count, double params,
                                     double directions)
{
    const double param = sqrt(params), direction = sqrt(directions);
    (void)count;
    (void)h;
    return param > 0 && direction > 0 ? param / direction : 1;
}

FO_INLINE void FO_RULE(lamb)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(LAMB_SCALARS)
    const REAL rate = (REAL)(h[at_lr] * h[FO_TRUST]);
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    (void)lr;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
        p[i] =
            p[i] - rate * FO_TYPED(lamb_ratio)(p[i], mean, square, unbias, root, eps, weight_decay);
        m[i] = mean;
        v[i] = square;
    }
}
