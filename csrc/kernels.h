/* What kernels.c offers once per instruction set, and dispatch.c chooses from. Internal. */
#ifndef FUSEDOPT_KERNELS_H
#define FUSEDOPT_KERNELS_H

#include "flags.h"
#include "fusedopt.h"

/* What all ranges of a call have in common; a member is NULL where the work needs it not. */
typedef struct fo_task {
    int rule;
    const fo_hyper *hypers;
    const fo_run *run;
} fo_task;

/* Work on elements [begin, end) of one leaf; begin is a tile border. */
typedef void fo_range(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end);

/* The rate of a layer-wise rule for a leaf, from the norms of its parameter and of the direction in
 * which the rule would go. */
typedef double fo_trust(const double *scalars, double param, double direction);

enum { FO_COMPUTE_F32, FO_COMPUTE_F64, FO_COMPUTES }; /* the types that rules are compiled for */

typedef struct fo_kernels {
    const char *isa;
    const fo_rule *rules;   /* the same in every instruction set */
    fo_trust *const *trust; /* by rule; NULL where it is not layer-wise */
    fo_range *step[FO_COMPUTES];
    fo_range *measure[FO_COMPUTES]; /* the gradient's sums */
    fo_range *direct[FO_COMPUTES];  /* of a layer-wise rule: sums of parameter and direction */
    fo_range *copy[FO_COMPUTES];    /* the parameter's rounded copy, and nothing else */
    fo_range *stream;
} fo_kernels;

/* 64 bits in, 64 well-mixed bits out: the finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA
 * 2014), with the increment. */
static inline uint64_t fo_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* The sum of the lanes, in a fixed order; uses them up. */
static inline double fo_fold(double *lanes)
{
    for (int half = FO_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lanes[j] += lanes[j + half];
    return lanes[0];
}

enum { BLOCK_SHIFT = 6 };
_Static_assert(1 << BLOCK_SHIFT == FO_BLOCK, "one exponent for each block");

/* fo_formats: here, so that loops that know a format know its sizes. */
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

/* Where element n, a multiple of FO_BLOCK, is in data, and what belongs to it in extra, or NULL. */
static inline void *fo_data_at(const fo_array *array, ptrdiff_t n)
{
    return (char *)array->data + fo_data_bytes(array, n);
}

static inline void *fo_extra_at(const fo_array *array, ptrdiff_t n)
{
    return array->extra != NULL ? (char *)array->extra + fo_extra_bytes(array, n) : NULL;
}

/* Whether an array's elements lie where a compiler expects elements of their size, a power of 2. */
static inline int fo_is_aligned(const fo_array *array)
{
    const fo_format_info *about = &fo_format_table[array->format];
    uintptr_t off = (uintptr_t)array->data & (uintptr_t)(about->size - 1);
    if (about->extra != 0)
        off |= (uintptr_t)array->extra & (uintptr_t)(about->extra - 1);
    return off == 0;
}

/* The chosen kernels: never NULL. */
const fo_kernels *fo_active_kernels(void);

static inline int fo_compute_type(const fo_leaf *leaf)
{
    return leaf->param.format == FO_F64 ? FO_COMPUTE_F64 : FO_COMPUTE_F32;
}

#endif
