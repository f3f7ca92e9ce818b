/* Finds, once, which of the compiled kernels this CPU and this system can run.
 *
 * A CPU may have registers that the system does not save on a context switch; XGETBV shows which it
 * saves. This file must run on any CPU, so it must not be compiled with the flags of the features
 * that it looks for. */
#include "kernels.h"

#include <string.h>

#if defined(__AVX__) && !defined(FUSEDOPT_ANY_DISPATCH)
#error "fusedopt: only kernels.c may be compiled for AVX (is -mavx or the like in CFLAGS?)"
#endif

#if defined(__x86_64__)
#include <cpuid.h>

extern const fo_kernels fo_kernels_sse2, fo_kernels_avx2, fo_kernels_avx512;
#if FO_HAS_WIDE
extern const fo_kernels fo_kernels_avx512_wide;
#endif

static uint64_t saved_registers(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

enum { YMM = 0x6, ZMM = 0xe6 }; /* XCR0: xmm, ymm; and masks, both halves of zmm */

static void detect(int *avx2, int *avx512)
{
    const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return;
    const int fma = (c & bit_FMA) != 0;
    uint64_t saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return;
    *avx2 = (b & bit_AVX2) && fma && (saved & YMM) == YMM;
    *avx512 = *avx2 && (b & wide) == wide && (saved & ZMM) == ZMM;
}

#if FO_HAS_WIDE
/* Whether whole tiles are stepped faster in registers of 512 bits: on CPUs that were measured,
 * which are those of AMD's family 1Ah (Zen 5) whose units have 512 bits. Their leaf 8000001Ah says
 * so, but virtual machines clear that bit, so the models for laptops, whose units have 256, are
 * listed. */
static int is_wide_better(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx ||
        d != signature_AMD_edx)
        return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff), model = a >> 12 & 0xf0;
    return family == 0x1a && model != 0x20 && model != 0x30 && model != 0x60;
}
#endif

static int list_kernels(const fo_kernels **list)
{
    int n = 0, avx2 = 0, avx512 = 0;
    detect(&avx2, &avx512);
    if (avx512) {
#if FO_HAS_WIDE
        const int is_wide_first = is_wide_better();
        list[n + !is_wide_first] = &fo_kernels_avx512_wide;
        list[n + is_wide_first] = &fo_kernels_avx512;
        n += 2;
#else
        list[n++] = &fo_kernels_avx512;
#endif
    }
    if (avx2)
        list[n++] = &fo_kernels_avx2;
    list[n++] = &fo_kernels_sse2;
    return n;
}
#elif defined(__aarch64__)
extern const fo_kernels fo_kernels_neon;

static int list_kernels(const fo_kernels **list)
{
    list[0] = &fo_kernels_neon;
    return 1;
}
#else
extern const fo_kernels fo_kernels_generic;

static int list_kernels(const fo_kernels **list)
{
    list[0] = &fo_kernels_generic;
    return 1;
}
#endif

enum { MOST = 4 };
static const fo_kernels *usable[MOST];
static const char *names[MOST + 1];
static const fo_kernels *active;

/* Runs when the library is loaded, so that no call has to check whether it was done. */
__attribute__((constructor)) static void detect_once(void)
{
    int n = list_kernels(usable);
    for (int i = 0; i < n; i++)
        names[i] = usable[i]->isa;
    active = usable[0];
}

const char *const *fo_isas(void) { return names; }
const char *fo_isa(void) { return active->isa; }
const fo_kernels *fo_active_kernels(void) { return active; }
const fo_rule *fo_rules(void) { return active->rules; }

fo_status fo_select_isa(const char *name)
{
    for (int i = 0; names[i] != NULL; i++)
        if (strcmp(names[i], name) == 0) {
            active = usable[i];
            return FO_OK;
        }
    return FO_BAD_ARGUMENT;
}
