/* The table of storage formats, and the keys of stochastic rounding: what is the same in every
 * instruction set. */
#include "kernels.h"

enum { BLOCK_SHIFT = 6 };
_Static_assert(1 << BLOCK_SHIFT == FO_BLOCK, "one exponent for each block");

const fo_format_info fo_format_table[FO_FORMATS] = {
    [FO_F32] = {"float32", 4, 0, 0, 0},
    [FO_F64] = {"float64", 8, 0, 0, 0},
    [FO_BF16] = {"bfloat16", 2, 0, 0, 0},
    [FO_F16] = {"float16", 2, 0, 0, 0},
    [FO_BF16_STOCHASTIC] = {"bfloat16-stochastic", 2, 0, 0, 1},
    [FO_F16_STOCHASTIC] = {"float16-stochastic", 2, 0, 0, 1},
    [FO_BF16_LOW16] = {"bfloat16+int16", 2, 2, 0, 0},
    [FO_BF16_LOW8] = {"bfloat16+int8", 2, 1, 0, 0},
    [FO_S8] = {"int8", 1, 1, BLOCK_SHIFT, 1},
    [FO_U8] = {"uint8", 1, 1, BLOCK_SHIFT, 1},
};

const fo_format_info *fo_formats(void) { return fo_format_table; }

uint64_t fo_key(uint64_t seed, uint64_t leaf, uint64_t step)
{
    return fo_mix(fo_mix(fo_mix(seed) + leaf) + step);
}
