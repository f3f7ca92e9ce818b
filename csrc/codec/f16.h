/* float16 (IEEE 754 binary16) for a block of FO_BLOCK elements, to nearest or stochastically.
 *
 * Arrays hold whole blocks, are aligned for their elements, and do not overlap. NaN becomes the
 * quiet NaN 0x7e00 with its sign, what is too large infinity. Included by codec.h. */
#ifndef FUSEDOPT_CODEC_F16_H
#define FUSEDOPT_CODEC_F16_H

#include "block.h"

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

/* The code of a float. Where the code is a normal number, `add` is added to the bits and the sum is
 * cut; where it is subnormal, it is `subnormal`. */
FO_INLINE uint32_t f16_of(uint32_t bits, uint32_t add, uint32_t subnormal)
{
    uint32_t size = absolute(bits);
    uint32_t normal = ((size + add) >> 13) - REBIAS;
    uint32_t finite = size < F16_LEAST ? subnormal : normal < 0x7c00 ? normal : 0x7c00;
    uint32_t code = size > INFINITE ? 0x7e00 : size >= INFINITE ? 0x7c00 : finite;
    return code | ((bits >> 16) & 0x8000);
}

/* The bits of |x| where its code is subnormal, else 0. */
FO_INLINE uint32_t f16_small(uint32_t bits)
{
    return absolute(bits) < F16_LEAST ? absolute(bits) : 0;
}

FO_INLINE void encode_f16(const block *restrict from, uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t bits = from->u[j];
        number size = {.u = f16_small(bits)};
        size.f += 0.5f; /* rounds to even, and leaves the code in the last bits */
        to[j] = (uint16_t)f16_of(bits, 0xfff + ((bits >> 13) & 1), size.u - 0x3f000000u);
    }
}

/* A subnormal code, rounded stochastically: |x| in units of 2^-24 plus a number in [0, 1), cut. */
FO_INLINE uint32_t f16_subnormal(uint32_t bits, uint32_t random)
{
    number size = {.u = f16_small(bits)};
    return (uint32_t)(int32_t)(size.f * 0x1p24f + (float)(int32_t)random * 0x1p-16f);
}

FO_INLINE void encode_f16_stochastic(const block *restrict from, const noise *restrict random,
                                     int slot, uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t bits = random_of(random, j, slot), r = bits & 0xffff, s = bits >> 16;
        uint32_t x = from->u[j], y = from->u[j + HALF];
        to[j] = (uint16_t)f16_of(x, r >> 3, f16_subnormal(x, r));
        to[j + HALF] = (uint16_t)f16_of(y, s >> 3, f16_subnormal(y, s));
    }
}

#endif
