/* Counts the quotients that the kernels' two operations put on another side of a midpoint than the division does.
   quotient_check FIRST LAST ALONE: scales 1 + s * 2^-23 for FIRST <= s < LAST; with ALONE 1, x times the reciprocal
   alone, which is not good enough, stands in for the two operations. Compiled without contraction: each operation
   rounds once. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
#include <string.h>

enum { MIDPOINTS = 128, NEIGHBOURS = 2 };

static float moved(float x, int32_t away) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += away;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int side(float quotient, float midpoint) { return (quotient > midpoint) - (quotient < midpoint); }

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int64_t first = atoll(arguments[1]), last = atoll(arguments[2]), differing = 0;
    int alone = atoi(arguments[3]);
    for (int64_t s = first; s < last; s++) {
        float scale = 1.0f + (float)s * 0x1p-23f;
        float reciprocal = 1.0f / scale;
        float rest = alone ? 0.0f : fmaf(-reciprocal, scale, 1.0f) / scale;
        for (int32_t away = -NEIGHBOURS; away <= NEIGHBOURS; away++) {
            int32_t found = 0;
            for (int32_t half = 0; half < MIDPOINTS; half++) {
                float midpoint = (float)(2 * half + 1) * 0.5f;
                float x = moved(scale * midpoint, away);
                float fused = fmaf(x, reciprocal, x * rest);
                found += side(fused, midpoint) != side(x / scale, midpoint);
            }
            differing += found;
        }
    }
    printf("%lld %lld\n", (long long)(last - first) * MIDPOINTS * (2 * NEIGHBOURS + 1), (long long)differing);
    return 0;
}
