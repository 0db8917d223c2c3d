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
KERNEL safelight_normalise(const Normalise* p) {
    const int64_t rows = p->images * p->positions, positions = p->positions, channels = p->channels;
    REQUIRE(sizes({p->images, positions, channels}) && channels % 16 == 0);
    if (!rows || !channels) return nullptr;
    REQUIRE(pointers(p->x, p->factors, p->out));
    const bf16* x = p->x;
    const float* factors = p->factors;
    bf16* out = p->out;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *factor = factors + r / positions * 2 * channels, *addend = factor + channels;
        for (int64_t c = 0; c < channels; c += 16) {
            vec v = fma(load(x + r * channels + c), floats(factor + c), floats(addend + c));
            store(out + r * channels + c, p->active ? silu(v) : v);
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
KERNEL safelight_layer_norm(const LayerNorm* p) {
    const int64_t rows = p->rows, channels = p->channels;
    REQUIRE(sizes({rows, channels}) && channels % 16 == 0);
    if (!rows || !channels) return nullptr;
    REQUIRE(pointers(p->x, p->factor, p->shift, p->out));
    REQUIRE(!p->plus || pointers(p->plus, p->total));
    const bf16 *x = p->x, *plus = p->plus;
    const float *factor = p->factor, *shift = p->shift, eps = p->eps;
    bf16 *total = p->total, *out = p->out;
#pragma omp parallel
    {
        float* row = (float*)scratch(channels * 4);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            vec all = splat(0), square = splat(0);
            for (int64_t c = 0; c < channels; c += 16) {
                vec v = load(x + r * channels + c);
                if (plus) {
                    bf16* to = total + r * channels + c;
                    store(to, v + load(plus + r * channels + c));
                    v = load(to);
                }
                store(row + c, v);
                all = all + v;
            }
            vec mean = splat(sum(all) / channels);
            for (int64_t c = 0; c < channels; c += 16) {
                vec v = floats(row + c) - mean;
                store(row + c, v);
                square = fma(v, v, square);
            }
            float var = sum(square) / channels;
            vec inverse = splat(1 / sqrtf(var + eps));
            for (int64_t c = 0; c < channels; c += 16)
                store(out + r * channels + c,
                      fma(floats(row + c) * inverse, floats(factor + c), floats(shift + c)));
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
KERNEL safelight_lay(const Lay* p) {
    const int64_t images = p->images, height = p->height, width = p->width, channels = p->channels;
    const int64_t first = p->first, plane = p->plane, wide = width + 2, tall = p->last - first + 2;
    REQUIRE(sizes({plane, images, height, width, channels, first}) && channels % 32 == 0);
    REQUIRE(first <= p->last && p->last <= height);
    REQUIRE(plane >= images * tall * wide * 32);
    if (!images || !channels) return nullptr;
    REQUIRE(pointers(p->out) && pointer_or_null(p->factors));
    REQUIRE(!height || !width || pointers(p->x));
    const bf16* x = p->x;
    const float* factors = p->factors;
    bf16* out = p->out;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < images * tall; r++) {
        int64_t i = r / tall, y = first + r % tall - 1;
        const bf16* from = x + (i * height + y) * width * channels;
        for (int64_t c = 0; c < channels; c += 32) {
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
                for (int64_t n = 0; n < width; n++, to += 32) {
                    const bf16* v = from + n * channels + c;
                    vec low = silu(fma(load(v), f0, a0));
                    vec high = silu(fma(load(v + 16), f1, a1));
                    store(to, low, high);
                }
            } else {
                for (int64_t n = 0; n < width; n++, to += 32)
                    memcpy(to, from + n * channels + c, 64);
            }
            memset(to, 0, 64);
        }
    }
    return nullptr;
}
