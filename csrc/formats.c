/* The calls about storage formats, which are the same in every instruction set. */
#include "kernels.h"

const fo_format_info *fo_formats(void) { return fo_format_table; }

uint64_t fo_key(uint64_t seed, uint64_t leaf, uint64_t step)
{
    return fo_mix(fo_mix(fo_mix(seed) + leaf) + step);
}
