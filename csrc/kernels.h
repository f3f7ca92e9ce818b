/* What kernels.c offers once per instruction set, and dispatch.c chooses from. Internal. */
#ifndef FUSEDOPT_KERNELS_H
#define FUSEDOPT_KERNELS_H

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

extern const fo_format_info fo_format_table[FO_FORMATS]; /* fo_formats, without a call */

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

/* The chosen kernels: never NULL. */
const fo_kernels *fo_active_kernels(void);

static inline int fo_compute_type(const fo_leaf *leaf)
{
    return leaf->param.format == FO_F64 ? FO_COMPUTE_F64 : FO_COMPUTE_F32;
}

#endif
