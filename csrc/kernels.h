/* What kernels.c offers once per instruction set, and dispatch.c chooses from. Internal. */
#ifndef FUSEDOPT_KERNELS_H
#define FUSEDOPT_KERNELS_H

#include "fusedopt.h"

/* Work on elements [begin, end) of one leaf; begin is a tile border. hyper and rule are used by
 * steps. */
typedef void fo_range(const fo_leaf *leaf, const fo_hyper *hyper, int rule, ptrdiff_t begin,
                      ptrdiff_t end);

enum { FO_COMPUTE_F32, FO_COMPUTE_F64, FO_COMPUTES }; /* the types that rules are compiled for */

typedef struct fo_kernels {
    const char *isa;
    const fo_rule *rules; /* the same in every instruction set */
    fo_range *step[FO_COMPUTES], *stream;
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
