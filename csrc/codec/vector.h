/* A block of FO_BLOCK elements as FO_VECTORS registers of dwords, for operations that compilers do
 * not generate from loops: narrowing, widening, saturation. Where FO_VECTORS is not defined, codecs
 * are loops alone.
 *
 * V(add_epi32) is the intrinsic of that name for the register, one that every width of x86 has; a
 * `vector` also has & | ^, and loads and stores as an element of an array. Shuffles work in lanes
 * of 128 bits, so that bytes or words are permuted once before they are unpacked, or after they are
 * packed. What differs between instruction sets is one function for each of them here. */
#ifndef FUSEDOPT_CODEC_VECTOR_H
#define FUSEDOPT_CODEC_VECTOR_H

#if defined(FO_NO_VECTOR) /* for the tests */
#elif defined(__AVX512BW__)
#define FO_VECTORS 4
#define V(operation) _mm512_##operation
typedef __m512i vector;

FO_INLINE vector load(const void *from) { return _mm512_loadu_si512(from); }
FO_INLINE void store(void *to, vector x) { _mm512_storeu_si512(to, x); }
FO_INLINE vector larger(vector x, vector y) { return _mm512_max_epu32(x, y); }
FO_INLINE vector multiply(vector x, vector y) { return _mm512_mullo_epi32(x, y); }

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

FO_INLINE vector add_where(vector x, vector test, vector y)
{
    return _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(test, test), x, y);
}

FO_INLINE __m128i halved(vector x)
{
    const __m256i y = _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_max_epu32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

FO_INLINE int any_nan(const float *from)
{
    __mmask16 found = 0;
    for (int i = 0; i < FO_BLOCK; i += 32)
        found |= _mm512_cmp_ps_mask(_mm512_loadu_ps(from + i), _mm512_loadu_ps(from + i + 16),
                                    _CMP_UNORD_Q);
    return found != 0;
}

#elif defined(__AVX2__)
#define FO_VECTORS 8
#define V(operation) _mm256_##operation
typedef __m256i vector;

FO_INLINE vector load(const void *from) { return _mm256_loadu_si256((const __m256i_u *)from); }
FO_INLINE void store(void *to, vector x) { _mm256_storeu_si256((__m256i_u *)to, x); }
FO_INLINE vector larger(vector x, vector y) { return _mm256_max_epu32(x, y); }
FO_INLINE vector multiply(vector x, vector y) { return _mm256_mullo_epi32(x, y); }

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

FO_INLINE __m128i halved(vector x)
{
    return _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

FO_INLINE int any_nan(const float *from)
{
    __m256 found = _mm256_setzero_ps();
    for (int i = 0; i < FO_BLOCK; i += 16)
        found = _mm256_or_ps(found, _mm256_cmp_ps(_mm256_loadu_ps(from + i),
                                                  _mm256_loadu_ps(from + i + 8), _CMP_UNORD_Q));
    return _mm256_movemask_ps(found) != 0;
}

#elif defined(__SSE2__)
#define FO_VECTORS 16
#define V(operation) _mm_##operation
typedef __m128i vector;

FO_INLINE vector load(const void *from) { return _mm_loadu_si128((const __m128i_u *)from); }
FO_INLINE void store(void *to, vector x) { _mm_storeu_si128((__m128i_u *)to, x); }
FO_INLINE void store_packed8(void *to, vector x) { store(to, x); }
FO_INLINE void store_packed16(void *to, vector x) { store(to, x); }
FO_INLINE vector load_for_unpack8(const void *from) { return load(from); }
FO_INLINE vector load_for_unpack16(const void *from) { return load(from); }

FO_INLINE vector larger(vector x, vector y)
{
    const vector sign = _mm_set1_epi32((int)0x80000000);
    const vector is_less = _mm_cmpgt_epi32(y ^ sign, x ^ sign);
    return x ^ (is_less & (x ^ y));
}

FO_INLINE vector multiply(vector x, vector y)
{
    const vector even = _mm_mul_epu32(x, y);
    const vector odd = _mm_mul_epu32(_mm_srli_epi64(x, 32), _mm_srli_epi64(y, 32));
    return _mm_unpacklo_epi32(_mm_shuffle_epi32(even, 8), _mm_shuffle_epi32(odd, 8));
}

FO_INLINE vector add_where(vector x, vector test, vector y)
{
    return _mm_add_epi16(x, _mm_cmpgt_epi16(test, _mm_setzero_si128()) & y);
}

FO_INLINE int any_nan(const float *from)
{
    __m128 found = _mm_setzero_ps();
    for (int i = 0; i < FO_BLOCK; i += 8)
        found =
            _mm_or_ps(found, _mm_cmpunord_ps(_mm_loadu_ps(from + i), _mm_loadu_ps(from + i + 4)));
    return _mm_movemask_ps(found) != 0;
}
#endif

/* Of those above: `larger` compares dwords without sign; `halved` is the larger ones of a
 * register's parts of 128 bits; add_where(x, test, y) adds to the words of x those of y where
 * `test`, which has no signs, is not 0; `any_nan` tests a block. */

#if defined(FO_VECTORS)
#define DWORDS (FO_BLOCK / FO_VECTORS) /* of a register */
#define K(name) V(set1_epi32)((int)fo_codec.name)

/* What stands above zeros: the lower or upper bytes of each lane as words, words as dwords. */
FO_INLINE vector low8(vector x) { return V(unpacklo_epi8)(x ^ x, x); }
FO_INLINE vector high8(vector x) { return V(unpackhi_epi8)(x ^ x, x); }
FO_INLINE vector low16(vector x) { return V(unpacklo_epi16)(x ^ x, x); }
FO_INLINE vector high16(vector x) { return V(unpackhi_epi16)(x ^ x, x); }

/* The upper or lower halves of dwords, as words. */
FO_INLINE vector pack_upper(vector x, vector y)
{
    return V(packs_epi32)(V(srai_epi32)(x, 16), V(srai_epi32)(y, 16)); /* none saturates */
}

FO_INLINE vector pack_lower(vector x, vector y)
{
#if defined(__SSE4_1__)
    return V(packus_epi32)(x & K(low_half), y & K(low_half));
#else
    return pack_upper(V(slli_epi32)(x, 16), V(slli_epi32)(y, 16));
#endif
}

/* The largest dword, without sign. */
FO_INLINE uint32_t largest_dword(vector x)
{
#if defined(__SSE4_1__)
    __m128i y = halved(x);
    y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
#else
    vector y = larger(x, V(shuffle_epi32)(x, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(larger(y, V(shuffle_epi32)(y, 0xb1)));
#endif
}
#endif

#endif
