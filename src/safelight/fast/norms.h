// Norms and gates of numbers T, bfloat16 or float; a result is rounded to T once. For bfloat16, include
// kernel.h before this.
#pragma once

#include "lanes.h"

inline vec silu(vec x) { return x / (exp2(x * splat(-LOG2E)) + splat(1.f)); }

// x·Phi(x), with erfc by Abramowitz and Stegun 7.1.26. With `fine` the error is 2e-7, else the 6e-5 of a
// fast reciprocal, which is below the precision of bfloat16.
template <bool fine> inline vec gelu(vec x) {
    const vec one = splat(1.f);
    vec z = magnitude(x) * splat(0.70710678f);
    vec t = fma(z, splat(0.3275911f), one);
    t = fine ? one / t : inverse(t);
    vec y = polynomial(
        t, {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f});
    vec fall = exp2(z * z * splat(-LOG2E));
    vec tail = (y * t) * (fall * splat(0.5f));
    return x * complement(x, tail);
}

// value · gelu(gate), of `count` numbers, a multiple of 16 of them.
template <class T> struct Gate {
    const T *value, *gate;
    T* out;
    int64_t count;
};
template <class T> const char* gate(const Gate<T>& p) {
    REQUIRE(sizes({p.count}) && p.count % 16 == 0);
    REQUIRE(!p.count || pointers(p.value, p.gate, p.out));
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < p.count; i += LANES)
        store(p.out + i, load(p.value + i) * gelu<sizeof(T) == 4>(load(p.gate + i)));
    return nullptr;
}

// Computes each channel's factor and addend in the group norm of a map [images, positions, channels].
template <class T> struct Moments {
    const T* x;
    const float *scale, *shift;  // [channels]
    float* factors;              // [images][2][channels]
    int64_t images, positions, channels, groups;
    float eps;
};
template <class T> const char* moments(const Moments<T>& p) {
    const int64_t images = p.images, positions = p.positions, channels = p.channels;
    REQUIRE(sizes({images, positions, channels, p.groups}) && channels % 16 == 0);
    REQUIRE(p.groups > 0 && channels % p.groups == 0);
    if (!images || !channels) return nullptr;
    REQUIRE(positions > 0);
    REQUIRE(pointers(p.x, p.scale, p.shift, p.factors));
    // Sums and sums of squares of PART positions are float32, as longer ones would lose digits.
    const int64_t PART = 256, parts = (positions + PART - 1) / PART, row = 2 * channels;
    Memory memory;
    if (!memory.need(images * parts * row * 4)) return "memory";
    float* const sums = (float*)memory.at;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < images * parts; n++) {
        float *first = sums + n * row, *second = first + channels;
        const int64_t begin = n % parts * PART, end = begin + PART < positions ? begin + PART : positions;
        memset(first, 0, row * 4);
        // A few positions at a time, so that they are still in the cache for the next channels.
        for (int64_t at = begin; at < end; at += 16)
            for (int64_t c = 0; c < channels; c += LANES) {
                vec s = floats(first + c), q = floats(second + c);
                for (int64_t m = at; m < at + 16 && m < end; m++) {
                    vec v = load(p.x + (n / parts * positions + m) * channels + c);
                    s = s + v;
                    q = fma(v, v, q);
                }
                store(first + c, s);
                store(second + c, q);
            }
    }
    const int64_t size = channels / p.groups;
    for (int64_t i = 0; i < images; i++)
        for (int64_t g = 0; g < p.groups; g++) {
            double s = 0, q = 0;
            for (int64_t n = i * parts; n < (i + 1) * parts; n++)
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    s += sums[n * row + c];
                    q += sums[n * row + channels + c];
                }
            double n = double(size) * positions, mean = s / n, var = q / n - mean * mean;
            double factor = 1 / sqrt((var > 0 ? var : 0) + p.eps);
            for (int64_t c = g * size; c < (g + 1) * size; c++) {
                float* to = p.factors + i * 2 * channels + c;
                to[0] = float(factor * p.scale[c]);
                to[channels] = float(p.shift[c] - mean * factor * p.scale[c]);
            }
        }
    return nullptr;
}

// x · factor + addend of a map [images, positions, channels], with SiLU if `active` is not 0.
template <class T> struct Normalise {
    const T* x;
    const float* factors;
    T* out;
    int64_t images, positions, channels, active;
};
template <class T> const char* normalise(const Normalise<T>& given) {
    const Normalise<T> p = given;
    REQUIRE(sizes({p.images, p.positions, p.channels}) && p.channels % 16 == 0);
    const int64_t rows = p.images * p.positions;
    if (!rows || !p.channels) return nullptr;
    REQUIRE(pointers(p.x, p.factors, p.out));
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t r = 0; r < rows; r++) {
        const float* factor = p.factors + r / p.positions * 2 * p.channels;
        for (int64_t c = 0, at = r * p.channels; c < p.channels; c += LANES, at += LANES) {
            vec v = fma(load(p.x + at), floats(factor + c), floats(factor + p.channels + c));
            store(p.out + at, p.active ? silu(v) : v);
        }
    }
    return nullptr;
}

// Layer norm of rows of `channels`, a multiple of 16. With `plus`, that of x + plus, which goes to
// `total`.
template <class T> struct LayerNorm {
    const T *x, *plus;
    T* total;
    const float *factor, *shift;
    T* out;
    int64_t rows, channels;
    float eps;
};
template <class T> const char* layer_norm(const LayerNorm<T>& given) {
    const LayerNorm<T> p = given;
    REQUIRE(sizes({p.rows, p.channels}) && p.channels % 16 == 0);
    if (!p.rows || !p.channels) return nullptr;
    REQUIRE(pointers(p.x, p.factor, p.shift, p.out) && (!p.plus || pointers(p.plus, p.total)));
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t r = 0; r < p.rows; r++) {
        const int64_t at = r * p.channels;
        const T* row = p.x + at;
        vec all = splat(0), square = splat(0);
        for (int64_t c = 0; p.plus && c < p.channels; c += LANES)
            store(p.total + at + c, load(row + c) + load(p.plus + at + c));
        if (p.plus) row = p.total + at;
        for (int64_t c = 0; c < p.channels; c += LANES) all = all + load(row + c);
        const vec mean = splat(sum(all) / p.channels);
        for (int64_t c = 0; c < p.channels; c += LANES) {
            vec v = load(row + c) - mean;
            square = fma(v, v, square);
        }
        const vec by = splat(1 / sqrtf(sum(square) / p.channels + p.eps));
        for (int64_t c = 0; c < p.channels; c += LANES)
            store(p.out + at + c, fma((load(row + c) - mean) * by, floats(p.factor + c), floats(p.shift + c)));
    }
    return nullptr;
}
