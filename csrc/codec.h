/* Narrow formats: a block of FO_BLOCK elements to float and back, in integer arithmetic on the bits
 * of the float, which compilers vectorise on every instruction set and NumPy repeats to the bit
 * (src/fusedopt/formats.py).
 *
 * Included once by kernels.c. Every function works on a whole block: load and store in formats.h
 * pad the last one of an array. Nothing is aliased; byte arrays need no alignment.
 *
 * 8-bit block floats. A block shares a base, the float exponent of its smallest binade, even and in
 * a byte of its own whose lowest bit says that some element is not finite. Code 0 is zero; code k
 * is the float with bits (base << 23) + (k << 20), so there are 3 mantissa bits and, above the
 * base, 16 binades in 7 bits (S8, with a sign) or 32 in 8 bits (U8). The base is such that the
 * block's largest element gets a code below the topmost, which stands for NaN. Rounding is
 * stochastic: m and v creep by less than a step and would stall if rounded to nearest. What is too
 * small for the window is zero in S8; in U8 it is code 1, because a second moment of 0 beside a
 * first that is not would make an update of m / eps. */

typedef union block {               /* the same elements as numbers and as bits */
    _Alignas(64) float f[FO_BLOCK]; /* a cache line: wide accesses must not cross one */
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
 * j + HALF the high half. */
FO_INLINE uint32_t noise(uint32_t key, uint32_t counter)
{
    uint32_t x = (counter * 0x9e3779b9u) ^ key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

FO_INLINE uint32_t absolute(uint32_t bits) { return bits & 0x7fffffffu; }
FO_INLINE int is_finite(uint32_t bits) { return absolute(bits) < INFINITE; }
FO_INLINE uint32_t quiet(uint32_t bits) { return absolute(bits) > INFINITE ? QUIET_NAN : bits; }

/* ---------------------------------------------------------------- bf16 */

FO_INLINE void decode_bf16(const uint16_t *restrict from, block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = (uint32_t)from[j] << 16;
}

/* Adds what makes the upper half right, and cuts; infinities stay, NaN becomes the quiet one. */
FO_INLINE uint32_t bf16_of(uint32_t bits, uint32_t add)
{
    return (is_finite(bits) ? bits + add : quiet(bits)) >> 16;
}

FO_INLINE void encode_bf16(const block *restrict from, uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to[j] = (uint16_t)bf16_of(from->u[j], 0x7fff + ((from->u[j] >> 16) & 1));
}

FO_INLINE void encode_bf16_stochastic(const block *restrict from, uint32_t key, uint32_t counter,
                                      uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, counter + (uint32_t)j);
        to[j] = (uint16_t)bf16_of(from->u[j], random & 0xffff);
        to[j + HALF] = (uint16_t)bf16_of(from->u[j + HALF], random >> 16);
    }
}

/* ------------------------------------------------- bf16 with residual bits */

FO_INLINE void decode_low16(const uint16_t *restrict from, const int16_t *restrict low,
                            block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + (uint32_t)low[j];
}

FO_INLINE void encode_low16(const block *restrict from, uint16_t *restrict to,
                            int16_t *restrict low)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t bits = quiet(from->u[j]);
        uint32_t high = (bits + 0x8000) >> 16;
        to[j] = (uint16_t)high;
        low[j] = (int16_t)(bits - (high << 16));
    }
}

FO_INLINE void decode_low8(const uint16_t *restrict from, const int8_t *restrict low,
                           block *restrict to)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        to->u[j] = ((uint32_t)from[j] << 16) + ((uint32_t)low[j] << 8);
}

FO_INLINE void encode_low8(const block *restrict from, uint16_t *restrict to, int8_t *restrict low)
{
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t bits = quiet(from->u[j]);
        uint32_t longer = (bits + 0x80) >> 8, high = (longer + 0x80) >> 8;
        to[j] = (uint16_t)high;
        low[j] = (int8_t)(longer - (high << 8));
    }
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

FO_INLINE void encode_f16_stochastic(const block *restrict from, uint32_t key, uint32_t counter,
                                     uint16_t *restrict to)
{
    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, counter + (uint32_t)j), r = random & 0xffff, s = random >> 16;
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
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t size = ((uint32_t)from[j] & codes) << 20;
        uint32_t bits = size != 0 ? size + base : 0;
        to->u[j] = is_signed ? bits | (((uint32_t)from[j] & 0x80) << 24) : bits;
    }
    if (about & 1)
        for (int j = 0; j < FO_BLOCK; j++)
            if ((from[j] & codes) == codes)
                to->u[j] = QUIET_NAN;
}

FO_INLINE uint32_t code_8bit(uint32_t bits, uint32_t random, uint32_t base, int is_signed)
{
    const int32_t least = is_signed ? 0 : STEP;
    int32_t size = (int32_t)(absolute(bits) + ((random << 4) | 8) - base);
    uint32_t code = (uint32_t)(size < least ? least : size) >> 20;
    if (is_signed)
        return code | ((bits >> 24) & 0x80);
    return absolute(bits) != 0 ? code : 0;
}

/* Returns the byte about the block. */
FO_INLINE uint8_t encode_8bit(const block *restrict from, uint32_t key, uint32_t counter,
                              int is_signed, uint8_t *restrict to)
{
    const int binades = is_signed ? 15 : 31;
    block codes;
    uint32_t largest = 0, is_odd = 0;
    FO_REDUCE(max, largest)
    for (int j = 0; j < FO_BLOCK; j++) {
        uint32_t size = absolute(from->u[j]);
        largest = size > largest ? size : largest;
    }
    if (largest >= INFINITE) { /* then of the finite ones */
        is_odd = 1;
        largest = 0;
        for (int j = 0; j < FO_BLOCK; j++)
            if (is_finite(from->u[j]) && absolute(from->u[j]) > largest)
                largest = absolute(from->u[j]);
    }
    int32_t base = (int32_t)((largest + 2 * STEP) >> 23) - binades;
    base = base > 0 ? (base + 1) & ~1 : 0;

    FO_SIMD
    for (int j = 0; j < HALF; j++) {
        uint32_t random = noise(key, counter + (uint32_t)j), smallest = (uint32_t)base << 23;
        codes.u[j] = code_8bit(from->u[j], random & 0xffff, smallest, is_signed);
        codes.u[j + HALF] = code_8bit(from->u[j + HALF], random >> 16, smallest, is_signed);
    }
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++) /* apart: narrowing by four is a shuffle of its own */
        to[j] = (uint8_t)codes.u[j];
    if (is_odd)
        for (int j = 0; j < FO_BLOCK; j++)
            if (!is_finite(from->u[j]))
                to[j] = is_signed ? 0x7f : 0xff;
    return (uint8_t)((uint32_t)base | is_odd);
}

/* ---------------------------------------------------------------- any of them */

/* The bytes of one block, aligned, with zeros behind the last element. */
typedef union padded {
    uint16_t align;
    unsigned char bytes[2 * FO_BLOCK];
} padded;

FO_INLINE void *pad(padded *room, void *from, ptrdiff_t bytes)
{
    memset(room, 0, sizeof *room);
    memcpy(room, from, (size_t)bytes);
    return room;
}

/* Where the n elements from `at` lie in data and in extra, n <= FO_BLOCK, and whether they must
 * pass through a padded copy: at the end of an array, or where they are not aligned. */
typedef struct place {
    void *data, *extra;
    ptrdiff_t data_bytes, extra_bytes;
    int is_padded;
} place;

FO_INLINE place place_of(const fo_array *array, ptrdiff_t at, ptrdiff_t n)
{
    place it = {.data = (char *)array->data + fo_data_bytes(array, at),
                .data_bytes = fo_data_bytes(array, n)};
    if (array->extra != NULL) {
        it.extra = (char *)array->extra + fo_extra_bytes(array, at);
        it.extra_bytes = fo_extra_bytes(array, n);
    }
    it.is_padded = n < FO_BLOCK || ((uintptr_t)it.data | (uintptr_t)it.extra) % 2 != 0;
    return it;
}

/* Elements [at, at + n) of an array of a narrow format; zeros behind them. */
FO_INLINE void decode(const fo_array *array, ptrdiff_t at, ptrdiff_t n, block *to)
{
    padded data, extra;
    place it = place_of(array, at, n);
    if (it.is_padded) {
        it.data = pad(&data, it.data, it.data_bytes);
        it.extra = it.extra ? pad(&extra, it.extra, it.extra_bytes) : NULL;
    }
    switch (array->format) {
    case FO_BF16_LOW16:
        decode_low16(it.data, it.extra, to);
        break;
    case FO_BF16_LOW8:
        decode_low8(it.data, it.extra, to);
        break;
    case FO_S8:
        decode_8bit(it.data, *(uint8_t *)it.extra, 1, to);
        break;
    case FO_U8:
        decode_8bit(it.data, *(uint8_t *)it.extra, 0, to);
        break;
    case FO_F16:
    case FO_F16_STOCHASTIC:
        decode_f16(it.data, to);
        break;
    default:
        decode_bf16(it.data, to);
    }
}

/* The way back; key is of the array in this step. */
FO_INLINE void encode(const fo_array *array, ptrdiff_t at, ptrdiff_t n, const block *from,
                      uint32_t key)
{
    const uint32_t counter = (uint32_t)((uint64_t)at / FO_BLOCK * HALF);
    padded data, extra;
    const place there = place_of(array, at, n);
    void *to = there.is_padded ? &data : there.data;
    void *beside = there.is_padded ? &extra : there.extra;
    switch (array->format) {
    case FO_BF16_LOW16:
        encode_low16(from, to, beside);
        break;
    case FO_BF16_LOW8:
        encode_low8(from, to, beside);
        break;
    case FO_S8:
        *(uint8_t *)beside = encode_8bit(from, key, counter, 1, to);
        break;
    case FO_U8:
        *(uint8_t *)beside = encode_8bit(from, key, counter, 0, to);
        break;
    case FO_F16:
        encode_f16(from, to);
        break;
    case FO_F16_STOCHASTIC:
        encode_f16_stochastic(from, key, counter, to);
        break;
    case FO_BF16:
        encode_bf16(from, to);
        break;
    default:
        encode_bf16_stochastic(from, key, counter, to);
    }
    if (there.is_padded) {
        memcpy(there.data, &data, (size_t)there.data_bytes);
        if (there.extra != NULL)
            memcpy(there.extra, &extra, (size_t)there.extra_bytes);
    }
}

/* The same for leaves in double, where narrow formats are rare: compiled once. */
typedef struct wide_block {
    _Alignas(64) double f[FO_BLOCK];
} wide_block;

static __attribute__((noinline)) void
FO_CAT(decode_wide, FO_ISA)(const fo_array *array, ptrdiff_t at, ptrdiff_t n, wide_block *to)
{
    block narrow;
    decode(array, at, n, &narrow);
    for (int j = 0; j < FO_BLOCK; j++)
        to->f[j] = (double)narrow.f[j];
}

static __attribute__((noinline)) void FO_CAT(encode_wide, FO_ISA)(const fo_array *array,
                                                                  ptrdiff_t at, ptrdiff_t n,
                                                                  const wide_block *from,
                                                                  uint32_t key)
{
    block narrow;
    for (int j = 0; j < FO_BLOCK; j++)
        narrow.f[j] = (float)from->f[j];
    encode(array, at, n, &narrow, key);
}
