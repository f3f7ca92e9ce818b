/* Rprop over one tile: each element moves by a step size of its own, against the gradient's sign.
 * Riedmiller & Braun, ICNN 1993, in torch's form: where the sign has changed the step size shrinks,
 * and the element does not move, as if its gradient were 0.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/rprop.py repeats it.
 * The arrays do not overlap and hold n <= FO_TILE elements. The sign of NaN is 0, as in torch. */
#undef RPROP_SCALARS
#define RPROP_SCALARS(F)                                                                           \
    F(minus) /* factor of a step size whose gradient has changed its sign */                       \
    F(plus)  /* factor where it has kept its sign */                                               \
    F(least) /* bounds of a step size */                                                           \
    F(most)

FO_INLINE void FO_RULE(rprop)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                              REAL *const *state)
{
    FO_SCALARS(RPROP_SCALARS)
    REAL *restrict p = param, *restrict q = state[0], *restrict s = state[1];
    const REAL *restrict g = grad;

    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL way = g[i] * q[i];
        const REAL free = s[i] * (way > 0 ? plus : way < 0 ? minus : (REAL)1);
        const REAL low = free < least ? least : free; /* a NaN stays */
        const REAL size = low > most ? most : low;
        const REAL kept = way < 0 ? (REAL)0 : g[i];
        p[i] = p[i] - FO_TYPED(sign_or_zero)(kept) * size;
        q[i] = kept;
        s[i] = size;
    }
}
