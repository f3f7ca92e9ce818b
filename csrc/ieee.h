/* The floating-point mode of a thread: rounding, subnormal numbers, traps.
 *
 * Other libraries change it (torch.set_flush_denormal, anything that was built with -ffast-math),
 * and each thread has a mode of its own. Code that computes promised bits enters IEEE 754's default
 * mode first and restores the old mode afterwards. If the mode is the default already, this costs
 * one read. */
#ifndef FUSEDOPT_IEEE_H
#define FUSEDOPT_IEEE_H

#if defined(__x86_64__)
#include <xmmintrin.h>

/* MXCSR: the lowest 6 bits are flags of past exceptions, the others are the mode */
typedef unsigned fo_mode;
enum { FO_IEEE_MODE = 0x1f80, FO_MODE_FLAGS = 0x3f };

static inline fo_mode fo_enter_ieee(void)
{
    const fo_mode before = _mm_getcsr();
    if ((before & ~(fo_mode)FO_MODE_FLAGS) != FO_IEEE_MODE)
        _mm_setcsr(FO_IEEE_MODE);
    return before;
}

static inline void fo_leave_ieee(fo_mode before)
{
    if ((before & ~(fo_mode)FO_MODE_FLAGS) != FO_IEEE_MODE)
        _mm_setcsr(before);
}

#elif defined(__aarch64__)
typedef unsigned long long fo_mode; /* FPCR, 0 by default */

static inline fo_mode fo_enter_ieee(void)
{
    fo_mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before) : : "memory");
    if (before != 0)
        __asm__ volatile("msr fpcr, %0" : : "r"(0ULL) : "memory");
    return before;
}

static inline void fo_leave_ieee(fo_mode before)
{
    if (before != 0)
        __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
}

#else
#include <fenv.h>

typedef fenv_t fo_mode;

static inline fo_mode fo_enter_ieee(void)
{
    fo_mode before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}

static inline void fo_leave_ieee(fo_mode before) { fesetenv(&before); }
#endif

#endif
