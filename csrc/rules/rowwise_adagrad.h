/* Adagrad with one number for each row, over one tile: the sum of the means of a row's squared
 * gradients. FBGEMM's EXACT_ROWWISE_ADAGRAD, in the order of roundings of adagrad.h.
 *
 * Included once per compute type (REAL, FO_RULE, FO_SQRT), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/adagrad.py repeats it.
 * The number of a row is updated first, by rowwise_adagrad_row; in the loop, state[0] repeats it.
 * Leaves of other groups have a number for each element. */
#undef ROWWISE_ADAGRAD_SCALARS
#define ROWWISE_ADAGRAD_SCALARS(F)                                                                 \
    ADAGRAD_SCALARS(F)                                                                             \
    F(rowwise) /* 1 in groups that have it */

/* `mean`: of the squares of the row's gradient. */
static REAL FO_RULE(rowwise_adagrad_row)(const double *h, REAL mean, REAL number)
{
    (void)h;
    return number + mean;
}

FO_INLINE void FO_RULE(rowwise_adagrad)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                                        REAL *const *state)
{
    FO_SCALARS(ROWWISE_ADAGRAD_SCALARS)
    REAL *restrict p = param;
    const REAL *restrict g = grad, *restrict s = state[0];

    if (rowwise == 0) {
        FO_RULE(adagrad)(h, n, param, grad, state);
        return;
    }
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL root = inside != 0 ? FO_SQRT(s[i] + eps) : FO_SQRT(s[i]) + eps;
        p[i] = p[i] - (step_size * g[i]) / root;
    }
}
