// Norms, gates and the layout of maps in bfloat16. Sums are float32; results are rounded once.

#include "kernel.h"

namespace {

inline vec silu(vec x) {
    vec e = exp2(x * splat(-LOG2E));
    return x / (e + splat(1.f));
}

}  // namespace

// Of a group norm of a map [images, positions, channels]: each channel's factor and addend.
struct Moments {
    const bf16* x;
    const float *scale, *shift;  // [channels]
    float* factors;              // [images][2][channels]
    int64_t images, positions, channels, groups;
    float eps;
};
KERNEL safelight_moments(const Moments* p) {
    const int64_t images = p->images, positions = p->positions, channels = p->channels;
    REQUIRE(sizes({images, positions, channels, p->groups}) && channels % 16 == 0);
    REQUIRE(p->groups > 0 && channels % p->groups == 0);
    if (!images || !channels) return nullptr;
    REQUIRE(positions > 0);
    REQUIRE(pointers(p->x, p->scale, p->shift, p->factors));
    const bf16* x = p->x;
    const int64_t threads = omp_get_max_threads(), row = images * 2 * channels;
    Memory memory;
    memory.need(threads * row * 4);
    float* sums = (float*)memory.at;
    memset(sums, 0, threads * row * 4);
#pragma omp parallel num_threads(threads)
    {
        int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t i = 0; i < images; i++) {
            float *first = sums + t * row + i * 2 * channels, *second = first + channels;
            int64_t begin = positions * t / team, end = positions * (t + 1) / team;
            // A few positions at a time, so that their lines are still there for the next channels.
            for (int64_t at = begin; at < end; at += 16) {
                int64_t last = at + 16 < end ? at + 16 : end;
                for (int64_t c = 0; c < channels; c += 16) {
                    vec s = floats(first + c), q = floats(second + c);
                    for (int64_t n = at; n < last; n++) {
                        vec v = load(x + (i * positions + n) * channels + c);
                        s = s + v;
                        q = fma(v, v, q);
                    }
                    store(first + c, s);
                    store(second + c, q);
                }
            }
        }
    }
    const int64_t size = channels / p->groups;
    for (int64_t i = 0; i < images; i++)
        for (int64_t g = 0; g < p->groups; g++) {
            double s = 0, q = 0;
            for (int64_t t = 0; t < threads; t++)
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    s += sums[t * row + i * 2 * channels + c];
                    q += sums[t * row + (i * 2 + 1) * channels + c];
                }
            double n = double(size) * positions, mean = s / n, var = q / n - mean * mean;
            double factor = 1 / sqrt((var > 0 ? var : 0) + p->eps);
            for (int64_t c = g * size; c < (g + 1) * size; c++) {
                float* to = p->factors + i * 2 * channels + c;
                to[0] = float(factor * p->scale[c]);
                to[channels] = float(p->shift[c] - mean * factor * p->scale[c]);
            }
        }
    return nullptr;
}

// x · factor + addend of a map [images, positions, channels], through SiLU if `active` is not 0.
struct Normalise {
    const bf16* x;
    const float* factors;
    bf16* out;
    int64_t images, positions, channels, active;
};
KERNEL safelight_normalise(const Normalise* given) {
    const Normalise p = *given;
    REQUIRE(sizes({p.images, p.positions, p.channels}) && p.channels % 16 == 0);
    const int64_t rows = p.images * p.positions;
    if (!rows || !p.channels) return nullptr;
    REQUIRE(pointers(p.x, p.factors, p.out));
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t r = 0; r < rows; r++) {
        const float* factor = p.factors + r / p.positions * 2 * p.channels;
        for (int64_t c = 0, at = r * p.channels; c < p.channels; c += 16, at += 16) {
            vec v = fma(load(p.x + at), floats(factor + c), floats(factor + p.channels + c));
            store(p.out + at, p.active ? silu(v) : v);
        }
    }
    return nullptr;
}

// Layer norm of rows of `channels`, a multiple of 16. With `plus`, of the sum of both, which goes
// to `total`.
struct LayerNorm {
    const bf16 *x, *plus;
    bf16* total;
    const float *factor, *shift;
    bf16* out;
    int64_t rows, channels;
    float eps;
};
KERNEL safelight_layer_norm(const LayerNorm* given) {
    const LayerNorm p = *given;
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
            for (int64_t c = 0; c < p.channels; c += 16) {
                vec v = load(p.x + at + c);
                if (p.plus) {
                    store(p.total + at + c, v + load(p.plus + at + c));
                    v = load(p.total + at + c);
                }
                store(row + c, v);
                all = all + v;
            }
            vec mean = splat(sum(all) / p.channels);
            for (int64_t c = 0; c < p.channels; c += 16) {
                vec v = floats(row + c) - mean;
                store(row + c, v);
                square = fma(v, v, square);
            }
            vec inverse = splat(1 / sqrtf(sum(square) / p.channels + p.eps));
            for (int64_t c = 0; c < p.channels; c += 16)
                store(p.out + at + c,
                      fma(floats(row + c) * inverse, floats(p.factor + c), floats(p.shift + c)));
        }
    }
    return nullptr;
}

KERNEL safelight_gate(const Gate<bf16>* p) { return gate<false>(*p); }

// The rows first..last of a map [images, height, width, channels], as a convolution reads them: in
// planes [channels/32][images][rows][width + 2][32] that are `plane` numbers apart, with a border
// of zeros and a row more at both ends. With factors, normed by them and through SiLU.
struct Lay {
    const bf16* x;
    const float* factors;  // or null
    bf16* out;
    int64_t plane, images, height, width, channels, first, last;
};
KERNEL safelight_lay(const Lay* given) {
    const Lay p = *given;
    const int64_t wide = p.width + 2, tall = p.last - p.first + 2;
    REQUIRE(sizes({p.plane, p.images, p.height, p.width, p.channels, p.first}));
    REQUIRE(p.channels % 32 == 0 && p.first <= p.last && p.last <= p.height);
    REQUIRE(p.plane >= p.images * tall * wide * 32);
    if (!p.images || !p.channels) return nullptr;
    REQUIRE(pointers(p.out) && pointer_or_null(p.factors));
    REQUIRE(!p.height || !p.width || pointers(p.x));
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t r = 0; r < p.images * tall; r++) {
        int64_t i = r / tall, y = p.first + r % tall - 1;
        for (int64_t c = 0; c < p.channels; c += 32) {
            const bf16* from = p.x + (i * p.height + y) * p.width * p.channels;
            bf16* to = p.out + c / 32 * p.plane + r * wide * 32;
            const bool beyond = y < 0 || y >= p.height;
            memset(to, 0, beyond ? wide * 64 : 64);
            if (beyond) continue;
            to += 32;
            if (p.factors) {
                const float* factor = p.factors + i * 2 * p.channels + c;
                const float* addend = factor + p.channels;
                vec f0 = floats(factor), f1 = floats(factor + 16);
                vec a0 = floats(addend), a1 = floats(addend + 16);
                for (int64_t n = 0; n < p.width; n++, to += 32, from += p.channels)
                    store(to, silu(fma(load(from + c), f0, a0)), silu(fma(load(from + c + 16), f1, a1)));
            } else {
                for (int64_t n = 0; n < p.width; n++, to += 32, from += p.channels)
                    memcpy(to, from + c, 64);
            }
            memset(to, 0, 64);
        }
    }
    return nullptr;
}
