/* Sets of formats: the formats of all arrays of a leaf, for loops that are compiled for one set.
 *
 * In such a loop the compiler sees formats as constants, and the codecs become part of the loop.
 * Included once by kernels.c. */
#ifndef FUSEDOPT_SETS_H
#define FUSEDOPT_SETS_H

#include "formats.h"

/* Repeats code for each state. A loop would not do: compilers unroll it too late to see that a
 * format is a constant. */
#define FO_EACH_STATE(F) F(0) F(1) F(2) F(3)
#define FO_ONE(k) +1
_Static_assert(0 FO_EACH_STATE(FO_ONE) == FO_MAX_STATES, "FO_EACH_STATE lists all states");
#undef FO_ONE

/* The formats of a leaf's arrays that a step writes, of which `states` are state arrays. The
 * gradient's is the compute type or FO_BF16: loops ask which for each block. */
typedef struct set {
    fo_format param;
    int states;
    fo_format state[FO_MAX_STATES];
} set;

static inline int is_array_of(const fo_array *array, fo_format format)
{
    return array->data != NULL && array->format == format && array->map == FO_EACH &&
           fo_is_aligned(array);
}

/* Whether a leaf has exactly these arrays, all of them aligned. */
static inline int is_of(const fo_leaf *leaf, const set *formats)
{
    int fits = is_array_of(&leaf->param, formats->param);
    for (int k = 0; k < FO_MAX_STATES; k++)
        fits = fits && (k < formats->states ? is_array_of(&leaf->state[k], formats->state[k])
                                            : leaf->state[k].data == NULL);
    return fits;
}

/* Tells the compiler what is_of has found out: the caller promises that the array has the format.
 */
FO_INLINE void know(fo_array *array, fo_format format, int is_there)
{
    array->format = format;
    array->map = FO_EACH;
    if (is_there &&
        (array->data == NULL || (fo_format_table[format].extra != 0 && array->extra == NULL)))
        __builtin_unreachable();
}

#endif
