/* AdEMAMix over one tile: Adam along a sum of a fast and of a slow mean of the gradients.
 * Pagliardini, Ablin & Grangier, ICLR 2025, Algorithm 1: the slow mean is not bias-corrected. The
 * decay comes before the update, as in pytorch_optimizer (4.1.0).
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/ademamix.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef ADEMAMIX_SCALARS
#define ADEMAMIX_SCALARS(F)                                                                        \
    F(keep)      /* 1 - lr * weight_decay */                                                       \
    F(w1)        /* 1 - beta1 */                                                                   \
    F(beta2)     /* as given */                                                                    \
    F(w2)        /* 1 - beta2 */                                                                   \
    F(w3)        /* 1 - beta3 in this step */                                                      \
    F(root)      /* sqrt(1 - beta2^t) */                                                           \
    F(eps)       /* added to sqrt(v) / root */                                                     \
    F(fast_size) /* lr / (1 - beta1^t) */                                                          \
    F(slow_size) /* lr * alpha in this step */

FO_INLINE void FO_RULE(ademamix)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                 REAL *const *state)
{
    FO_SCALARS(ADEMAMIX_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    REAL *restrict s = state[2];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = m[i] + w1 * (g[i] - m[i]);
        const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
        const REAL slow = s[i] + w3 * (g[i] - s[i]);
        const REAL change = fast_size * mean + slow_size * slow;
        p[i] = p[i] * keep - change / (FO_TYPED(divide)(FO_SQRT(square), root) + eps);
        m[i] = mean;
        v[i] = square;
        s[i] = slow;
    }
}
