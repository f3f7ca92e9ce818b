/* The few operations that compilers do not find in plain loops: a block of FO_BLOCK elements as
 * FO_VECTORS registers of dwords, which codecs narrow, widen and compare. Where FO_VECTORS is not
 * defined, codecs are plain loops.
 *
 * V(add_epi32) is the intrinsic of that name for the register; `vector` has & | ^ and loads and
 * stores as an element of an array. Shuffles work in lanes of 128 bits, so that bytes or words in
 * the order of an array are permuted once after they are packed, or before they are unpacked. */
#ifndef FUSEDOPT_CODEC_VECTOR_H
#define FUSEDOPT_CODEC_VECTOR_H

#if defined(__AVX512BW__)
#define FO_VECTORS 4
#define V(operation) _mm512_##operation
typedef __m512i vector;

FO_INLINE vector load(const void *from) { return _mm512_loadu_si512(from); }
FO_INLINE void store(void *to, vector x) { _mm512_storeu_si512(to, x); }

FO_INLINE void store_packed8(void *to, vector x)
{
    const vector order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(to, _mm512_permutexvar_epi32(order, x));
}

FO_INLINE void store_packed16(void *to, vector x)
{
    store(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x));
}

FO_INLINE vector load_for_unpack8(const void *from)
{
    const vector order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, load(from));
}

FO_INLINE vector load_for_unpack16(const void *from)
{
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), load(from));
}

/* The words of x, plus those of y where `test`, which has no signs, is not 0. */
FO_INLINE vector add_where(vector x, vector test, vector y)
{
    return _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(test, test), x, y);
}

/* The largest dword. */
FO_INLINE uint32_t top(vector x)
{
    const __m256i z = _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i y = _mm_max_epu32(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1));
    y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
}

#elif defined(__AVX2__)
#define FO_VECTORS 8
#define V(operation) _mm256_##operation
typedef __m256i vector;

FO_INLINE vector load(const void *from) { return _mm256_loadu_si256((const __m256i_u *)from); }
FO_INLINE void store(void *to, vector x) { _mm256_storeu_si256((__m256i_u *)to, x); }

FO_INLINE void store_packed8(void *to, vector x)
{
    const vector order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store(to, _mm256_permutevar8x32_epi32(x, order));
}

FO_INLINE void store_packed16(void *to, vector x) { store(to, _mm256_permute4x64_epi64(x, 0xd8)); }

FO_INLINE vector load_for_unpack8(const void *from)
{
    const vector order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm256_permutevar8x32_epi32(load(from), order);
}

FO_INLINE vector load_for_unpack16(const void *from)
{
    return _mm256_permute4x64_epi64(load(from), 0xd8);
}

FO_INLINE vector add_where(vector x, vector test, vector y)
{
    return _mm256_add_epi16(x, _mm256_sign_epi16(y, test));
}

FO_INLINE uint32_t top(vector x)
{
    __m128i y = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
}
#endif

#if defined(FO_VECTORS)
#define DWORDS (FO_BLOCK / FO_VECTORS) /* of a register */
#define K(name) V(set1_epi32)((int)fo_codec.name)

/* What stands above zeros: the lower or upper bytes of each lane as words, words as dwords. */
FO_INLINE vector low8(vector x) { return V(unpacklo_epi8)(x ^ x, x); }
FO_INLINE vector high8(vector x) { return V(unpackhi_epi8)(x ^ x, x); }
FO_INLINE vector low16(vector x) { return V(unpacklo_epi16)(x ^ x, x); }
FO_INLINE vector high16(vector x) { return V(unpackhi_epi16)(x ^ x, x); }
#endif

#endif
