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
 * code 1, because a second moment of 0 beside a first that is not would make an update of m / eps;
 * only what is below 2^-129 may become 0.
 *
 * The codes of finite elements need the upper 16 bits of a float alone, once the noise is added, so
 * that vectors handle them as words. A block with an element that is not finite, or with a sign in
 * U8, takes a general loop, which handles any block.
 *
 * Arrays hold whole blocks and do not overlap. Included by codec.h. */
#ifndef FUSEDOPT_CODEC_BLOCK8_H
#define FUSEDOPT_CODEC_BLOCK8_H

#include "block.h"

#define STEP 0x100000u /* one code, in bits of the float: 20 of them are dropped */

/* `about` is the byte of the block. is_signed is a constant where this is inlined: S8 or U8. */
FO_INLINE void decode_8bit_any(const uint8_t *restrict from, uint32_t about, int is_signed,
                               block *restrict to)
{
    const uint32_t base = (about & 0xfe) << 23, codes = is_signed ? 0x7f : 0xff;
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t size = (from[j] & codes) << 20;
        to->u[j] = size + (size != 0 ? base : 0) + ((from[j] & ~codes) << 24);
    }
    if (about & 1)
        for (int j = 0; j < FO_BLOCK; j++)
            if ((from[j] & codes) == codes)
                to->u[j] = QUIET_NAN;
}

/* The byte of a block without its lowest bit. */
FO_INLINE uint32_t base_of(uint32_t largest, int is_signed)
{
    const int32_t base = (int32_t)((largest + 2 * STEP) >> 23) - (is_signed ? 15 : 31);
    return base > 0 ? (uint32_t)(base + 1) & ~1u : 0;
}

/* One code. `random` has 20 bits; `first` is what code 0 stands for, in units of a code. */
FO_INLINE uint32_t code_8bit(uint32_t bits, uint32_t random, uint32_t first, int is_signed)
{
    const uint32_t sum = (absolute(bits) + random) >> 20, code = sum > first ? sum - first : 0;
    if (is_signed)
        return code | ((bits >> 24) & 0x80);
    return code > 0 ? code : sum > 0;
}

/* Returns the byte of the block. */
FO_INLINE uint8_t encode_8bit_any(const block *restrict from, const noise *restrict random,
                                  int slot, int is_signed, uint8_t *restrict to)
{
    uint32_t largest = largest_of(from), has_nonfinite = 0;
    if (largest >= INFINITE) { /* the largest of the finite elements */
        has_nonfinite = 1;
        largest = 0;
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_finite(from->u[j]) && absolute(from->u[j]) > largest)
                largest = absolute(from->u[j]);
    }
    const uint32_t base = base_of(largest, is_signed), first = base << 3;
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        const uint32_t r = random_of(random, j, slot);
        to[j] = (uint8_t)code_8bit(from->u[j], r & (STEP - 1), first, is_signed);
        to[j + HALF] = (uint8_t)code_8bit(from->u[j + HALF], r >> 12, first, is_signed);
    }
    if (has_nonfinite)
        for (int j = 0; j < FO_BLOCK; j++)
            if (!is_finite(from->u[j]))
                to[j] = is_signed ? 0x7f : 0xff;
    return (uint8_t)(base | has_nonfinite);
}

#if defined(FO_VECTORS)

static FO_APART void FO_CAT(decode_8bit_any, FO_ISA)(const uint8_t *from, uint32_t about,
                                                     int is_signed, block *to)
{
    decode_8bit_any(from, about, is_signed, to);
}

static FO_APART uint8_t FO_CAT(encode_8bit_any, FO_ISA)(const block *from, const noise *random,
                                                        int slot, int is_signed, uint8_t *to)
{
    return encode_8bit_any(from, random, slot, is_signed, to);
}

FO_INLINE void decode_8bit(const uint8_t *restrict from, uint32_t about, int is_signed,
                           block *restrict to)
{
    const vector base = V(set1_epi32)((int)fo_codec.base[about]);
    vector *out = (vector *)to->u;
    if (__builtin_expect(about & 1, 0)) {
        FO_CAT(decode_8bit_any, FO_ISA)(from, about, is_signed, to);
        return;
    }
    for (int i = 0; i < FO_VECTORS; i += 4) {
        const vector bytes = load_for_unpack8(from + i * DWORDS);
        for (int k = 0; k < 2; k++) {
            vector words = k == 0 ? low8(bytes) : high8(bytes), test;
            if (is_signed) { /* put the bits of a code where the float has them */
                test = words & K(words_code);
                words = V(srai_epi16)(words, 4) & K(words_signed_code);
            } else
                test = words = V(srli_epi16)(words, 4);
            words = add_where(words, test, base);
            out[i + 2 * k] = low16(words);
            out[i + 2 * k + 1] = high16(words);
        }
    }
}

FO_INLINE uint8_t encode_8bit(const block *restrict from, const noise *restrict random, int slot,
                              int is_signed, uint8_t *restrict to)
{
    const vector *in = (const vector *)from->u;
    vector sizes[FO_VECTORS], sums[FO_VECTORS / 2], most;
    for (int i = 0; i < FO_VECTORS; i++) {
        sizes[i] = in[i];
        if (is_signed)
            sizes[i] &= K(size);
        most = i == 0 ? sizes[0] : larger(most, sizes[i]);
    }
    const uint32_t largest = largest_dword(most);
    if (__builtin_expect(largest >= INFINITE, 0))
        return FO_CAT(encode_8bit_any, FO_ISA)(from, random, slot, is_signed, to);

    const uint32_t base = base_of(largest, is_signed);
    const vector first = V(srli_epi16)(V(set1_epi32)((int)fo_codec.base[base]), 4);
    for (int i = 0; i < FO_VECTORS / 2; i++) {
        const vector r = random_vector(random, i, slot);
        vector *x = &sizes[i], *y = &sizes[i + FO_VECTORS / 2];
        *x = V(srli_epi32)(V(add_epi32)(*x, r & K(random20)), 20);
        *y = V(srli_epi32)(V(add_epi32)(*y, V(srli_epi32)(r, 12)), 20);
    }
    for (int i = 0; i < FO_VECTORS / 2; i++) {
        const vector words = V(packs_epi32)(sizes[2 * i], sizes[2 * i + 1]);
        sums[i] = V(subs_epu16)(words, first);
        if (!is_signed)
            sums[i] = V(max_epi16)(sums[i], V(min_epi16)(words, K(words_one)));
    }
    for (int i = 0; i < FO_VECTORS; i += 4) {
        vector codes = V(packus_epi16)(sums[i / 2], sums[i / 2 + 1]);
        if (is_signed) { /* saturation keeps signs */
            const vector x = V(packs_epi32)(in[i], in[i + 1]);
            const vector y = V(packs_epi32)(in[i + 2], in[i + 3]);
            codes |= V(packs_epi16)(x, y) & K(bytes_sign);
        }
        store_packed8(to + i * DWORDS, codes);
    }
    return (uint8_t)base;
}

#else
#define decode_8bit decode_8bit_any
#define encode_8bit encode_8bit_any
#endif

#endif
