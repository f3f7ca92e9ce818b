/* bfloat16, alone or with residual bits, for a block of FO_BLOCK elements.
 *
 * A bf16 is the upper half of a float. What an encoder adds before it cuts the lower half decides
 * how it rounds. With residual bits, the bf16 is the nearest to a longer float (ties away from
 * zero) and the residual is the difference of the two bit patterns, so that both together are
 * exact.
 *
 * Arrays hold whole blocks, are aligned for their elements, and do not overlap. Included by
 * codec.h. */
#ifndef FUSEDOPT_CODEC_BF16_H
#define FUSEDOPT_CODEC_BF16_H

#include "block.h"

/* Encoders ask once per block: a test of every element would cost more than the rounding. */
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

/* To nearest, ties to even. An infinity has no low bits, so nothing carries into it. */
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

FO_INLINE void decode_low16(const uint16_t *restrict from, const int16_t *restrict low,
                            block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + (uint32_t)low[j];
}

/* The bf16 has no low bits, so the residual is the float's low half, as a signed number. */
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

/* Rounds to 24 bits, stochastically; from there on as encode_low16. */
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

#endif
