/* Storage formats: how an array's elements become a tile of REAL, and go back.
 *
 * Included by tile.h once per compute type. A native, aligned array is its own tile: load returns
 * its address and store has nothing to do. Anything else is decoded into the tile that the caller
 * brings. A new format is one more case in load, in store and in fo_format_size. */

/* f32 from f64 rounds to nearest; f64 from f32 is exact. Elements of any alignment. */
static void FO_TYPED(decode_f64)(const char *from, ptrdiff_t n, REAL *tile)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        double x;
        memcpy(&x, from + i * (ptrdiff_t)sizeof x, sizeof x);
        tile[i] = (REAL)x;
    }
}

static void FO_TYPED(decode_f32)(const char *from, ptrdiff_t n, REAL *tile)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        float x;
        memcpy(&x, from + i * (ptrdiff_t)sizeof x, sizeof x);
        tile[i] = (REAL)x;
    }
}

/* Where element `at` of an array lies. */
static inline char *FO_TYPED(address)(const fo_array *array, ptrdiff_t at)
{
    return (char *)array->data + at * fo_format_size(array->format);
}

/* Elements [at, at + n), n <= FO_TILE, as REAL: in place if possible, else in `tile`. NULL stays
 * NULL. */
static inline REAL *FO_TYPED(load)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, REAL *tile)
{
    if (array->data == NULL)
        return NULL;
    char *from = FO_TYPED(address)(array, at);
    if (array->format == FO_NATIVE && (uintptr_t)from % sizeof(REAL) == 0)
        return (REAL *)(void *)from;
    if (array->format == FO_F64)
        FO_TYPED(decode_f64)(from, n, tile);
    else
        FO_TYPED(decode_f32)(from, n, tile);
    return tile;
}

/* Writes back what load returned for the same array and range. Only native formats are written yet,
 * so a tile that is not in place belongs to an unaligned array. */
static inline void FO_TYPED(store)(const fo_array *array, ptrdiff_t at, ptrdiff_t n,
                                   const REAL *tile)
{
    if (array->data == NULL)
        return;
    char *to = FO_TYPED(address)(array, at);
    if ((const void *)to != (const void *)tile)
        memcpy(to, tile, (size_t)n * sizeof(REAL));
}
