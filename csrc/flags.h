/* Refuses compiler flags that may change bits; every C file of the library includes this. Flags
 * that no macro shows are refused in CMakeLists.txt. */
#ifndef FUSEDOPT_FLAGS_H
#define FUSEDOPT_FLAGS_H

#include <float.h>

/* GCC sets __GCC_IEC_559 to 0 if one of its flags departs from IEEE 754. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) ||       \
    (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0)
#error "fusedopt: -ffast-math, or a part of it, would change the bits of a step (in CFLAGS?)"
#endif
#if FLT_EVAL_METHOD != 0
#error                                                                                             \
    "fusedopt: float must be computed in float; x87 arithmetic gives other bits (use -mfpmath=sse)"
#endif

#endif
