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
    fo_range *step[FO_COMPUTES], *stream[FO_COMPUTES];
} fo_kernels;

/* Bytes of an element in a format. */
static inline ptrdiff_t fo_format_size(fo_format format)
{
    return format == FO_F64 ? sizeof(double) : sizeof(float);
}

/* The chosen kernels: never NULL. */
const fo_kernels *fo_active_kernels(void);

static inline int fo_compute_type(const fo_leaf *leaf)
{
    return leaf->param.format == FO_F64 ? FO_COMPUTE_F64 : FO_COMPUTE_F32;
}

#endif
