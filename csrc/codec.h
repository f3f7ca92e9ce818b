/* Narrow formats: a block of FO_BLOCK elements to float and back, in integer arithmetic on the bits
 * of the float, which compilers vectorise on every instruction set and NumPy repeats to the bit
 * (src/fusedopt/formats.py).
 *
 * Included once by kernels.c. Every function works on a whole block of aligned arrays that do not
 * overlap; load.inc pads the last block of an array, and copies arrays that are not aligned. A new
 * format is a row in formats.h, a file in codec/, and a case in decode and encode. */
#ifndef FUSEDOPT_CODEC_H
#define FUSEDOPT_CODEC_H

#include "codec/bf16.h"
#include "codec/block8.h"
#include "codec/f16.h"

/* Decodes one block; `data` and `extra` are where it begins in the array. In loops that are
 * compiled for one format it is a constant, and one case remains. */
FO_INLINE void decode(fo_format format, const void *data, const void *extra, block *to)
{
    switch (format) {
    case FO_BF16_LOW16:
        decode_low16(data, extra, to);
        break;
    case FO_BF16_LOW8:
        decode_low8(data, extra, to);
        break;
    case FO_S8:
        decode_8bit(data, *(const uint8_t *)extra, 1, to);
        break;
    case FO_U8:
        decode_8bit(data, *(const uint8_t *)extra, 0, to);
        break;
    case FO_F16:
    case FO_F16_STOCHASTIC:
        decode_f16(data, to);
        break;
    default:
        decode_bf16(data, to);
    }
}

/* Encodes one block. `random` is the noise of the block, `factor` that of the array's slot; neither
 * is used by formats that round to nearest. */
FO_INLINE void encode(fo_format format, const block *from, const noise *random, int slot,
                      void *data, void *extra)
{
    switch (format) {
    case FO_BF16_LOW16:
        encode_low16(from, data, extra);
        break;
    case FO_BF16_LOW8:
        encode_low8(from, random, slot, data, extra);
        break;
    case FO_S8:
        *(uint8_t *)extra = encode_8bit(from, random, slot, 1, data);
        break;
    case FO_U8:
        *(uint8_t *)extra = encode_8bit(from, random, slot, 0, data);
        break;
    case FO_F16:
        encode_f16(from, data);
        break;
    case FO_F16_STOCHASTIC:
        encode_f16_stochastic(from, random, slot, data);
        break;
    case FO_BF16:
        encode_bf16(from, data);
        break;
    default:
        encode_bf16_stochastic(from, random, slot, data);
    }
}

/* The same for leaves in double, where narrow formats are rare. */
typedef struct wide_block {
    _Alignas(64) double f[FO_BLOCK];
} wide_block;

FO_INLINE void decode_wide(fo_format format, const void *data, const void *extra, wide_block *to)
{
    block narrow;
    decode(format, data, extra, &narrow);
    for (int j = 0; j < FO_BLOCK; j++)
        to->f[j] = (double)narrow.f[j];
}

/* Rounds to odd (Boldo & Melquiond, IEEE Trans. Computers 57(4), 2008): cut, and the last bit set
 * if anything was lost, so that formats of 22 bits or less are rounded once, by their own encoding.
 */
FO_INLINE float to_odd(double x)
{
    number near = {.f = (float)x};
    const double size = __builtin_fabs(x), near_size = __builtin_fabs((double)near.f);
    near.u -= near_size > size; /* of infinity this makes the largest float, which is odd */
    near.u |= near_size != size;
    return near.f;
}

FO_INLINE void encode_wide(fo_format format, const wide_block *from, const noise *random, int slot,
                           void *data, void *extra)
{
    block narrow;
    FO_SIMD
    for (int j = 0; j < FO_BLOCK; j++)
        narrow.f[j] = format == FO_BF16_LOW16 ? (float)from->f[j] : to_odd(from->f[j]);
    encode(format, &narrow, random, slot, data, extra);
}

#endif
