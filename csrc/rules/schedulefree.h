/* Schedule-Free AdamW and Schedule-Free SGD over one tile.
 * Defazio et al., NeurIPS 2024 (arXiv 2405.15682), Algorithm 1 and equations 3 to 5, in the form of
 * schedulefree 1.4.1: the parameter is y, at which gradients are taken, z takes the steps, and the
 * average x is not kept, as y = (1 - beta1) * z + beta1 * x.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/schedulefree.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[1] is NULL for SGD. */
#undef SCHEDULEFREE_SCALARS
#define SCHEDULEFREE_SCALARS(F)                                                                    \
    F(beta2)        /* of v, as given */                                                           \
    F(w2)           /* 1 - beta2 */                                                                \
    F(root)         /* sqrt(1 - beta2^k); 1 for SGD */                                             \
    F(eps)          /* added to sqrt(v) / root */                                                  \
    F(weight_decay) /* as given; of y */                                                           \
    F(part)         /* weight of the new z in the average */                                       \
    F(y_size)       /* lr * (1 - beta1 * (1 - part)) */                                            \
    F(z_size)       /* lr, after warmup */

FO_INLINE void FO_RULE(schedulefree)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                     REAL *const *state)
{
    FO_SCALARS(SCHEDULEFREE_SCALARS)
    REAL *restrict y = param, *restrict z = state[0], *restrict v = state[1];
    const REAL *restrict g = grad;

    if (v == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL way = g[i] + weight_decay * y[i];
            const REAL lag = z[i] - y[i], new_z = z[i] - z_size * way;
            y[i] = (y[i] + part * lag) - y_size * way;
            z[i] = new_z;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL square = v[i] * beta2 + (w2 * g[i]) * g[i];
            const REAL way =
                g[i] / (FO_TYPED(divide)(FO_SQRT(square), root) + eps) + weight_decay * y[i];
            const REAL lag = z[i] - y[i], new_z = z[i] - z_size * way;
            y[i] = (y[i] + part * lag) - y_size * way;
            z[i] = new_z;
            v[i] = square;
        }
    }
}
