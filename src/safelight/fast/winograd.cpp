// What a Winograd convolution does beside its products: maps into tiles, sums into maps. Float32.

#include "call.h"

namespace {

// Sixteen channels at once; the compiler makes them the registers that there are.
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));

// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section
// 4: a tile of N = M + 2 positions a side gives M x M results. Points are 0, 1, -1, and for
// M = 4 also 2 and -2.
template <int M> struct Tile;

template <> struct Tile<2> {
    static const int N = 4;
    template <class Read, class Write> static inline void in(Read d, Write v) {
        v(0, d(0) - d(2));
        v(1, d(1) + d(2));
        v(2, d(2) - d(1));
        v(3, d(1) - d(3));
    }
    template <class Read, class Write> static inline void out(Read m, Write y) {
        y(0, m(0) + m(1) + m(2));
        y(1, m(1) - m(2) - m(3));
    }
};

template <> struct Tile<4> {
    static const int N = 6;
    template <class Read, class Write> static inline void in(Read d, Write v) {
        vec far = d(4) - 4 * d(2), near = d(4) - d(2);
        vec odd = d(3) - 4 * d(1), twice = 2 * (d(3) - d(1));
        v(0, 4 * d(0) - 5 * d(2) + d(4));
        v(1, far + odd);
        v(2, far - odd);
        v(3, near + twice);
        v(4, near - twice);
        v(5, 4 * d(1) - 5 * d(3) + d(5));
    }
    template <class Read, class Write> static inline void out(Read m, Write y) {
        vec even = m(1) + m(2), odd = m(1) - m(2), far = m(3) + m(4), apart = m(3) - m(4);
        y(0, m(0) + even + far);
        y(1, odd + 2 * apart);
        y(2, even + 4 * far);
        y(3, odd + 8 * apart + m(5));
    }
};

// Maps are [pictures][height][width][channels], channels a multiple of 16; `plane` numbers lie
// between the planes of a place in the tile; side: of a tile's results, 2 or 4.
struct Spread {
    const float* x;
    float* planes;
    int64_t plane, height, width, channels, scale, side, first, last;
};

// Tiles first..last of all pictures, into [N*N] planes of [last - first][channels]. `x` is a map
// 1/scale as large, of which each position is read for scale x scale of them.
template <int M> void spread(const Spread p) {
    const int N = Tile<M>::N;
    alignas(64) static const float nothing[16] = {};
    const int64_t height = p.height / p.scale, width = p.width / p.scale, plane = p.plane;
    const int64_t down = (p.height + M - 1) / M, across = (p.width + M - 1) / M;
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t t = p.first; t < p.last; t++) {
        int64_t image = t / (down * across);
        int64_t top = t / across % down * M - 1, left = t % across * M - 1;
        const float* at[N * N];
        for (int i = 0; i < N * N; i++) {
            int64_t y = top + i / N, x = left + i % N;
            bool inside = y >= 0 && x >= 0 && y < p.height && x < p.width;
            at[i] = nullptr;
            if (inside)
                at[i] = p.x + ((image * height + y / p.scale) * width + x / p.scale) * p.channels;
        }
        float* to = p.planes + (t - p.first) * p.channels;
        for (int64_t c = 0; c < p.channels; c += 16) {
            vec half[N * N];
            for (int j = 0; j < N; j++)
                Tile<M>::in(
                    [&](int i) {
                        const float* from = at[i * N + j];
                        return *(const vec*)(from ? from + c : nothing);
                    },
                    [&](int i, vec v) { half[i * N + j] = v; });
            for (int i = 0; i < N; i++)
                Tile<M>::in([&](int j) { return half[i * N + j]; },
                            [&](int j, vec v) { *(vec*)(to + (i * N + j) * plane + c) = v; });
        }
    }
}

// The products' sums, [N*N] of [last - first][channels], into the map; bias [channels] or, where
// bias_step is not 0, [pictures][channels], and `plus` are added to it.
struct Gather {
    const float* const* sums;  // one for each place in the tile
    const float *bias, *plus;
    float* out;
    int64_t bias_step, height, width, channels, side, first, last;
};
template <int M> void gather(const Gather p) {
    const int N = Tile<M>::N;
    const float *const *sums = p.sums, *plus = p.plus;
    float* const out = p.out;
    const int64_t width = p.width, channels = p.channels;
    const int64_t down = (p.height + M - 1) / M, across = (width + M - 1) / M;
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t t = p.first; t < p.last; t++) {
        int64_t image = t / (down * across), row = (t - p.first) * channels;
        int64_t top = t / across % down * M, left = t % across * M;
        for (int64_t c = 0; c < channels; c += 16) {
            vec half[M * N], add = {};
            if (p.bias) add = *(const vec*)(p.bias + image * p.bias_step + c);
            for (int j = 0; j < N; j++)
                Tile<M>::out([&](int i) { return *(const vec*)(sums[i * N + j] + row + c); },
                             [&](int i, vec v) { half[i * N + j] = v; });
            for (int i = 0; i < M && top + i < p.height; i++)
                Tile<M>::out([&](int j) { return half[i * N + j]; },
                             [&](int j, vec v) {
                                 if (left + j >= width) return;
                                 int64_t place = (image * p.height + top + i) * width + left + j;
                                 int64_t to = place * channels + c;
                                 v += add;
                                 if (plus) v += *(const vec*)(plus + to);
                                 *(vec*)(out + to) = v;
                             });
        }
    }
}

}  // namespace

KERNEL safelight_spread(const Spread* p) {
    REQUIRE(sizes({p->plane, p->height, p->width, p->channels, p->first, p->last}));
    REQUIRE(p->channels % 16 == 0 && (p->side == 2 || p->side == 4) && p->scale >= 1);
    REQUIRE(p->height % p->scale == 0 && p->width % p->scale == 0 && p->first <= p->last);
    REQUIRE(p->plane >= (p->last - p->first) * p->channels);
    if (p->first == p->last || !p->channels) return nullptr;
    REQUIRE(p->height && p->width && pointers(p->x, p->planes));
    (p->side == 4 ? spread<4> : spread<2>)(*p);
    return nullptr;
}

KERNEL safelight_gather(const Gather* p) {
    REQUIRE(sizes({p->bias_step, p->height, p->width, p->channels, p->first, p->last}));
    REQUIRE(p->channels % 16 == 0 && (p->side == 2 || p->side == 4) && p->first <= p->last);
    if (p->first == p->last || !p->channels) return nullptr;
    REQUIRE(p->height && p->width && pointers(p->sums, p->out));
    for (int i = 0; i < (p->side + 2) * (p->side + 2); i++) REQUIRE(pointers(p->sums[i]));
    REQUIRE(pointer_or_null(p->bias) && pointer_or_null(p->plus));
    (p->side == 4 ? gather<4> : gather<2>)(*p);
    return nullptr;
}
