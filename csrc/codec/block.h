/* A block of floats, and what all codecs do with it: random bits, the largest element, and the
 * upper halves. Included by the codecs. */
#ifndef FUSEDOPT_CODEC_BLOCK_H
#define FUSEDOPT_CODEC_BLOCK_H

#include "vector.h"

typedef union block {               /* the same elements as numbers and as bits */
    _Alignas(64) float f[FO_BLOCK]; /* a cache line, which wide accesses must not cross */
    uint32_t u[FO_BLOCK];
} block;

typedef union number {
    float f;
    uint32_t u;
} number;

#define HALF (FO_BLOCK / 2)
#define INFINITE 0x7f800000u
#define QUIET_NAN 0x7fc00000u

/* Random numbers of 32 bits for a block of a leaf: a multiplicative hash of a counter (after
 * Wellons' lowbias32, 2018, over a Weyl sequence). With one multiplication fewer it fails the tests
 * of correlation in tests/test_formats.py. All arrays of the leaf share the numbers; an array takes
 * number j times the factor of its slot. Of the product, element j of the block takes the lowest
 * bits, as many as its format needs, and element j + HALF the highest. */
#define WEYL 0x9e3779b9u

typedef struct noise {
    _Alignas(64) uint32_t u[HALF];
} noise;

/* The numbers of the block at element `at` of a tensor. */
FO_INLINE void make_noise(uint32_t key, ptrdiff_t at, noise *to)
{
    const uint32_t first = (uint32_t)((uint64_t)at / FO_BLOCK) * (HALF * WEYL);
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t x = (first + (uint32_t)j * WEYL) ^ key;
        x ^= x >> 16;
        x *= fo_codec.hash[0];
        x ^= x >> 15;
        to->u[j] = x * fo_codec.hash[1];
    }
}

/* Number j of an array's slot: 0 is the parameter, then come the states. */
FO_INLINE uint32_t random_of(const noise *from, int j, int slot)
{
    return slot == 1 ? from->u[j] : from->u[j] * fo_codec.slots[slot]; /* its factor is 1 */
}

FO_INLINE uint32_t absolute(uint32_t bits) { return bits & 0x7fffffffu; }
FO_INLINE int is_finite(uint32_t bits) { return absolute(bits) < INFINITE; }
FO_INLINE int is_nan(uint32_t bits) { return absolute(bits) > INFINITE; }

/* The bits of a block's largest |x|; above INFINITE if there is a NaN. */
FO_INLINE uint32_t largest_of(const block *from)
{
    uint32_t largest = 0;
    FO_REDUCE(max, largest)
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t size = absolute(from->u[j]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

#if defined(FO_VECTORS)
/* Dwords i of an array's random numbers, in registers. */
FO_INLINE vector random_vector(const noise *from, int i, int slot)
{
    const vector x = ((const vector *)from->u)[i];
    return slot == 1 ? x : multiply(x, V(set1_epi32)((int)fo_codec.slots[slot]));
}
#endif

/* The upper half of each element. This and other conversions are written by hand: GCC masks values
 * that the shuffles saturate anyway, and puts the lanes in order after each shuffle, with which
 * encoders took 1.3 to 2 times as long (AVX2). */
FO_INLINE void upper_halves(const block *restrict from, uint16_t *restrict to)
{
#if defined(FO_VECTORS)
    const vector *x = (const vector *)from->u;
    for (int i = 0; i < FO_VECTORS; i += 2)
        store_packed16(to + i * DWORDS, pack_upper(x[i], x[i + 1]));
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to[j] = (uint16_t)(from->u[j] >> 16);
#endif
}

#endif
