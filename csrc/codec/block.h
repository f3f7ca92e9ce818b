/* A block of floats, and what all codecs do with it: noise, the largest element, and conversion
 * between dwords and narrower elements. Included by the codecs. */
#ifndef FUSEDOPT_CODEC_BLOCK_H
#define FUSEDOPT_CODEC_BLOCK_H

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

/* 32 random bits from a counter: a multiplicative hash over a Weyl sequence (the multipliers are
 * Wellons' lowbias32, 2018). With one multiplication less it fails the tests of correlation in
 * tests/test_formats.py. Element j of block b takes the low half of number b * HALF + j, element
 * j + HALF the high half. A loop adds WEYL to the sequence from `weyl_of` on, since a
 * multiplication for every number would cost as much as a round of the hash. */
#define WEYL 0x9e3779b9u

/* The Weyl sequence's value for the first element of the block at element `at` of an array. */
FO_INLINE uint32_t weyl_of(ptrdiff_t at)
{
    return (uint32_t)((uint64_t)at / FO_BLOCK) * (HALF * WEYL);
}

FO_INLINE uint32_t noise(uint32_t key, uint32_t weyl)
{
    uint32_t x = weyl ^ key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
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

/* The upper half of each element. These conversions are written by hand: GCC masks values that the
 * shuffles saturate anyway, and puts the lanes in order after each shuffle, with which encoders
 * took 1.3 to 2 times as long (AVX2). */
FO_INLINE void upper_halves(const block *restrict from, uint16_t *restrict to)
{
#if defined(__AVX2__) && !defined(__AVX512BW__)
    for (int j = 0; j < FO_BLOCK; j += 16) {
        const __m256i *x = (const __m256i *)(from->u + j);
        __m256i a = _mm256_srli_epi32(x[0], 16), b = _mm256_srli_epi32(x[1], 16);
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
        _mm256_storeu_si256((__m256i *)(to + j), packed);
    }
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to[j] = (uint16_t)(from->u[j] >> 16);
#endif
}

/* The low byte of each element, which must be below 256. */
FO_INLINE void narrow(const block *restrict from, uint8_t *restrict to)
{
#if defined(__AVX512BW__)
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i *x = (const __m512i *)from->u;
    __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
#elif defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int j = 0; j < FO_BLOCK; j += 32) {
        const __m256i *x = (const __m256i *)(from->u + j);
        __m256i a = _mm256_packus_epi32(x[0], x[1]), b = _mm256_packus_epi32(x[2], x[3]);
        __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
        _mm256_storeu_si256((__m256i *)(to + j), packed);
    }
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to[j] = (uint8_t)from->u[j];
#endif
}

/* Bytes to dwords, with the sign copied over the upper bits. */
FO_INLINE void widen(const uint8_t *restrict from, block *restrict to)
{
#if defined(__AVX512BW__)
    for (int j = 0; j < FO_BLOCK; j += 16)
        _mm512_store_si512(to->u + j,
                           _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + j))));
#elif defined(__AVX2__)
    for (int j = 0; j < FO_BLOCK; j += 8)
        _mm256_store_si256((__m256i *)(to->u + j),
                           _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + j))));
#else
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = (uint32_t)(int8_t)from[j];
#endif
}

#endif
