/* Addition over one tile: what `GradAccumulator` does with the gradients of a micro-batch.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per element. The arrays do not overlap and hold n <= FO_TILE elements. */
#undef ADD_SCALARS
#define ADD_SCALARS(F) /* none */

FO_INLINE void FO_RULE(add)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                            REAL *const *state)
{
    REAL *restrict p = param;
    const REAL *restrict g = grad;

    (void)h, (void)state;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = p[i] + g[i];
}
