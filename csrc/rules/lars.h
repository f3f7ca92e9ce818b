/* LARS over one tile: gradient descent with momentum and a rate for each leaf.
 * You, Gitman & Ginsburg, 2017 (arXiv 1708.03888), Algorithm 1: the rate is inside the buffer.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/lars.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef LARS_SCALARS
#define LARS_SCALARS(F)                                                                            \
    F(lr)           /* as given */                                                                 \
    F(momentum)     /* as given */                                                                 \
    F(weight_decay) /* as given */                                                                 \
    F(trust)        /* the trust coefficient */                                                    \
    F(eps)          /* added to the norms that divide */

FO_INLINE void FO_RULE(lars_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                       const REAL *grad, REAL *const *state, REAL *out)
{
    (void)h, (void)param, (void)state;
    memcpy(out, grad, (size_t)n * sizeof *out);
}

FO_INLINE double FO_RULE(lars_trust)(const double *h, double count, double params,
                                     double directions)
{
    FO_PLACES(LARS_SCALARS)
    const double param = sqrt(params), direction = sqrt(directions);
    (void)count;
    if (!(param > 0 && direction > 0))
        return 1;
    return h[at_trust] * param / (direction + h[at_weight_decay] * param + h[at_eps]);
}

FO_INLINE void FO_RULE(lars)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(LARS_SCALARS)
    const REAL rate = (REAL)(h[at_lr] * h[FO_TRUST]);
    REAL *restrict p = param, *restrict b = state[0];
    const REAL *restrict g = grad;

    (void)lr, (void)trust, (void)eps;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL change = momentum * b[i] + rate * (g[i] + weight_decay * p[i]);
        p[i] = p[i] - change;
        b[i] = change;
    }
}
