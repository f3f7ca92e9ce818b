/* Refuses a compiler that may change bits; every C file of the library includes this. A compiler
 * that tells no more than this by macros is asked for its flags in CMakeLists.txt. */
#ifndef FUSEDOPT_FLAGS_H
#define FUSEDOPT_FLAGS_H

#include <float.h>

/* GCC says in __GCC_IEC_559 whether any flag that it was given departs from IEEE 754. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) ||       \
    (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0)
#error "fusedopt: -ffast-math, or a part of it, would change the bits of a step (in CFLAGS?)"
#endif
#if FLT_EVAL_METHOD != 0
#error "fusedopt: float must be computed in float; of x87 arithmetic the bits differ (-mfpmath=sse)"
#endif

#endif
