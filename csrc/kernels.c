/* The arithmetic: compute types times rules, in one table. This is the only file that is compiled
 * once per instruction set (FO_ISA names it), and so the only one that may hold wider instructions
 * than the baseline.
 *
 * Everything here is static but that table. Every function's name holds the ISA, so that a
 * disassembly tells the copies apart. */
#include "factors.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FO_CAT3_(a, b, c) a##_##b##_##c
#define FO_CAT3(a, b, c) FO_CAT3_(a, b, c)
#define FO_CAT_(a, b) a##_##b
#define FO_CAT(a, b) FO_CAT_(a, b)
#define FO_STRING_(x) #x
#define FO_STRING(x) FO_STRING_(x)

#define FO_TYPED(name) FO_CAT3(name, FO_TYPE, FO_ISA) /* adam_f32_avx2 */
#define FO_RULE(name) FO_TYPED(name)
#define FO_SIMD _Pragma("omp simd") /* the arrays do not overlap: no check at run time */
#define FO_PRAGMA(text) _Pragma(#text)
#define FO_REDUCE(operation, name) FO_PRAGMA(omp simd reduction(operation : name))
#define FO_INLINE static inline __attribute__((always_inline))
#define FO_APART __attribute__((noinline)) /* compiled once, so that its callers stay small */

/* For functions over blocks on the stack, which are aligned: the widest registers are faster there.
 * Over whole tiles this depends on the CPU, so FO_WHOLE compiles their loops for both. */
#if defined(__AVX512F__) && FO_HAS_WIDE
#define FO_WIDE __attribute__((target("prefer-vector-width=512")))
#define FO_WHOLE(X, rule) X(rule, whole, ) X(rule, wide, FO_WIDE)
#define FO_WHOLE_NAMES(rule) FO_CAT(FO_RULE(rule), whole), FO_CAT(FO_RULE(rule), wide)
#else
#define FO_WIDE
#define FO_WHOLE(X, rule) X(rule, whole, )
#define FO_WHOLE_NAMES(rule) FO_CAT(FO_RULE(rule), whole)
#endif

/* A rule's constants by name, rounded once: const REAL keep = (REAL)h[at_keep]; ... The last
 * element of h, h[FO_TRUST], is the trust ratio of a layer-wise rule for this leaf. */
#define FO_INDEX(name) at_##name,
#define FO_CONSTANT(name) const REAL name = (REAL)h[at_##name];
#define FO_PLACES(LIST)                                                                            \
    enum { LIST(FO_INDEX) fo_count };                                                              \
    _Static_assert((int)fo_count <= (int)FO_MAX_SCALARS, "raise FO_MAX_SCALARS");
#define FO_SCALARS(LIST) FO_PLACES(LIST) LIST(FO_CONSTANT)
#define FO_TRUST FO_MAX_SCALARS

/* Prefetch, where a list is larger than caches: tiles are stepped in pieces of FO_PIECE elements,
 * and lines of FO_LINE bytes are asked for FO_AHEAD elements early. The measurement is in
 * docs/decisions.md. */
enum { FO_PIECE = 128, FO_AHEAD = 768, FO_LINE = 64 };

#include "codec.h"
#include "sets.h"

#define REAL float
#define FO_TYPE f32
#define FO_NATIVE FO_F32
#define FO_FOREIGN FO_F64
#define FO_FOREIGN_TYPE double
#define FO_DECODED block
#define FO_DECODE decode
#define FO_ENCODE encode
#if defined(__SSE2__) && !defined(__AVX2__) /* old CPUs: smaller before faster */
#define FO_SETS(X, rule)
#else
#define FO_SETS(X, rule) /* formats with a loop of their own: parameter, two states */             \
    X(rule, bf16_state_blocks, FO_F32, FO_BF16_STOCHASTIC, FO_BF16_STOCHASTIC)                     \
    X(rule, int8_state_blocks, FO_F32, FO_S8, FO_U8)                                               \
    X(rule, int8_state_bf16_param_blocks, FO_BF16_LOW8, FO_S8, FO_U8)                              \
    X(rule, bf16_state_bf16_param_blocks, FO_BF16_STOCHASTIC, FO_BF16_STOCHASTIC,                  \
      FO_BF16_STOCHASTIC)                                                                          \
    X(rule, f32_state_bf16_param_blocks, FO_BF16_LOW16, FO_F32, FO_F32)
#endif
#define FO_ABS fabsf
#define FO_SQRT sqrtf
#define FO_FMA fmaf
#define FO_BITS uint32_t
#define FO_SIGNED int32_t
#define FO_INFINITE 0x7f800000u
#define FO_EPSILON FLT_EPSILON
#include "tile.inc"
#undef REAL
#undef FO_TYPE
#undef FO_NATIVE
#undef FO_FOREIGN
#undef FO_FOREIGN_TYPE
#undef FO_DECODED
#undef FO_DECODE
#undef FO_ENCODE
#undef FO_SETS
#undef FO_ABS
#undef FO_SQRT
#undef FO_FMA
#undef FO_BITS
#undef FO_SIGNED
#undef FO_INFINITE
#undef FO_EPSILON

#define REAL double
#define FO_TYPE f64
#define FO_NATIVE FO_F64
#define FO_FOREIGN FO_F32
#define FO_FOREIGN_TYPE float
#define FO_DECODED wide_block
#define FO_DECODE decode_wide
#define FO_ENCODE encode_wide
#define FO_SETS(X, rule)
#define FO_ABS fabs
#define FO_SQRT sqrt
#define FO_FMA fma
#define FO_BITS uint64_t
#define FO_SIGNED int64_t
#define FO_INFINITE 0x7ff0000000000000u
#define FO_EPSILON DBL_EPSILON
#include "tile.inc"

#define FO_NAME(name) #name,
#define FO_NAMES(rule, LIST, states, required, KIND, SETS)                                         \
    static const char *const FO_CAT3(rule, names, FO_ISA)[] = {LIST(FO_NAME) NULL};
FO_RULES(FO_NAMES)

#define FO_ROW(rule, LIST, states, required, KIND, SETS)                                           \
    {#rule, FO_CAT3(rule, names, FO_ISA), states, required, FO_##KIND},
static const fo_rule FO_CAT(rules, FO_ISA)[] = {FO_RULES(FO_ROW){.name = NULL}};

#define ELEMENTWISE_TRUST(rule) NULL
#define INTERNAL_TRUST(rule) NULL
#define ROWWISE_TRUST(rule) NULL
#define SUMMING_TRUST(rule) NULL
#define MATRIX_TRUST(rule) NULL
#define LAYERWISE_TRUST(rule) FO_CAT3(rule##_trust, f64, FO_ISA)
#define COUNTING_TRUST(rule) LAYERWISE_TRUST(rule)
#define FACTORED_TRUST(rule) LAYERWISE_TRUST(rule)
#define FO_OWN_TRUST(rule, LIST, states, required, KIND, SETS) KIND##_TRUST(rule),
static fo_trust *const FO_CAT(trust, FO_ISA)[] = {FO_RULES(FO_OWN_TRUST)};

#define FO_KERNELS(name, wide)                                                                     \
    {                                                                                              \
        .isa = name,                                                                               \
        .is_wide = wide,                                                                           \
        .rules = FO_CAT(rules, FO_ISA),                                                            \
        .trust = FO_CAT(trust, FO_ISA),                                                            \
        .step = {FO_CAT3(step, f32, FO_ISA), FO_CAT3(step, f64, FO_ISA)},                          \
        .update_rows = {FO_CAT3(update_rows, f32, FO_ISA), FO_CAT3(update_rows, f64, FO_ISA)},     \
        .sum_rows = {FO_CAT3(sum_rows, f32, FO_ISA), FO_CAT3(sum_rows, f64, FO_ISA)},              \
        .measure = {FO_CAT3(measure, f32, FO_ISA), FO_CAT3(measure, f64, FO_ISA)},                 \
        .direct = {FO_CAT3(direct, f32, FO_ISA), FO_CAT3(direct, f64, FO_ISA)},                    \
        .copy = {FO_CAT3(copy, f32, FO_ISA), FO_CAT3(copy, f64, FO_ISA)},                          \
        .stream = {FO_CAT3(stream, f32, FO_ISA), FO_CAT3(stream, f64, FO_ISA)},                    \
        .sum_factors = {FO_CAT3(sum_factors, f32, FO_ISA), FO_CAT3(sum_factors, f64, FO_ISA)},     \
        .fold_factors = {FO_CAT3(fold_factors, f32, FO_ISA), FO_CAT3(fold_factors, f64, FO_ISA)},  \
        .keep_factors = {FO_CAT3(keep_factors, f32, FO_ISA), FO_CAT3(keep_factors, f64, FO_ISA)},  \
    }

extern const fo_kernels FO_CAT(fo_kernels, FO_ISA);
const fo_kernels FO_CAT(fo_kernels, FO_ISA) = FO_KERNELS(FO_STRING(FO_ISA), 0);
#if defined(__AVX512F__) && FO_HAS_WIDE
extern const fo_kernels FO_CAT3(fo_kernels, FO_ISA, wide);
const fo_kernels FO_CAT3(fo_kernels, FO_ISA, wide) = FO_KERNELS(FO_STRING(FO_ISA) "_wide", 1);
#endif
