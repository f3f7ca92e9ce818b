/* Muon over one tile: momentum, whose direction the caller makes orthogonal between two passes.
 * Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; in the form of torch.optim.Muon.
 *
 * Included once per compute type (REAL, FO_RULE), so it has no guard.
 * Contract: one rounding per operator, in the order written; reference/muon.py repeats that order.
 * The arrays do not overlap and hold n <= FO_TILE elements. */
#undef MUON_SCALARS
#define MUON_SCALARS(F)                                                                            \
    F(lr)       /* as given: the caller multiplies the direction by what depends on the shape */   \
    F(keep)     /* 1 - lr * weight_decay */                                                        \
    F(momentum) /* as given */                                                                     \
    F(w)        /* 1 - momentum */                                                                 \
    F(nesterov) /* 1 or 0 */

/* The next mean of the gradients, from whichever of both is nearer, as torch's lerp does. */
FO_INLINE REAL FO_TYPED(muon_mean)(REAL m, REAL g, REAL momentum, REAL w)
{
    return w < (REAL)0.5 ? m + w * (g - m) : g - momentum * (g - m);
}

FO_INLINE void FO_RULE(muon_direction)(const double *h, ptrdiff_t n, const REAL *param,
                                       const REAL *grad, REAL *const *state, REAL *out)
{
    FO_SCALARS(MUON_SCALARS)
    const REAL *restrict g = grad, *restrict m = state[0];
    REAL *restrict u = out;

    (void)param, (void)lr, (void)keep;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = FO_TYPED(muon_mean)(m[i], g[i], momentum, w);
        const REAL ahead =
            momentum < (REAL)0.5 ? g[i] + momentum * (mean - g[i]) : mean - w * (mean - g[i]);
        u[i] = nesterov != 0 ? ahead : mean;
    }
}

FO_INLINE void FO_RULE(muon)(const double *h, ptrdiff_t n, REAL *param, const REAL *grad,
                             REAL *const *state)
{
    FO_SCALARS(MUON_SCALARS)
    REAL *restrict p = param, *restrict m = state[0];
    const REAL *restrict g = grad, *restrict u = state[1];

    (void)nesterov;
    FO_SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        const REAL mean = FO_TYPED(muon_mean)(m[i], g[i], momentum, w);
        p[i] = p[i] * keep - lr * u[i];
        m[i] = mean;
    }
}
