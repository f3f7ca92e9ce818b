/* RMSprop over one tile, with momentum and in its centered form if asked.
 * Tieleman & Hinton, Coursera lecture 6.5, 2012; Graves, 2013 (arXiv 1308.0850), equations 38 to 45
 * (centered), in torch's form: epsilon is added to the root, and the rate multiplies the buffer; or
 * in TensorFlow's: epsilon is under the root, and the buffer sums what the rate has multiplied.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/rmsprop.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements; state[1] is NULL without momentum,
 * state[2] is NULL unless centered. */
#undef RMSPROP_SCALARS
#define RMSPROP_SCALARS(F)                                                                         \
    F(lr)       /* as given */                                                                     \
    F(alpha)    /* as given */                                                                     \
    F(w)        /* 1 - alpha */                                                                    \
    F(eps)      /* added to the root, or under it */                                               \
    F(momentum) /* as given */                                                                     \
    F(inside)   /* 1 in TensorFlow's form, 0 in torch's */

FO_INLINE void FO_RULE(rmsprop)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                REAL *const *state)
{
    FO_SCALARS(RMSPROP_SCALARS)
    REAL *restrict p = param, *restrict v = state[0];
    REAL *restrict b = state[1], *restrict a = state[2];
    const REAL *restrict g = grad;
    REAL variance[FO_TILE];
    REAL *restrict x = variance;

    if (a == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL square = v[i] * alpha + (w * g[i]) * g[i];
            x[i] = square;
            v[i] = square;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL square = v[i] * alpha + (w * g[i]) * g[i];
            const REAL mean = a[i] + w * (g[i] - a[i]);
            const REAL rest = square - mean * mean;
            x[i] = rest < 0 ? (REAL)0 : rest; /* rounding alone makes it negative; a NaN stays */
            a[i] = mean;
            v[i] = square;
        }
    }
    /* each form in loops of its own, so that torch's does not pay for the other */
    if (b == NULL && inside == 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] - (lr * g[i]) / (FO_SQRT(x[i]) + eps);
    } else if (b == NULL) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = p[i] - (lr * g[i]) / FO_SQRT(x[i] + eps);
    } else if (inside != 0) {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL change = momentum * b[i] + (lr * g[i]) / FO_SQRT(x[i] + eps);
            p[i] = p[i] - change;
            b[i] = change;
        }
    } else {
        FO_SIMD
        for (ptrdiff_t i = 0; i < n; i++) {
            const REAL change = momentum * b[i] + g[i] / (FO_SQRT(x[i]) + eps);
            p[i] = p[i] - lr * change;
            b[i] = change;
        }
    }
}
