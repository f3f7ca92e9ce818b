/* What is measured of a leaf, piece by piece, in lanes.
 *
 * Included by tile.h once per compute type (REAL, FO_BITS, FO_INFINITE defined there), so it has no
 * guard. Element i of a tile goes to lane i % FO_LANES, and the lanes are folded when the tile is
 * done: compilers may use registers of any width, and the sums are the same bits for all of them.
 * Magnitudes are compared as bits, in which order a NaN is the largest of all.
 *
 * Squares of gradients and of directions, on which steps depend, are added in double from the
 * start; those of parameters and updates, which are for people, in REAL over the 4 elements that a
 * lane has of a block, which costs half as much, and in double from there. A block in which a float
 * is too small or too large for that is added again, in double.
 *
 * Every piece but the last of a tile is whole blocks. */
typedef struct FO_TYPED(tally) {
    double grad[FO_LANES], param[FO_LANES], update[FO_LANES];
    FO_BITS largest_grad[FO_LANES], largest_update[FO_LANES], zeros[FO_LANES];
    int64_t nonfinite;
} FO_TYPED(tally);

FO_INLINE FO_BITS FO_TYPED(magnitude)(REAL x)
{
    FO_BITS bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & ((FO_BITS)-1 >> 1);
}

/* The inner loops: n is FO_LANES, a constant, but for the last elements of a tile. */
FO_INLINE void FO_TYPED(square)(double *restrict squares, ptrdiff_t n, const REAL *restrict x)
{
    FO_SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const double wide = (double)x[j];
        squares[j] += wide * wide;
    }
}

FO_INLINE void FO_TYPED(enlarge)(FO_BITS *restrict largest, ptrdiff_t n, const REAL *restrict x)
{
    FO_SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const FO_BITS size = FO_TYPED(magnitude)(x[j]);
        largest[j] = size > largest[j] ? size : largest[j];
    }
}

FO_INLINE void FO_TYPED(count_zeros)(FO_BITS *restrict zeros, ptrdiff_t n, const REAL *restrict x)
{
    FO_SIMD
    for (ptrdiff_t j = 0; j < n; j++)
        zeros[j] += FO_TYPED(magnitude)(x[j]) == 0;
}

static __attribute__((noinline)) int64_t FO_TYPED(count_nonfinite)(ptrdiff_t n, const REAL *x)
{
    int64_t count = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        count += FO_TYPED(magnitude)(x[i]) >= FO_INFINITE;
    return count;
}

FO_INLINE FO_BITS FO_TYPED(largest_lane)(const FO_BITS *lanes)
{
    FO_BITS largest = 0;
    for (int j = 0; j < FO_LANES; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    return largest;
}

/* Adds the squares of n elements. */
FO_INLINE void FO_TYPED(add_squares)(double *restrict to, ptrdiff_t n, const REAL *restrict g)
{
    double squares[FO_LANES];
    ptrdiff_t i = 0;
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++)
        squares[j] = to[j];
    for (; i + FO_LANES <= n; i += FO_LANES)
        FO_TYPED(square)(squares, FO_LANES, g + i);
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++)
        to[j] = squares[j];
    if (i < n)
        FO_TYPED(square)(to, n - i, g + i);
}

/* Adds n elements of a gradient. */
FO_INLINE void FO_TYPED(add_grad)(FO_TYPED(tally) *restrict to, ptrdiff_t n, const REAL *g)
{
    double squares[FO_LANES];
    FO_BITS largest[FO_LANES], zeros[FO_LANES];
    ptrdiff_t i = 0;
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++) /* into registers */
        squares[j] = to->grad[j], largest[j] = to->largest_grad[j], zeros[j] = to->zeros[j];
    for (; i + FO_LANES <= n; i += FO_LANES) {
        FO_TYPED(square)(squares, FO_LANES, g + i);
        FO_TYPED(enlarge)(largest, FO_LANES, g + i);
        FO_TYPED(count_zeros)(zeros, FO_LANES, g + i);
    }
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++)
        to->grad[j] = squares[j], to->largest_grad[j] = largest[j], to->zeros[j] = zeros[j];
    if (i < n) {
        FO_TYPED(square)(to->grad, n - i, g + i);
        FO_TYPED(enlarge)(to->largest_grad, n - i, g + i);
        FO_TYPED(count_zeros)(to->zeros, n - i, g + i);
    }
    if (FO_TYPED(largest_lane)(to->largest_grad) >= FO_INFINITE) /* seldom */
        to->nonfinite += FO_TYPED(count_nonfinite)(n, g);
}

/* Whether sums of squares are right: none of them is of squares that were below the least normal
 * float, or beyond the largest. In double nothing can be done about those. */
FO_INLINE int FO_TYPED(are_right)(const REAL *lanes)
{
    int are = 1;
    if (sizeof(REAL) == sizeof(double))
        return 1;
    FO_REDUCE(&, are)
    for (int j = 0; j < FO_LANES; j++)
        are &= (lanes[j] >= (REAL)0x1p-100) & (lanes[j] <= (REAL)0x1p120);
    return are;
}

/* Adds the sums of a block; in double, from its n elements, where they are not right. Nothing where
 * all are zero, as updates of rows without gradient are. */
static __attribute__((noinline)) void FO_TYPED(add_again)(double *to, ptrdiff_t n, const REAL *x)
{
    double lanes[FO_LANES] = {0};
    FO_BITS some = 0;
    FO_REDUCE(|, some)
    for (ptrdiff_t i = 0; i < n; i++)
        some |= FO_TYPED(magnitude)(x[i]);
    if (some == 0)
        return;
    FO_TYPED(add_squares)(lanes, n, x);
    for (int j = 0; j < FO_LANES; j++)
        to[j] += lanes[j];
}

FO_INLINE void FO_TYPED(add_lanes)(double *restrict to, const REAL *restrict lanes, ptrdiff_t n,
                                   const REAL *x)
{
    if (FO_TYPED(are_right)(lanes)) {
        FO_SIMD
        for (int j = 0; j < FO_LANES; j++)
            to[j] += (double)lanes[j];
    } else {
        FO_TYPED(add_again)(to, n, x);
    }
}

/* Adds n elements of a parameter after the step; `old` is the same before it. */
FO_INLINE void FO_TYPED(add_step)(FO_TYPED(tally) *restrict to, ptrdiff_t n, const REAL *restrict p,
                                  const REAL *restrict old)
{
    REAL moved[FO_BLOCK];
    FO_BITS largest[FO_LANES];
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++)
        largest[j] = to->largest_update[j];
    for (ptrdiff_t at = 0; at < n; at += FO_BLOCK, p += FO_BLOCK, old += FO_BLOCK) {
        const int count = n - at < FO_BLOCK ? (int)(n - at) : FO_BLOCK;
        REAL params[FO_LANES] = {0}, updates[FO_LANES] = {0};
        for (int i = 0; i + FO_LANES <= count; i += FO_LANES) {
            FO_SIMD
            for (int j = 0; j < FO_LANES; j++) {
                const REAL u = p[i + j] - old[i + j];
                const FO_BITS size = FO_TYPED(magnitude)(u);
                moved[i + j] = u;
                params[j] += p[i + j] * p[i + j];
                updates[j] += u * u;
                largest[j] = size > largest[j] ? size : largest[j];
            }
        }
        for (int i = count - count % FO_LANES; i < count; i++) {
            const int j = i % FO_LANES;
            moved[i] = p[i] - old[i];
            params[j] += p[i] * p[i];
            updates[j] += moved[i] * moved[i];
            FO_TYPED(enlarge)(largest + j, 1, moved + i);
        }
        FO_TYPED(add_lanes)(to->param, params, count, p);
        FO_TYPED(add_lanes)(to->update, updates, count, moved);
    }
    FO_SIMD
    for (int j = 0; j < FO_LANES; j++)
        to->largest_update[j] = largest[j];
}

static double FO_TYPED(number)(FO_BITS magnitude)
{
    REAL x;
    memcpy(&x, &magnitude, sizeof x);
    return (double)x;
}

/* Writes the sums of a tile's gradient, and of its parameter and update. */
static void FO_TYPED(finish_grad)(FO_TYPED(tally) * t, fo_stats *to)
{
    to->grad = fo_fold(t->grad);
    to->largest_grad = FO_TYPED(number)(FO_TYPED(largest_lane)(t->largest_grad));
    to->nonfinite = t->nonfinite;
    to->zeros = 0;
    for (int j = 0; j < FO_LANES; j++)
        to->zeros += (int64_t)t->zeros[j];
}

static void FO_TYPED(finish_step)(FO_TYPED(tally) * t, fo_stats *to)
{
    to->param = fo_fold(t->param);
    to->update = fo_fold(t->update);
    to->largest_update = FO_TYPED(number)(FO_TYPED(largest_lane)(t->largest_update));
}
