/* Adam, AdamW and their AMSGrad forms over one tile.
 * Kingma & Ba, ICLR 2015, Algorithm 1; Loshchilov & Hutter, ICLR 2019, Algorithm 2;
 * Reddi, Kale & Kumar, ICLR 2018, Algorithm 2 (the maximum is of the uncorrected v, as in torch).
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adam.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[2] is NULL without AMSGrad.
 * In cache, the divider limits the speed: a square root and a division for each element. */
#undef ADAM_SCALARS
#define ADAM_SCALARS(F)                                                                            \
    F(keep)      /* 1 - lr * weight_decay (AdamW); exactly 1 (Adam) */                             \
    F(w1)        /* 1 - beta1 */                                                                   \
    F(beta2)     /* as given */                                                                    \
    F(w2)        /* 1 - beta2 */                                                                   \
    F(root)      /* sqrt(1 - beta2^t) */                                                           \
    F(eps)       /* inside: added to sqrt(v) / root */                                             \
    F(step_size) /* lr / (1 - beta1^t) */

FO_INLINE void FO_RULE(adam)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(ADAM_SCALARS)
    REAL *restrict p = param, *restrict m = state[0], *restrict v = state[1];
    REAL *restrict x = state[2];
    const REAL *restrict g = grad;

    if (x == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            p[i] =
                p[i] * keep - (step_size * mean) / (FO_TYPED(divide)(FO_SQRT(square), root) + eps);
            m[i] = mean;
            v[i] = square;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL mean = m[i] + w1 * (g[i] - m[i]);
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            const REAL most = x[i] >= square || x[i] != x[i] ? x[i] : square; /* NaN stays */
            p[i] = p[i] * keep - (step_size * mean) / (FO_TYPED(divide)(FO_SQRT(most), root) + eps);
            m[i] = mean;
            v[i] = square;
            x[i] = most;
        }
    }
}
