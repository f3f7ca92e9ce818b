/* NAdam over one tile: Adam with Nesterov's momentum.
 * Dozat, ICLR workshop 2016, Algorithm 2, in torch's form: the momentum is warmed up, and the
 * update is a sum of the gradient and of its mean, each with a weight of its own.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/nadam.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef NADAM_SCALARS
#define NADAM_SCALARS(F)                                                                           \
    F(keep)   /* 1 - lr * weight_decay if the decay is decoupled, else 1 */                        \
    F(w1)     /* 1 - beta1 */                                                                      \
    F(beta2)  /* as given */                                                                       \
    F(w2)     /* 1 - beta2 */                                                                      \
    F(root)   /* sqrt(1 - beta2^t) */                                                              \
    F(eps)    /* added to sqrt(v) / root */                                                        \
    F(g_size) /* lr * (1 - mu(t)) / (1 - product of mu(1) to mu(t)) */                             \
    F(m_size) /* lr * mu(t + 1) / (1 - product of mu(1) to mu(t + 1)) */

FO_INLINE void FO_RULE(nadam)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                              REAL *const *state)
{
    FO_SCALARS(NADAM_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
        const REAL change = g_size * g[i] + m_size * mean;
        p[i] = p[i] * keep - change / (FO_TYPED(divide)(FO_SQRT(square), root) + eps);
        m[i] = mean;
        v[i] = square;
    }
}
