/* Tests that divide.inc rounds as a division does where that is hard. A product with the reciprocal
 * can be wrong only next to the middle between two floats, and for each divisor only a few
 * dividends have a quotient there. The test solves for them, for every divisor in float and for a
 * sample in double.
 *
 *     divide [divisors of double] [one in how many float divisors] */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FO_INLINE static inline
#define REAL float
#define FO_FMA fmaf
#define FO_TYPED(name) name##_f32
#include "divide.inc"
#undef REAL
#undef FO_FMA
#undef FO_TYPED
#define REAL double
#define FO_FMA fma
#define FO_TYPED(name) name##_f64
#include "divide.inc"

typedef __int128 wide; /* holds products */

static int is_right_f32(int64_t a, int64_t b)
{
    const float x = (float)a * 0x1p-23f, by = (float)b * 0x1p-23f;
    return divide_f32(x, by) == x / by;
}

static int is_right_f64(int64_t a, int64_t b)
{
    const double x = (double)a * 0x1p-52, by = (double)b * 0x1p-52;
    return divide_f64(x, by) == x / by;
}

/* Counts wrong quotients of zeros, infinities, NaN, and the ends of the range of a square root. */
static long count_wrong_ends(void)
{
    static const float ends[] = {0, -0.0f, 0x1p-75f, 0x1.fffffep-75f, 0x1.fffffep63f, INFINITY};
    static const double wide_ends[] = {0, -0.0, 0x1p-537, 0x1.fffffffffffffp511, INFINITY};
    static const double divisors[] = {1, 1e-8, 0.1, 0.99999, 0x1.fffffep-1, 0x1.fffffffffffffp-1};
    long wrong = 0;
    for (size_t j = 0; j < sizeof divisors / sizeof *divisors; j++) {
        const float by = (float)divisors[j];
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
            const float ours = divide_f32(ends[i], by), theirs = ends[i] / by;
            wrong += memcmp(&ours, &theirs, sizeof ours) != 0;
        }
        for (size_t i = 0; i < sizeof wide_ends / sizeof *wide_ends; i++) {
            const double ours = divide_f64(wide_ends[i], divisors[j]);
            const double theirs = wide_ends[i] / divisors[j];
            wrong += memcmp(&ours, &theirs, sizeof ours) != 0;
        }
        wrong += !isnan(divide_f32(NAN, by)) || !isnan(divide_f64(NAN, by));
    }
    return wrong;
}

/* Tries the dividends a for which a / b, both integers of `bits` bits, is next to a middle; returns
 * how many were wrong. A middle is t / 2^shift, t odd and of bits + 1 bits, and the distance from
 * it k = a * 2^shift - b * t: beyond |k| = 3 the roundings before the last cannot reach the middle.
 * For a given k, t is -k / b modulo 2^shift. */
static long count_wrong(int bits, int64_t b, int (*is_right)(int64_t, int64_t), long *tried)
{
    const int twos = __builtin_ctzll((unsigned long long)b);
    const uint64_t odd = (uint64_t)b >> twos;
    const int64_t low = (int64_t)1 << (bits - 1), high = 2 * low;
    uint64_t inverse = odd; /* of odd, modulo 2^64, by Newton */
    long wrong = 0;
    for (int i = 0; i < 6; i++)
        inverse *= 2 - odd * inverse;
    for (int shift = bits; shift <= bits + 1; shift++) /* quotients above and below 1 */
        for (int64_t k = -4; k <= 4; k++) {
            const int64_t unit = (int64_t)1 << twos, period = (int64_t)1 << (shift - twos);
            if (k == 0 || k % unit != 0)
                continue;
            const uint64_t first = (uint64_t)(-k / unit) * inverse & (uint64_t)(period - 1);
            for (int64_t t = (int64_t)first; t < 2 * high; t += period) {
                const wide product = (wide)b * t + k;
                const int64_t a = (int64_t)(product >> shift);
                if (t < high || t % 2 == 0 || (wide)a << shift != product || a < low || a >= high)
                    continue;
                (*tried)++;
                wrong += !is_right(a, b);
            }
        }
    return wrong;
}

int main(int count, char **arguments)
{
    const int64_t sample = count > 1 ? atol(arguments[1]) : 3000000;
    const int64_t stride = count > 2 ? atol(arguments[2]) : 1;
    long tried = 0, wrong = count_wrong_ends();
    for (int64_t b = (int64_t)1 << 23; b < (int64_t)1 << 24; b += stride)
        wrong += count_wrong(24, b, is_right_f32, &tried);
    for (int64_t i = 0; i < sample; i++) {
        const int64_t random = (int64_t)(fo_mix((uint64_t)i) >> 12);
        wrong += count_wrong(53, random | (int64_t)1 << 52 | 1, is_right_f64, &tried);
    }
    fprintf(stderr, "divide: %ld quotients next to a middle, %ld wrong\n", tried, wrong);
    return wrong != 0;
}
