/* The calls about storage formats, which are the same in every instruction set. */
#include "kernels.h"

#define BASE(byte) (((byte) & 0xfeu) << 7) * 0x10001u
#define BASES4(byte) BASE(byte), BASE(byte + 1), BASE(byte + 2), BASE(byte + 3)
#define BASES16(byte) BASES4(byte), BASES4(byte + 4), BASES4(byte + 8), BASES4(byte + 12)
#define BASES64(byte) BASES16(byte), BASES16(byte + 16), BASES16(byte + 32), BASES16(byte + 48)

const fo_codec_constants fo_codec = {
    .base = {BASES64(0), BASES64(64), BASES64(128), BASES64(192)},
    .hash = {0x7feb352du, 0x846ca68bu},
    .slots = {0x144cbc89u, 1, 0x9e3779b9u, 0xe35e67b1u, 0x734297e9u}, /* powers: -1, 0, 1, ... */
    .size = 0x7fffffffu,
    .random20 = 0xfffffu,
    .random8 = 0xffu,
    .half = 0x8000u,
    .low_half = 0xffffu,
    .words_signed_code = 0x87f087f0u,
    .words_code = 0x7f007f00u,
    .bytes_sign = 0x80808080u,
    .words_one = 0x10001u,
};

const fo_format_info *fo_formats(void) { return fo_format_table; }

uint64_t fo_key(uint64_t seed, uint64_t leaf, uint64_t step)
{
    return fo_mix(fo_mix(fo_mix(seed) + leaf) + step);
}
