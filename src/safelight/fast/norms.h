// Norms and gates of numbers T, bfloat16 or float; a result is rounded to T once. Include a header of
// vectors before this: kernel.h, whose vectors have 16 numbers, or lanes.h.
#pragma once

namespace {

template <class V> inline V silu(V x) { return x / (exp2(x * splat(-LOG2E)) + splat(1.f)); }

// x·Phi(x), with erfc by Abramowitz and Stegun 7.1.26. With `fine` the error is 2e-7, else the 6e-5 of a
// fast reciprocal, which is below the precision of bfloat16.
template <bool fine, class V> inline V gelu(V x) {
    const V one = splat(1.f);
    V z = magnitude(x) * splat(0.70710678f);
    V t = fma(z, splat(0.3275911f), one);
    if constexpr (fine) t = one / t;
    else t = inverse(t);
    V y = polynomial(
        t, {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f});
    V fall = exp2(z * z * splat(-LOG2E));
    V tail = (y * t) * (fall * splat(0.5f));
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
    // A row has the sums and the sums of squares of all channels of all images. Each thread has one in
    // float64, and sums of PART positions in float32, as longer ones would lose digits.
    const int64_t threads = omp_get_max_threads(), row = images * 2 * channels, PART = 256;
    Memory memory;
    memory.need(threads * (row * 8 + 2 * channels * 4));
    double* sums = (double*)memory.at;
    float* parts = (float*)(sums + threads * row);
    memset(sums, 0, threads * row * 8);
#pragma omp parallel num_threads(threads)
    {
        int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
        float *first = parts + t * 2 * channels, *second = first + channels;
        for (int64_t i = 0; i < images; i++) {
            int64_t begin = positions * t / team, end = positions * (t + 1) / team;
            double* all = sums + t * row + i * 2 * channels;
            // A few positions at a time, so that they are still in the cache for the next channels.
            for (int64_t at = begin; at < end; at += 16) {
                int64_t last = at + 16 < end ? at + 16 : end;
                if ((at - begin) % PART == 0) memset(first, 0, 2 * channels * 4);
                for (int64_t c = 0; c < channels; c += LANES) {
                    vec s = floats(first + c), q = floats(second + c);
                    for (int64_t n = at; n < last; n++) {
                        vec v = load(p.x + (i * positions + n) * channels + c);
                        s = s + v;
                        q = fma(v, v, q);
                    }
                    store(first + c, s);
                    store(second + c, q);
                }
                if (last == end || (last - begin) % PART == 0)
                    for (int64_t c = 0; c < 2 * channels; c++) all[c] += first[c];
            }
        }
    }
    const int64_t size = channels / p.groups;
    for (int64_t i = 0; i < images; i++)
        for (int64_t g = 0; g < p.groups; g++) {
            double s = 0, q = 0;
            for (int64_t t = 0; t < threads; t++)
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    s += sums[t * row + i * 2 * channels + c];
                    q += sums[t * row + (i * 2 + 1) * channels + c];
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
#pragma omp parallel firstprivate(p)
    {
        float* row = (float*)scratch(p.channels * 4);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.rows; r++) {
            const int64_t at = r * p.channels;
            vec all = splat(0), square = splat(0);
            for (int64_t c = 0; c < p.channels; c += LANES) {
                vec v = load(p.x + at + c);
                if (p.plus) {
                    store(p.total + at + c, v + load(p.plus + at + c));
                    v = load(p.total + at + c);
                }
                store(row + c, v);
                all = all + v;
            }
            vec mean = splat(sum(all) / p.channels);
            for (int64_t c = 0; c < p.channels; c += LANES) {
                vec v = floats(row + c) - mean;
                store(row + c, v);
                square = fma(v, v, square);
            }
            vec inverse = splat(1 / sqrtf(sum(square) / p.channels + p.eps));
            for (int64_t c = 0; c < p.channels; c += LANES)
                store(p.out + at + c,
                      fma(floats(row + c) * inverse, floats(p.factor + c), floats(p.shift + c)));
        }
    }
    return nullptr;
}

}  // namespace
