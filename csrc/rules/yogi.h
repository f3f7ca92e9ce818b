/* Yogi over one tile: Adam whose second moment moves by a part of the squared gradient, not of its
 * distance to it.
 * Zaheer et al., NeurIPS 2018, Algorithm 2, with Adam's bias corrections; the order of operations
 * is pytorch_optimizer's (4.1.0).
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/yogi.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. The sign of NaN is 0, as in torch. */
#undef YOGI_SCALARS
#define YOGI_SCALARS(F)                                                                            \
    F(keep)      /* 1 - lr * weight_decay if the decay is decoupled, else 1 */                     \
    F(w1)        /* 1 - beta1 */                                                                   \
    F(w2)        /* 1 - beta2 */                                                                   \
    F(root)      /* sqrt(1 - beta2^t) */                                                           \
    F(eps)       /* added to sqrt(v) / root */                                                     \
    F(step_size) /* lr / (1 - beta1^t) */

FO_INLINE void FO_RULE(yogi)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(YOGI_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL square = g[i] * g[i], gap = v[i] - square;
        const REAL moved = v[i] - (w2 * square) * FO_TYPED(sign_or_zero)(gap);
        p[i] = p[i] * keep - (step_size * mean) / (FO_TYPED(divide)(FO_SQRT(moved), root) + eps);
        m[i] = mean;
        v[i] = moved;
    }
}
