// The vectors of the kernels in float32, as long as the processor's registers.
#pragma once

#include "call.h"

namespace {

#ifdef __AVX512F__
const int LANES = 16;
#elif defined(__AVX2__)
const int LANES = 8;
#else
const int LANES = 4;
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

// 2^x for x from -126 to 127.
inline vec exp2(vec x) {
    x = x < -126.f ? splat(-126.f) : x;  // NaN, if x is
    x = x > 127.f ? splat(127.f) : x;
    const vec whole = splat(12582912.f);  // 1.5 * 2^23: the last bits of x + whole are x as a whole number
    const vec shifted = x + whole;
    bits power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + (127u << 23);
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return power_of_fraction(x - (shifted - whole)) * scale;
}

inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline vec magnitude(vec x) { return x < 0.f ? -x : x; }
inline vec complement(vec x, vec y) { return x > 0.f ? 1.f - y : y; }  // 1 - y where x is positive
inline float sum(vec x) {
    float all = 0;
    for (int i = 0; i < LANES; i++) all += x[i];
    return all;
}

}  // namespace
