/* What is measured of an array, piece by piece, in lanes.
 *
 * Included by tile.h once per compute type (REAL, FO_BITS, FO_INFINITE defined there), so it has no
 * guard. Element i of a tile goes to lane i % FO_LANES, and the lanes are folded when the tile is
 * done: compilers may use registers of any width, and the sums are the same bits for all of them.
 * Magnitudes are compared as bits, in which order a NaN is the largest of all. */
typedef struct FO_TYPED(tally) {
    double squares[FO_LANES];
    FO_BITS largest[FO_LANES], zeros[FO_LANES], nonfinite[FO_LANES];
} FO_TYPED(tally);

FO_INLINE void FO_TYPED(square)(double *squares, int n, const REAL *x)
{
    FO_SIMD
    for (int j = 0; j < n; j++) {
        const double wide = (double)x[j];
        squares[j] += wide * wide;
    }
}

FO_INLINE void FO_TYPED(count)(FO_TYPED(tally) * t, int n, const REAL *x)
{
    FO_SIMD
    for (int j = 0; j < n; j++) {
        FO_BITS size;
        memcpy(&size, &x[j], sizeof size);
        size &= (FO_BITS)-1 >> 1;
        t->largest[j] = size > t->largest[j] ? size : t->largest[j];
        t->zeros[j] += size == 0;
        t->nonfinite[j] += size >= FO_INFINITE;
    }
}

/* Adds n elements of x, the next of a tile; all pieces but its last have a multiple of FO_LANES. */
FO_INLINE void FO_TYPED(add)(FO_TYPED(tally) *restrict to, ptrdiff_t n, const REAL *restrict x)
{
    FO_TYPED(tally) t = *to; /* in registers */
    ptrdiff_t i = 0;
    for (; i + FO_LANES <= n; i += FO_LANES) {
        FO_TYPED(square)(t.squares, FO_LANES, x + i);
        FO_TYPED(count)(&t, FO_LANES, x + i);
    }
    *to = t;
    if (i < n) {
        FO_TYPED(square)(to->squares, (int)(n - i), x + i);
        FO_TYPED(count)(to, (int)(n - i), x + i);
    }
}

FO_INLINE fo_sums FO_TYPED(finish)(FO_TYPED(tally) * t)
{
    fo_sums sums = {.squares = fo_fold(t->squares)};
    FO_BITS largest = 0;
    REAL magnitude;
    for (int j = 0; j < FO_LANES; j++) {
        largest = t->largest[j] > largest ? t->largest[j] : largest;
        sums.zeros += (int64_t)t->zeros[j];
        sums.nonfinite += (int64_t)t->nonfinite[j];
    }
    memcpy(&magnitude, &largest, sizeof magnitude);
    sums.largest = (double)magnitude;
    return sums;
}
