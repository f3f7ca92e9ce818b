/* How an array's elements become a tile of REAL, and go back.
 *
 * Included by tile.h once per compute type. A native, aligned array is its own tile: load returns
 * its address and store has nothing to do. Anything else is decoded, a block at a time, into the
 * room that the caller brings; the narrow formats' own arithmetic is in codec.h. A new format is a
 * row in formats.c and a case in decode and encode there. */

/* Whether load takes any number of elements of this array, not just a block. */
static inline int FO_TYPED(is_whole)(const fo_array *array)
{
    return array->data == NULL ||
           (array->format == FO_NATIVE && (uintptr_t)array->data % sizeof(REAL) == 0);
}

/* Elements [at, at + n), n <= FO_BLOCK, as REAL: in place if they are a whole native block, else in
 * `room`, with zeros behind them. NULL stays NULL. */
FO_INLINE REAL *FO_TYPED(load)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, FO_ROOM *room)
{
    if (array->data == NULL)
        return NULL;
    char *from = (char *)array->data + fo_data_bytes(array, at);
    if (array->format == FO_NATIVE) {
        if (n == FO_BLOCK && (uintptr_t)from % sizeof(REAL) == 0)
            return (REAL *)(void *)from;
        memset(room->f, 0, sizeof room->f);
        memcpy(room->f, from, (size_t)n * sizeof(REAL));
    } else if (array->format == FO_FOREIGN) {
        FO_FOREIGN_TYPE foreign[FO_BLOCK] = {0};
        memcpy(foreign, from, (size_t)n * sizeof *foreign);
        for (int i = 0; i < FO_BLOCK; i++)
            room->f[i] = (REAL)foreign[i];
    } else {
        FO_DECODE(array, at, n, room);
    }
    return room->f;
}

/* Writes back what load returned for the same array and range. The other native format is only
 * read. */
FO_INLINE void FO_TYPED(store)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, const REAL *tile,
                               uint32_t key)
{
    if (array->data == NULL)
        return;
    if (array->format == FO_NATIVE) {
        char *to = (char *)array->data + fo_data_bytes(array, at);
        if ((const void *)to != (const void *)tile)
            memcpy(to, tile, (size_t)n * sizeof(REAL));
    } else {
        FO_ENCODE(array, at, n, (const FO_ROOM *)(const void *)tile, key); /* it is the room */
    }
}
