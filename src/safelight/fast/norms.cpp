// Norms, gates and the layout of maps in bfloat16. Sums are float32; results are rounded once.
//
// Plain C interface: pointers and sizes, no Python and no torch headers.

#include "kernel.h"

namespace {

inline vec silu(vec x) {
    vec e = exp2(x * splat(-LOG2E));
    return x / (e + splat(1.f));
}

}  // namespace

extern "C" {

// Of a group norm of a map [images, positions, channels]: each channel's factor and addend, as
// [images][2][channels]. scale, shift: [channels].
void safelight_moments(const bf16* in, const float* scale, const float* shift, float* factors,
                       long images, long positions, long channels, long groups, float eps) {
    long threads = omp_get_max_threads(), row = images * 2 * channels;
    float* sums = (float*)aligned_alloc(64, (threads * row * 4 + 63) / 64 * 64);
    memset(sums, 0, threads * row * 4);
#pragma omp parallel num_threads(threads)
    {
        long t = omp_get_thread_num(), team = omp_get_num_threads();
        for (long i = 0; i < images; i++) {
            float *first = sums + t * row + i * 2 * channels, *second = first + channels;
            long begin = positions * t / team, end = positions * (t + 1) / team;
            // A few positions at a time, so that their lines are still there for the next channels.
            for (long p = begin; p < end; p += 16) {
                long last = p + 16 < end ? p + 16 : end;
                for (long c = 0; c < channels; c += 16) {
                    vec s = floats(first + c), q = floats(second + c);
                    for (long n = p; n < last; n++) {
                        vec v = load(in + (i * positions + n) * channels + c);
                        s = s + v;
                        q = fma(v, v, q);
                    }
                    store(first + c, s);
                    store(second + c, q);
                }
            }
        }
    }
    long size = channels / groups;
    for (long i = 0; i < images; i++)
        for (long g = 0; g < groups; g++) {
            double s = 0, q = 0;
            for (long t = 0; t < threads; t++)
                for (long c = g * size; c < (g + 1) * size; c++) {
                    s += sums[t * row + i * 2 * channels + c];
                    q += sums[t * row + (i * 2 + 1) * channels + c];
                }
            double n = double(size) * positions, mean = s / n, var = q / n - mean * mean;
            double factor = 1 / sqrt((var > 0 ? var : 0) + eps);
            for (long c = g * size; c < (g + 1) * size; c++) {
                factors[i * 2 * channels + c] = float(factor * scale[c]);
                factors[(i * 2 + 1) * channels + c] = float(shift[c] - mean * factor * scale[c]);
            }
        }
    free(sums);
}

// in · factor + addend of a map [images, positions, channels].
void safelight_normalise(const bf16* in, const float* factors, bf16* out, long images,
                         long positions, long channels) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < images * positions; p++) {
        const float *factor = factors + p / positions * 2 * channels, *addend = factor + channels;
        for (long c = 0; c < channels; c += 16)
            store(out + p * channels + c,
                  fma(load(in + p * channels + c), floats(factor + c), floats(addend + c)));
    }
}

// Layer norm of rows of `channels`, a multiple of 16. With `plus`, of the sum of both, which goes
// to `total`.
void safelight_layer_norm(const bf16* in, const bf16* plus, bf16* total, const float* factor,
                          const float* shift, bf16* out, long rows, long channels, float eps) {
#pragma omp parallel
    {
        float* row = (float*)scratch(channels * 4);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            vec all = splat(0), square = splat(0);
            for (long c = 0; c < channels; c += 16) {
                vec v = load(in + r * channels + c);
                if (plus) {
                    bf16* to = total + r * channels + c;
                    store(to, v + load(plus + r * channels + c));
                    v = load(to);
                }
                store(row + c, v);
                all = all + v;
            }
            vec mean = splat(sum(all) / channels);
            for (long c = 0; c < channels; c += 16) {
                vec v = floats(row + c) - mean;
                store(row + c, v);
                square = fma(v, v, square);
            }
            float var = sum(square) / channels;
            vec inverse = splat(1 / sqrtf(var + eps));
            for (long c = 0; c < channels; c += 16)
                store(out + r * channels + c,
                      fma(floats(row + c) * inverse, floats(factor + c), floats(shift + c)));
        }
    }
}

// value · gelu(gate), of `count` numbers, a multiple of 16 of them.
void safelight_gate(const bf16* value, const bf16* gate, bf16* out, long count) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += 16)
        store(out + i, load(value + i) * gelu<false>(load(gate + i)));
}

// The rows first..last of a map [images, height, width, channels], as a convolution reads them: in
// planes [channels/32][images][rows][width + 2][32] that are `plane` numbers apart, with a border
// of zeros and a row more at both ends. With factors, normed by them and through SiLU.
void safelight_lay(const bf16* in, const float* factors, bf16* out, long plane, long images,
                   long height, long width, long channels, long first, long last) {
    long wide = width + 2, tall = last - first + 2;
#pragma omp parallel for schedule(static)
    for (long r = 0; r < images * tall; r++) {
        long i = r / tall, y = first + r % tall - 1;
        const bf16* from = in + (i * height + y) * width * channels;
        for (long c = 0; c < channels; c += 32) {
            bf16* to = out + c / 32 * plane + r * wide * 32;
            if (y < 0 || y >= height) {
                memset(to, 0, wide * 64);
                continue;
            }
            memset(to, 0, 64);
            to += 32;
            if (factors) {
                const float *factor = factors + i * 2 * channels + c, *addend = factor + channels;
                vec f0 = floats(factor), f1 = floats(factor + 16);
                vec a0 = floats(addend), a1 = floats(addend + 16);
                for (long x = 0; x < width; x++, to += 32) {
                    const bf16* v = from + x * channels + c;
                    vec low = silu(fma(load(v), f0, a0));
                    vec high = silu(fma(load(v + 16), f1, a1));
                    store(to, low, high);
                }
            } else {
                for (long x = 0; x < width; x++, to += 32)
                    memcpy(to, from + x * channels + c, 64);
            }
            memset(to, 0, 64);
        }
    }
}

}  // extern "C"
