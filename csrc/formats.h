/* How an array's elements become a tile of REAL, and go back.
 *
 * Included by tile.h once per compute type. A native, aligned array is its own tile: load returns
 * its address and store has nothing to do. Anything else is decoded, a block at a time, into the
 * room that the caller brings; the narrow formats' own arithmetic is in codec.h. A new format is a
 * row in kernels.h and a case in decode and encode there.
 *
 * Where the compiler knows a format (is_known), the codec becomes part of the caller's loop; the
 * block must then be whole and aligned. Else it is a call: of one function for all formats, which
 * also pads. */

/* Whether load takes any number of elements of this array, not just a block. */
static inline int FO_TYPED(is_whole)(const fo_array *array)
{
    return array->data == NULL ||
           (array->format == FO_NATIVE && (uintptr_t)array->data % sizeof(REAL) == 0);
}

/* Aligned copies of the n elements from `at`, with zeros behind them: of what is no whole block. */
typedef struct FO_TYPED(padded) {
    _Alignas(8) char data[8 * FO_BLOCK], extra[2 * FO_BLOCK];
} FO_TYPED(padded);

static FO_APART FO_WIDE REAL *FO_TYPED(load_any)(const fo_array *array, ptrdiff_t at, ptrdiff_t n,
                                                 FO_ROOM *room)
{
    FO_TYPED(padded) copy;
    const void *data = fo_data_at(array, at), *extra = fo_extra_at(array, at);
    if (n < FO_BLOCK || !fo_is_aligned(array)) {
        memset(&copy, 0, sizeof copy);
        data = memcpy(copy.data, data, (size_t)fo_data_bytes(array, n));
        if (extra != NULL)
            extra = memcpy(copy.extra, extra, (size_t)fo_extra_bytes(array, n));
    }
    if (array->format == FO_NATIVE)
        memcpy(room->f, data, sizeof room->f);
    else if (array->format == FO_FOREIGN)
        for (int i = 0; i < FO_BLOCK; i++)
            room->f[i] = (REAL)((const FO_FOREIGN_TYPE *)data)[i];
    else
        FO_DECODE(array->format, data, extra, room);
    return room->f;
}

static FO_APART FO_WIDE void FO_TYPED(store_any)(const fo_array *array, ptrdiff_t at, ptrdiff_t n,
                                                 const FO_ROOM *room, uint32_t key)
{
    FO_TYPED(padded) copy;
    void *data = fo_data_at(array, at), *extra = fo_extra_at(array, at);
    const int is_padded = n < FO_BLOCK || !fo_is_aligned(array);
    if (array->format == FO_NATIVE) {
        memcpy(data, room->f, (size_t)n * sizeof(REAL));
        return;
    }
    FO_ENCODE(array->format, room, key, weyl_of(at), is_padded ? copy.data : data,
              is_padded ? copy.extra : extra);
    if (is_padded) {
        memcpy(data, copy.data, (size_t)fo_data_bytes(array, n));
        if (extra != NULL)
            memcpy(extra, copy.extra, (size_t)fo_extra_bytes(array, n));
    }
}

/* Elements [at, at + n), n <= FO_BLOCK, as REAL: in place if they are a whole native block, else in
 * `room`, with zeros behind them. NULL stays NULL. */
FO_INLINE REAL *FO_TYPED(load)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, int is_known,
                               FO_ROOM *room)
{
    if (array->data == NULL)
        return NULL;
    if (array->format == FO_NATIVE && (is_known || (n == FO_BLOCK && fo_is_aligned(array))))
        return (REAL *)array->data + at;
    if (!is_known)
        return FO_TYPED(load_any)(array, at, n, room);
    FO_DECODE(array->format, fo_data_at(array, at), fo_extra_at(array, at), room);
    return room->f;
}

/* Writes back what load returned for the same array and range. The other native format is only
 * read. */
FO_INLINE void FO_TYPED(store)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, int is_known,
                               const REAL *tile, uint32_t key)
{
    const FO_ROOM *room = (const FO_ROOM *)(const void *)tile; /* where it is not in place */
    if (array->data == NULL || (is_known && array->format == FO_NATIVE))
        return;
    if (is_known)
        FO_ENCODE(array->format, room, key, weyl_of(at), fo_data_at(array, at),
                  fo_extra_at(array, at));
    else if (array->format != FO_NATIVE || tile != (const REAL *)array->data + at)
        FO_TYPED(store_any)(array, at, n, room, key);
}
