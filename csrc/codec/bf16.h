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
FO_INLINE int has_nan(const block *from)
{
#if defined(FO_VECTORS)
    return any_nan(from->f);
#else
    return largest_of(from) > INFINITE;
#endif
}

FO_INLINE void quiet_nans(const block *restrict from, uint16_t *restrict to)
{
    if (has_nan(from))
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_nan(from->u[j]))
                to[j] = QUIET_NAN >> 16;
}

FO_INLINE void decode_bf16(const uint16_t *restrict from, block *restrict to)
{
#if defined(FO_VECTORS)
    vector *out = (vector *)to->u;
    for (int i = 0; i < FO_VECTORS; i += 2) {
        const vector words = load_for_unpack16(from + i * DWORDS);
        out[i] = low16(words);
        out[i + 1] = high16(words);
    }
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = (uint32_t)from[j] << 16;
#endif
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

FO_INLINE void encode_bf16_stochastic(const block *restrict from, const noise *restrict random,
                                      int slot, uint16_t *restrict to)
{
    block sums;
#if defined(FO_VECTORS)
    const vector *in = (const vector *)from->u;
    vector *out = (vector *)sums.u;
    for (int i = 0, j = FO_VECTORS / 2; i < FO_VECTORS / 2; i++, j++) {
        const vector r = random_vector(random, i, slot);
        out[i] = V(add_epi32)(in[i], r & K(low_half));
        out[j] = V(add_epi32)(in[j], V(srli_epi32)(r, 16));
    }
#else
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t r = random_of(random, j, slot);
        sums.u[j] = from->u[j] + (r & 0xffff);
        sums.u[j + HALF] = from->u[j + HALF] + (r >> 16);
    }
#endif
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
#if defined(FO_VECTORS)
    vector *out = (vector *)to->u;
    for (int i = 0; i < FO_VECTORS; i += 4) {
        const vector bytes = load_for_unpack8(low + i * DWORDS);
        for (int k = 0; k < 2; k++) { /* a residual below zero borrows from the upper half */
            const vector residual = k == 0 ? low8(bytes) : high8(bytes);
            const vector upper = V(add_epi16)(load_for_unpack16(from + (i + 2 * k) * DWORDS),
                                              V(srai_epi16)(residual, 15));
            out[i + 2 * k] = V(unpacklo_epi16)(residual, upper);
            out[i + 2 * k + 1] = V(unpackhi_epi16)(residual, upper);
        }
    }
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + ((uint32_t)low[j] << 8);
#endif
}

/* Rounds to 24 bits, stochastically; from there on as encode_low16. */
FO_INLINE void encode_low8(const block *restrict from, const noise *restrict random, int slot,
                           uint16_t *restrict to, uint8_t *restrict low)
{
#if defined(FO_VECTORS)
    const vector *in = (const vector *)from->u;
    vector sums[FO_VECTORS], bytes[FO_VECTORS / 2];
    for (int i = 0; i < FO_VECTORS / 2; i++) {
        const vector r = random_vector(random, i, slot);
        const vector lower = V(srli_epi32)(r, 8) & K(random8), upper = V(srli_epi32)(r, 24);
        const int j = i + FO_VECTORS / 2;
        sums[i] = V(add_epi32)(in[i], lower | K(half));
        sums[j] = V(add_epi32)(in[j], upper | K(half));
    }
    for (int i = 0; i < FO_VECTORS; i += 2) {
        const vector x = sums[i], y = sums[i + 1];
        store_packed16(to + i * DWORDS, pack_upper(x, y));
        bytes[i / 2] = V(srli_epi16)(pack_lower(x, y), 8);
    }
    for (int i = 0; i < FO_VECTORS; i += 4)
        store_packed8(low + i * DWORDS,
                      V(packus_epi16)(bytes[i / 2], bytes[i / 2 + 1]) ^ K(bytes_sign));
#else
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t r = random_of(random, j, slot);
        uint32_t x = from->u[j] + ((r >> 8) & 0xff), y = from->u[j + HALF] + (r >> 24);
        to[j] = (uint16_t)(((x & 0xffffff00u) + 0x8000) >> 16);
        to[j + HALF] = (uint16_t)(((y & 0xffffff00u) + 0x8000) >> 16);
        low[j] = (uint8_t)(x >> 8);
        low[j + HALF] = (uint8_t)(y >> 8);
    }
#endif
    if (has_nan(from))
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_nan(from->u[j]))
                to[j] = QUIET_NAN >> 16, low[j] = 0;
}

#endif
