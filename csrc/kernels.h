/* What kernels.c offers once per instruction set, and dispatch.c chooses from. Internal.
 *
 * The tables are constant; fo_select_isa alone changes which of them is in use. */
#ifndef FUSEDOPT_KERNELS_H
#define FUSEDOPT_KERNELS_H

#include "formats.h"

/* What all ranges of a call have in common; unused members are NULL. */
typedef struct fo_task {
    int rule;
    const fo_hyper *hypers;
    const fo_run *run;
    int is_far;         /* the list is too large for caches: loops prefetch */
    int is_wide;        /* fo_kernels.is_wide */
    int stream;         /* of stream: how, less than FO_STREAMS */
    unsigned char mask; /* of stream: 0, unknown to compilers */
} fo_task;

/* Works on elements [begin, end) of one leaf; `begin` is a multiple of FO_TILE, `end` too or the
 * leaf's end. Ranges of a call run on several threads at once: one writes nothing outside its own
 * elements and tiles. */
typedef void fo_range(const fo_task *task, const fo_leaf *leaf, ptrdiff_t begin, ptrdiff_t end);

/* The trust ratio of a layer-wise rule for a leaf, from the number of its elements, and the sums of
 * squares of its parameter and of the direction in which the rule would go, or what a rule counts
 * of it: rules/index.h. */
typedef double fo_trust(const double *scalars, double count, double param, double direction);

enum { FO_COMPUTE_F32, FO_COMPUTE_F64, FO_COMPUTES }; /* the types that rules are compiled for */

/* Whether whole tiles are stepped in registers of 512 bits too, beside 256: only GCC can be told so
 * for one function. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FO_HAS_WIDE 1
#else
#define FO_HAS_WIDE 0
#endif

typedef struct fo_kernels {
    const char *isa;
    int is_wide;            /* the loops over whole tiles use the widest registers */
    const fo_rule *rules;   /* the same in every instruction set */
    fo_trust *const *trust; /* by rule; NULL where it has no trust ratio */
    fo_range *step[FO_COMPUTES];
    fo_range *update_rows[FO_COMPUTES]; /* the number of each row; ranges are of rows */
    fo_range *sum_rows[FO_COMPUTES];    /* the gradient of a leaf of rows, to its copy */
    fo_range *measure[FO_COMPUTES];     /* the gradient's sums */
    fo_range *direct[FO_COMPUTES];      /* a layer-wise rule's direction, and sums */
    fo_range *copy[FO_COMPUTES];        /* the parameter's rounded copy, and nothing else */
    fo_range *stream[FO_COMPUTES];      /* the bytes of a step without its arithmetic */
    /* of a factored rule, factors.inc: ranges are of parts of a leaf, and of its matrices */
    fo_range *sum_factors[FO_COMPUTES], *fold_factors[FO_COMPUTES], *keep_factors[FO_COMPUTES];
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

/* The sum of the lanes, in a fixed order; overwrites them. */
static inline double fo_fold(double *lanes)
{
    for (int half = FO_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lanes[j] += lanes[j + half];
    return lanes[0];
}

/* The chosen kernels: never NULL. */
const fo_kernels *fo_active_kernels(void);

static inline int fo_compute_type(const fo_leaf *leaf)
{
    return leaf->param.format == FO_F64 ? FO_COMPUTE_F64 : FO_COMPUTE_F32;
}

#endif
