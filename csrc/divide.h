/* A quotient by a number that is known beforehand, as a division rounds it, without the divider,
 * which is the limit of steps in cache.
 * Markstein, IBM J. Res. Dev. 34(1), 1990; Brisebarre, Muller & Raina, IEEE Trans. Computers 53(8),
 * 2004, Algorithm 1: what a product with the reciprocal leaves is exact in a fused multiply-add,
 * and corrects it. tests/native/divide.c shows it for every divisor.
 *
 * Included by tile.h once per compute type (REAL, FO_FMA), so it has no guard.
 * Contract: x is a square root, of which what is left cannot be subnormal; `by` is 0 or between
 * 2^-60 and 2^60, and the same throughout a loop, out of which compilers take the reciprocal.
 * Zeros, infinities and NaNs come out as a division's. */
FO_INLINE REAL FO_TYPED(divide)(REAL x, REAL by)
{
#if defined(__FMA__) || defined(__aarch64__)
    const REAL inverse = 1 / by, quotient = x * inverse, rest = FO_FMA(-quotient, by, x);
    /* a rest of 0 would turn -0 into 0, and of infinity NaN is left */
    return __builtin_islessgreater(rest, 0) ? FO_FMA(rest, inverse, quotient) : quotient;
#else
    return x / by;
#endif
}
