// What a Winograd convolution does beside its products: maps into tiles, sums into maps. Float32.
//
// Plain C interface: pointers and sizes, no Python and no torch headers.

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

struct Shape {
    long height, width, channels;   // of the map that is convolved
    long down, across;              // tiles of it
    template <int M> static Shape of(long height, long width, long channels) {
        return {height, width, channels, (height + M - 1) / M, (width + M - 1) / M};
    }
};

// Tiles first..last of all pictures, into [N*N] planes of [last - first][channels]. `in` is a map
// 1/scale as large, of which each position is read for scale x scale of them.
template <int M>
void spread(const float* in, float* planes, long plane, Shape s, long scale, long first,
            long last) {
    const int N = Tile<M>::N;
    alignas(64) static const float nothing[16] = {};
    long height = s.height / scale, width = s.width / scale;
#pragma omp parallel for schedule(static)
    for (long t = first; t < last; t++) {
        long image = t / (s.down * s.across);
        long top = t / s.across % s.down * M - 1, left = t % s.across * M - 1;
        const float* at[N * N];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                long y = top + i, x = left + j;
                bool inside = y >= 0 && x >= 0 && y < s.height && x < s.width;
                at[i * N + j] = inside ? in + ((image * height + y / scale) * width + x / scale)
                                                  * s.channels
                                       : nullptr;
            }
        float* to = planes + (t - first) * s.channels;
        for (long c = 0; c < s.channels; c += 16) {
            vec half[N * N];
            for (int j = 0; j < N; j++)
                Tile<M>::in(
                    [&](int i) {
                        const float* p = at[i * N + j];
                        return *(const vec*)(p ? p + c : nothing);
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
template <int M>
void gather(const float* const* sums, const float* bias, long bias_step, const float* plus,
            float* out, Shape s, long first, long last) {
    const int N = Tile<M>::N;
#pragma omp parallel for schedule(static)
    for (long t = first; t < last; t++) {
        long image = t / (s.down * s.across);
        long top = t / s.across % s.down * M, left = t % s.across * M;
        long row = (t - first) * s.channels;
        for (long c = 0; c < s.channels; c += 16) {
            vec half[M * N], add = {};
            if (bias) add = *(const vec*)(bias + image * bias_step + c);
            for (int j = 0; j < N; j++)
                Tile<M>::out([&](int i) { return *(const vec*)(sums[i * N + j] + row + c); },
                             [&](int i, vec v) { half[i * N + j] = v; });
            for (int i = 0; i < M && top + i < s.height; i++)
                Tile<M>::out([&](int j) { return half[i * N + j]; },
                             [&](int j, vec v) {
                                 if (left + j >= s.width) return;
                                 long to = ((image * s.height + top + i) * s.width + left + j)
                                               * s.channels + c;
                                 v += add;
                                 if (plus) v += *(const vec*)(plus + to);
                                 *(vec*)(out + to) = v;
                             });
        }
    }
}

}  // namespace

extern "C" {

// Maps are [pictures][height][width][channels], channels a multiple of 16; `plane` numbers lie
// between the planes of a place in the tile; side: of a tile's results, 2 or 4.
void safelight_spread(const float* in, float* planes, long plane, long height, long width,
                      long channels, long scale, long side, long first, long last) {
    if (side == 4)
        spread<4>(in, planes, plane, Shape::of<4>(height, width, channels), scale, first, last);
    else
        spread<2>(in, planes, plane, Shape::of<2>(height, width, channels), scale, first, last);
}

void safelight_gather(const float* const* sums, const float* bias, long bias_step,
                      const float* plus, float* out, long height, long width, long channels,
                      long side, long first, long last) {
    if (side == 4)
        gather<4>(sums, bias, bias_step, plus, out, Shape::of<4>(height, width, channels), first,
                  last);
    else
        gather<2>(sums, bias, bias_step, plus, out, Shape::of<2>(height, width, channels), first,
                  last);
}

}  // extern "C"
