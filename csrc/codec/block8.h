/* 8-bit block floats: S8 with a sign, U8 without, for a block of FO_BLOCK elements.
 *
 * The elements of a block share a base: the float exponent of the block's smallest binade. It is
 * even and has a byte of its own, whose lowest bit is set if some element is not finite. Code 0 is
 * zero; code k is the float with bits (base << 23) + (k << 20). So there are 3 mantissa bits and,
 * above the base, 16 binades in 7 bits (S8) or 32 in 8 bits (U8). The base is such that the largest
 * element gets a code below the topmost, which stands for NaN.
 *
 * Rounding is stochastic: m and v change by less than one code in a step, and would stall if they
 * were rounded to nearest. What is too small for the window becomes zero in S8. In U8 it becomes
 * code 1, because a second moment of 0 beside a first that is not would make an update of m / eps.
 *
 * Arrays hold whole blocks and do not overlap. Included by codec.h. */
#ifndef FUSEDOPT_CODEC_BLOCK8_H
#define FUSEDOPT_CODEC_BLOCK8_H

#include "block.h"

#define STEP 0x100000u /* one code, in bits of the float: 20 of them are dropped */

/* `about` is the byte of the block. is_signed is a constant where this is inlined: S8 or U8. */
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

/* One code. `random` has its noise in bits 4 to 19; `start` is the base, in bits of the float, less
 * half a unit of bit 4. */
FO_INLINE uint32_t code_8bit(uint32_t bits, uint32_t random, uint32_t start, int is_signed)
{
    const int32_t least = is_signed ? 0 : STEP, size = (int32_t)(absolute(bits) + random - start);
    const uint32_t sum = (uint32_t)(size < least ? least : size), code = sum >> 20;
    if (is_signed)
        return ((sum << 4) | (bits & 0x80000000u)) >> 24;
    return code < absolute(bits) ? code : absolute(bits); /* 0 for 0; what is less has code 1 */
}

/* Returns the byte of the block. */
FO_INLINE uint8_t encode_8bit(const block *restrict from, uint32_t key, uint32_t weyl,
                              int is_signed, uint8_t *restrict to)
{
    const int binades = is_signed ? 15 : 31;
    block codes;
    uint32_t largest = largest_of(from), is_odd = 0;
    if (largest >= INFINITE) { /* take the largest of the finite ones */
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

#endif
