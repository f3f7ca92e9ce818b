/* The table of storage formats, and where the elements of an array lie by it. Internal. */
#ifndef FUSEDOPT_FORMATS_H
#define FUSEDOPT_FORMATS_H

#include "flags.h"
#include "fusedopt.h"

enum { BLOCK_SHIFT = 6 };
_Static_assert(1 << BLOCK_SHIFT == FO_BLOCK, "one exponent for each block");

/* The rows of fo_formats. In a header, so that loops that know a format know its sizes. */
static const fo_format_info fo_format_table[FO_FORMATS] = {
    [FO_F32] = {"float32", 4, 0, 0, 0},
    [FO_F64] = {"float64", 8, 0, 0, 0},
    [FO_BF16] = {"bfloat16", 2, 0, 0, 0},
    [FO_F16] = {"float16", 2, 0, 0, 0},
    [FO_BF16_STOCHASTIC] = {"bfloat16-stochastic", 2, 0, 0, 1},
    [FO_F16_STOCHASTIC] = {"float16-stochastic", 2, 0, 0, 1},
    [FO_BF16_LOW16] = {"bfloat16+int16", 2, 2, 0, 0},
    [FO_BF16_LOW8] = {"bfloat16+int8", 2, 1, 0, 1},
    [FO_S8] = {"int8", 1, 1, BLOCK_SHIFT, 1},
    [FO_U8] = {"uint8", 1, 1, BLOCK_SHIFT, 1},
};

/* Constants of the codecs, defined in another file: a compiler that sees their values builds them
 * in registers in each turn of a loop, which takes more operations than a load. */
typedef struct fo_codec_constants {
    uint32_t base[256];                /* by an 8-bit block's byte: its base, as two words of
                                          floats' upper halves */
    uint32_t hash[2];                  /* multipliers of the noise */
    uint32_t slots[1 + FO_MAX_STATES]; /* factors of the noise, of the parameter and the states */
    uint32_t size, random20, random8;  /* masks of |x| and of random numbers */
    uint32_t half, low_half;           /* of a dword */
    uint32_t words_signed_code, words_code, bytes_sign, words_one;
} fo_codec_constants;
extern const fo_codec_constants fo_codec;

/* Bytes of elements [0, n) in data and in extra; n is a multiple of FO_BLOCK or the array's end. */
static inline ptrdiff_t fo_data_bytes(const fo_array *array, ptrdiff_t n)
{
    return n * fo_format_table[array->format].size;
}

static inline ptrdiff_t fo_extra_bytes(const fo_array *array, ptrdiff_t n)
{
    const fo_format_info *about = &fo_format_table[array->format];
    return ((n + ((ptrdiff_t)1 << about->shift) - 1) >> about->shift) * about->extra;
}

/* The addresses of element n, a multiple of FO_BLOCK, in data and in extra (NULL if there is none).
 */
static inline void *fo_data_at(const fo_array *array, ptrdiff_t n)
{
    return (char *)array->data + fo_data_bytes(array, n);
}

static inline void *fo_extra_at(const fo_array *array, ptrdiff_t n)
{
    return array->extra != NULL ? (char *)array->extra + fo_extra_bytes(array, n) : NULL;
}

/* Whether an array's elements are aligned to their size, a power of 2, as compilers expect. */
static inline int fo_is_aligned(const fo_array *array)
{
    const fo_format_info *about = &fo_format_table[array->format];
    uintptr_t off = (uintptr_t)array->data & (uintptr_t)(about->size - 1);
    if (about->extra != 0)
        off |= (uintptr_t)array->extra & (uintptr_t)(about->extra - 1);
    return off == 0;
}

#endif
