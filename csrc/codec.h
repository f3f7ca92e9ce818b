/* Narrow formats: a block of FO_BLOCK elements to float and back, in integer arithmetic on the bits
 * of the float, which compilers vectorise on every instruction set and NumPy repeats to the bit
 * (src/fusedopt/formats.py).
 *
 * Included once by kernels.c. Every function works on a whole block: formats.h pads the last one of
 * an array, and arrays that are not aligned.
 *
 * 8-bit block floats. A block shares a base, the float exponent of its smallest binade, even and in
 * a byte of its own whose lowest bit says that some element is not finite. Code 0 is zero; code k
 * is the float with bits (base << 23) + (k << 20), so there are 3 mantissa bits and, above the
 * base, 16 binades in 7 bits (S8, with a sign) or 32 in 8 bits (U8). The base is such that the
 * block's largest element gets a code below the topmost, which stands for NaN. Rounding is
 * stochastic: m and v creep by less than a step and would stall if rounded to nearest. What is too
 * small for the window is zero in S8; in U8 it is code 1, because a second moment of 0 beside a
 * first that is not would make an update of m / eps. */

#include "block.h"

/* ---------------------------------------------------------------- bf16 */

/* Looked for once in a block: a test of every element would cost more than the rounding. */
FO_INLINE int has_nan(const block *from) { return largest_of(from) > INFINITE; }

FO_INLINE void quiet_nans(const block *restrict from, uint16_t *restrict to)
{
    if (has_nan(from))
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_nan(from->u[j]))
                to[j] = QUIET_NAN >> 16;
}

FO_INLINE void decode_bf16(const uint16_t *restrict from, block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = (uint32_t)from[j] << 16;
}

/* What is added makes the upper half right. An infinity has no low bits that could carry. */
FO_INLINE void encode_bf16(const block *restrict from, uint16_t *restrict to)
{
    block sums;
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        sums.u[j] = from->u[j] + 0x7fff + ((from->u[j] >> 16) & 1);
    upper_halves(&sums, to);
    quiet_nans(from, to);
}

FO_INLINE void encode_bf16_stochastic(const block *restrict from, uint32_t key, uint32_t weyl,
                                      uint16_t *restrict to)
{
    block sums;
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, weyl + (uint32_t)j * WEYL);
        sums.u[j] = from->u[j] + (random & 0xffff);
        sums.u[j + HALF] = from->u[j + HALF] + (random >> 16);
    }
    upper_halves(&sums, to);
    quiet_nans(from, to);
}

/* ------------------------------------------------- bf16 with residual bits */

FO_INLINE void decode_low16(const uint16_t *restrict from, const int16_t *restrict low,
                            block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + (uint32_t)low[j];
}

/* The residual is the difference from a number whose low bits are zero: the low bits. */
FO_INLINE void encode_low16(const block *restrict from, uint16_t *restrict to,
                            int16_t *restrict low)
{
    block sums;
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        sums.u[j] = from->u[j] + 0x8000;
        low[j] = (int16_t)from->u[j];
    }
    upper_halves(&sums, to);
    if (has_nan(from))
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_nan(from->u[j]))
                to[j] = QUIET_NAN >> 16, low[j] = 0;
}

FO_INLINE void decode_low8(const uint16_t *restrict from, const int8_t *restrict low,
                           block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + ((uint32_t)low[j] << 8);
}

/* Rounded by chance to 24 bits, and from there as above. */
FO_INLINE void encode_low8(const block *restrict from, uint32_t key, uint32_t weyl,
                           uint16_t *restrict to, uint8_t *restrict low)
{
    block longer, sums;
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, weyl + (uint32_t)j * WEYL);
        uint32_t x = from->u[j] + ((random >> 8) & 0xff);
        uint32_t y = from->u[j + HALF] + (random >> 24);
        longer.u[j] = (x >> 8) & 0xff;
        longer.u[j + HALF] = (y >> 8) & 0xff;
        sums.u[j] = (x & 0xffffff00u) + 0x8000;
        sums.u[j + HALF] = (y & 0xffffff00u) + 0x8000;
    }
    upper_halves(&sums, to);
    narrow(&longer, low);
    if (has_nan(from))
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_nan(from->u[j]))
                to[j] = QUIET_NAN >> 16, low[j] = 0;
}

/* ---------------------------------------------------------------- f16 */

#define F16_LEAST 0x38800000u               /* 2^-14, the least normal f16, as float */
#define REBIAS ((uint32_t)(127 - 15) << 10) /* between the exponents of f16 and float */

FO_INLINE void decode_f16(const uint16_t *restrict from, block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t half = from[j], size = half & 0x7fff;
        number subnormal = {.f = (float)(int32_t)size * 0x1p-24f};
        uint32_t normal = (size + REBIAS) << 13;
        uint32_t special = ((size & 0x3ff) << 13) | INFINITE;
        uint32_t bits = size < 0x400 ? subnormal.u : size < 0x7c00 ? normal : special;
        to->u[j] = bits | ((half & 0x8000) << 16);
    }
}

/* The code of a float: a normal one adds `add` and is cut, a subnormal one is `subnormal`. */
FO_INLINE uint32_t f16_of(uint32_t bits, uint32_t add, uint32_t subnormal)
{
    uint32_t size = absolute(bits);
    uint32_t normal = ((size + add) >> 13) - REBIAS;
    uint32_t finite = size < F16_LEAST ? subnormal : normal < 0x7c00 ? normal : 0x7c00;
    uint32_t code = size > INFINITE ? 0x7e00 : size >= INFINITE ? 0x7c00 : finite;
    return code | ((bits >> 16) & 0x8000);
}

/* |x| where its code is subnormal, else 0. */
FO_INLINE uint32_t f16_small(uint32_t bits)
{
    return absolute(bits) < F16_LEAST ? absolute(bits) : 0;
}

FO_INLINE void encode_f16(const block *restrict from, uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t bits = from->u[j];
        number size = {.u = f16_small(bits)}; /* + 0.5: the code in its last bits, to even */
        size.f += 0.5f;
        to[j] = (uint16_t)f16_of(bits, 0xfff + ((bits >> 13) & 1), size.u - 0x3f000000u);
    }
}

/* A subnormal code by chance: |x| in units of 2^-24 plus a number in [0, 1), cut. */
FO_INLINE uint32_t f16_subnormal(uint32_t bits, uint32_t random)
{
    number size = {.u = f16_small(bits)};
    return (uint32_t)(int32_t)(size.f * 0x1p24f + (float)(int32_t)random * 0x1p-16f);
}

FO_INLINE void encode_f16_stochastic(const block *restrict from, uint32_t key, uint32_t weyl,
                                     uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, weyl + (uint32_t)j * WEYL);
        uint32_t r = random & 0xffff, s = random >> 16;
        uint32_t x = from->u[j], y = from->u[j + HALF];
        to[j] = (uint16_t)f16_of(x, r >> 3, f16_subnormal(x, r));
        to[j + HALF] = (uint16_t)f16_of(y, s >> 3, f16_subnormal(y, s));
    }
}

/* --------------------------------------------------------- 8-bit block floats */

#define STEP 0x100000u /* one code, in bits of the float: 20 of them are dropped */

/* is_signed is a constant where this is inlined: S8 or U8. */
FO_INLINE void decode_8bit(const uint8_t *restrict from, uint32_t about, int is_signed,
                           block *restrict to)
{
    const uint32_t base = (about & 0xfe) << 23, codes = is_signed ? 0x7f : 0xff;
    block wide;
    widen(from, &wide);
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t size = (wide.u[j] & codes) << 20;
        uint32_t bits = size + (size != 0 ? base : 0);
        to->u[j] = is_signed ? bits | (wide.u[j] & 0x80000000u) : bits;
    }
    if (about & 1)
        for (int j = 0; j < FO_BLOCK; j++)
            if ((from[j] & codes) == codes)
                to->u[j] = QUIET_NAN;
}

/* random is in bits 4 to 19; start is the base less a half of the lowest of them. */
FO_INLINE uint32_t code_8bit(uint32_t bits, uint32_t random, uint32_t start, int is_signed)
{
    const int32_t least = is_signed ? 0 : STEP, size = (int32_t)(absolute(bits) + random - start);
    const uint32_t sum = (uint32_t)(size < least ? least : size), code = sum >> 20;
    if (is_signed)
        return ((sum << 4) | (bits & 0x80000000u)) >> 24;
    return code < absolute(bits) ? code : absolute(bits); /* 0 for 0; what is less has code 1 */
}

/* Returns the byte about the block. */
FO_INLINE uint8_t encode_8bit(const block *restrict from, uint32_t key, uint32_t weyl,
                              int is_signed, uint8_t *restrict to)
{
    const int binades = is_signed ? 15 : 31;
    block codes;
    uint32_t largest = largest_of(from), is_odd = 0;
    if (largest >= INFINITE) { /* then of the finite ones */
        is_odd = 1;
        largest = 0;
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_finite(from->u[j]) && absolute(from->u[j]) > largest)
                largest = absolute(from->u[j]);
    }
    int32_t base = (int32_t)((largest + 2 * STEP) >> 23) - binades;
    base = base > 0 ? (base + 1) & ~1 : 0;

    const uint32_t start = ((uint32_t)base << 23) - 8;
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, weyl + (uint32_t)j * WEYL);
        codes.u[j] = code_8bit(from->u[j], (random << 4) & 0xffff0, start, is_signed);
        codes.u[j + HALF] =
            code_8bit(from->u[j + HALF], (random >> 12) & 0xffff0, start, is_signed);
    }
    narrow(&codes, to);
    if (is_odd)
        for (int j = 0; j < FO_BLOCK; j++)
            if (!is_finite(from->u[j]))
                to[j] = is_signed ? 0x7f : 0xff;
    return (uint8_t)((uint32_t)base | is_odd);
}

/* ---------------------------------------------------------------- any of them */

/* One block out of an array's data and extra. The format is a constant in loops that know it. */
FO_INLINE void decode(fo_format format, const void *data, const void *extra, block *to)
{
    switch (format) {
    case FO_BF16_LOW16:
        decode_low16(data, extra, to);
        break;
    case FO_BF16_LOW8:
        decode_low8(data, extra, to);
        break;
    case FO_S8:
        decode_8bit(data, *(const uint8_t *)extra, 1, to);
        break;
    case FO_U8:
        decode_8bit(data, *(const uint8_t *)extra, 0, to);
        break;
    case FO_F16:
    case FO_F16_STOCHASTIC:
        decode_f16(data, to);
        break;
    default:
        decode_bf16(data, to);
    }
}

/* And back; key is of the array in this step, weyl of the block. */
FO_INLINE void encode(fo_format format, const block *from, uint32_t key, uint32_t weyl, void *data,
                      void *extra)
{
    switch (format) {
    case FO_BF16_LOW16:
        encode_low16(from, data, extra);
        break;
    case FO_BF16_LOW8:
        encode_low8(from, key, weyl, data, extra);
        break;
    case FO_S8:
        *(uint8_t *)extra = encode_8bit(from, key, weyl, 1, data);
        break;
    case FO_U8:
        *(uint8_t *)extra = encode_8bit(from, key, weyl, 0, data);
        break;
    case FO_F16:
        encode_f16(from, data);
        break;
    case FO_F16_STOCHASTIC:
        encode_f16_stochastic(from, key, weyl, data);
        break;
    case FO_BF16:
        encode_bf16(from, data);
        break;
    default:
        encode_bf16_stochastic(from, key, weyl, data);
    }
}

/* The same for leaves in double, where narrow formats are rare. */
typedef struct wide_block {
    _Alignas(64) double f[FO_BLOCK];
} wide_block;

FO_INLINE void decode_wide(fo_format format, const void *data, const void *extra, wide_block *to)
{
    block narrow;
    decode(format, data, extra, &narrow);
    for (int j = 0; j < FO_BLOCK; j++)
        to->f[j] = (double)narrow.f[j];
}

/* To odd (Boldo & Melquiond, IEEE Trans. Computers 57(4), 2008): cut, and the last bit set if
 * anything was lost, so that formats of 22 bits or less are rounded once, by their own encoding. */
FO_INLINE float to_odd(double x)
{
    number near = {.f = (float)x};
    const double size = __builtin_fabs(x), near_size = __builtin_fabs((double)near.f);
    near.u -= near_size > size; /* of infinity this makes the largest float, which is odd */
    near.u |= near_size != size;
    return near.f;
}

FO_INLINE void encode_wide(fo_format format, const wide_block *from, uint32_t key, uint32_t weyl,
                           void *data, void *extra)
{
    block narrow;
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        narrow.f[j] = format == FO_BF16_LOW16 ? (float)from->f[j] : to_odd(from->f[j]);
    encode(format, &narrow, key, weyl, data, extra);
}

/* ---------------------------------------------------------------- all of a leaf's */

/* Code for each state, written out: compilers unroll loops too late to see that a format is a
 * constant. */
#define FO_EACH_STATE(F) F(0) F(1) F(2) F(3)
#define FO_ONE(k) +1
_Static_assert(0 FO_EACH_STATE(FO_ONE) == FO_MAX_STATES, "FO_EACH_STATE lists all states");
#undef FO_ONE

/* The formats of a leaf's arrays, of which `states` are state arrays. */
typedef struct set {
    fo_format param, grad;
    int states;
    fo_format state[FO_MAX_STATES];
} set;

static inline int is_array_of(const fo_array *array, fo_format format)
{
    return array->data != NULL && array->format == format && fo_is_aligned(array);
}

/* Whether a leaf has exactly these arrays, all of them aligned. */
static inline int is_of(const fo_leaf *leaf, const set *formats)
{
    int fits = is_array_of(&leaf->param, formats->param) && is_array_of(&leaf->grad, formats->grad);
    for (int k = 0; k < FO_MAX_STATES; k++)
        fits = fits && (k < formats->states ? is_array_of(&leaf->state[k], formats->state[k])
                                            : leaf->state[k].data == NULL);
    return fits;
}

/* Tells the compiler what is_of has found out. */
FO_INLINE void know(fo_array *array, fo_format format)
{
    array->format = format;
    if (array->data == NULL || (fo_format_table[format].extra != 0 && array->extra == NULL))
        __builtin_unreachable();
}
