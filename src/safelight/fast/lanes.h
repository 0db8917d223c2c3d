// Vectors of LANES numbers in float32: 16, or with -DLANES=8 as many as a register of AVX2 has.
#pragma once

#include "call.h"

#ifndef LANES
#define LANES 16
#endif
#if LANES == 16 && defined(__AVX512F__)
#define AVX512
#include <immintrin.h>
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

inline vec splat(float x) { return x - vec{}; }
inline vec floats(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline vec load(const float* p) { return floats(p); }
inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }

// `larger` returns b if either is NaN; `inverse` is right to 6e-5 at least.
#ifdef AVX512
inline vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec magnitude(vec x) { return _mm512_abs_ps(x); }
inline float sum(vec x) { return _mm512_reduce_add_ps(x); }
inline vec inverse(vec x) { return _mm512_rcp14_ps(x); }
#else
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline vec magnitude(vec x) { return x < 0.f ? -x : x; }
inline float sum(vec x) {
    float all = 0;
    for (int i = 0; i < LANES; i++) all += x[i];
    return all;
}
inline vec inverse(vec x) { return 1.f / x; }
#endif

// 2^x.
inline vec exp2(vec x) {
    x = larger(splat(-126.f), x);  // NaN, if x is
#ifdef AVX512
    const vec whole = _mm512_roundscale_ps(x, 0);
    return _mm512_scalef_ps(power_of_fraction(x - whole), whole);
#else
    x = x > 127.f ? splat(127.f) : x;
    const vec whole = splat(12582912.f);  // 1.5 * 2^23: the last bits of x + whole are x as a whole number
    const vec shifted = x + whole;
    bits power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + (127u << 23);
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return power_of_fraction(x - (shifted - whole)) * scale;
#endif
}

inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline vec complement(vec x, vec y) { return x > 0.f ? 1.f - y : y; }  // 1 - y where x is positive

// sums [rows][row] = (or, with `add`, +=) a [rows][depth] · b [depth][regs * LANES]. While they are added
// up, the sums stay in the registers.
template <int rows, int regs>
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                     float* sums, int64_t row, bool add) {
    vec found[rows][regs];
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < regs; x++) found[r][x] = splat(0);
    for (int64_t k = 0; k < depth; k++, b += b_row) {
        vec columns[regs];
        for (int x = 0; x < regs; x++) columns[x] = floats(b + x * LANES);
        for (int r = 0; r < rows; r++) {
            const vec one = splat(a[r * a_row + k]);
            for (int x = 0; x < regs; x++) found[r][x] = found[r][x] + one * columns[x];
        }
    }
    // Added at the end, as a sum of sums rounds less than one long sum.
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < regs; x++) {
            float* to = sums + r * row + x * LANES;
            store(to, add ? floats(to) + found[r][x] : found[r][x]);
        }
}
