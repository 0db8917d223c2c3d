// 3×3 convolutions with padding 1 by Winograd's algorithm (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", arXiv:1509.09308, section 4). A tile of SIDE + 2 positions a side
// gives SIDE × SIDE results. A thread takes some tiles from the map to the results, DEPTH channels at a
// time, so that what it multiplies stays in its cache. Weights are stored untransformed: transforming those
// of a part takes a fraction of the time of its products, and transformed ones take four times the memory.
#pragma once

#include "lanes.h"

const int64_t PANEL = 32;  // columns of weights that are stored together
const int64_t TILES = 36;  // the most tiles that a thread takes at once
const int64_t DEPTH = 64;  // channels of the map that a thread takes at once
const int MANY = LANES == 16 ? 12 : 6, REST = 4;  // tiles whose sums, two vectors wide, fit into the registers

// Maps are [images][height][width][channels], channels a multiple of 16. With scale 2, each position of x is
// read as 2 × 2 positions, and `rows`, `height` and `width` count those. `above`: whether x includes the
// padding rows above and below, which else are zero.
template <class T> struct Winograd {
    const T* x;
    const T* weights;   // [channels / PANEL, rounded up][inner][9 taps][PANEL]
    const float* bias;  // [channels] or, where bias_step is not 0, [images][channels]; or null
    const T* plus;      // added, or null
    T* out;
    int64_t bias_step, images, rows, height, width, inner, channels, side, scale, above, relu;
};

// The transforms of a row of a tile (in), of three taps (taps) and of a row of sums (out). The points are
// 0, 1, -1, and for four results also 2 and -2. In a map with scale 2, d(1) is d(2) and d(3) is d(4), so
// v(2) of `in` is zero.
template <int SIDE> struct Transform;
template <> struct Transform<2> {
    template <class Read, class Write> static inline void in(Read d, Write v) {
        v(0, d(0) - d(2));
        v(1, d(1) + d(2));
        v(2, d(2) - d(1));
        v(3, d(1) - d(3));
    }
    template <class Read, class Write> static inline void taps(Read g, Write v) {
        const vec even = .5f * (g(0) + g(2)), odd = .5f * g(1);
        v(0, g(0));
        v(1, even + odd);
        v(2, even - odd);
        v(3, g(2));
    }
    template <class Read, class Write> static inline void out(Read m, Write y) {
        y(0, m(0) + m(1) + m(2));
        y(1, m(1) - m(2) - m(3));
    }
};
template <> struct Transform<4> {
    template <class Read, class Write> static inline void in(Read d, Write v) {
        const vec far = d(4) - 4 * d(2), near = d(4) - d(2);
        const vec odd = d(3) - 4 * d(1), twice = 2 * (d(3) - d(1));
        v(0, 4 * d(0) - 5 * d(2) + d(4));
        v(1, far + odd);
        v(2, far - odd);
        v(3, near + twice);
        v(4, near - twice);
        v(5, 4 * d(1) - 5 * d(3) + d(5));
    }
    template <class Read, class Write> static inline void taps(Read g, Write v) {
        const vec near = g(0) + g(2), far = g(0) * (1 / 24.f) + g(2) * (1 / 6.f), odd = g(1) * (1 / 12.f);
        v(0, .25f * g(0));
        v(1, (near + g(1)) * (-1 / 6.f));
        v(2, (near - g(1)) * (-1 / 6.f));
        v(3, far + odd);
        v(4, far - odd);
        v(5, g(2));
    }
    template <class Read, class Write> static inline void out(Read m, Write y) {
        const vec even = m(1) + m(2), odd = m(1) - m(2), far = m(3) + m(4), apart = m(3) - m(4);
        y(0, m(0) + even + far);
        y(1, odd + 2 * apart);
        y(2, even + 4 * far);
        y(3, odd + 8 * apart + m(5));
    }
};

// Convolves some tiles of a map by the panels n0..n1 of the weights, in a thread's scratch memory.
template <int SIDE, class T> struct Block {
    static const int N = SIDE + 2, PLACES = N * N;
    // One cache line more, so that places do not share sets of the cache.
    static const int64_t LAID = TILES * DEPTH + 16, TAPS = DEPTH * PANEL + 16, SUMS = TILES * PANEL;
    const Winograd<T>& p;
    const int64_t n0, n1;
    const int64_t across, each;  // tiles across an image, and of an image
    float *const laid, *const taps, *const sums;

    Block(const Winograd<T>& p, int64_t n0, int64_t n1)
        : p(p), n0(n0), n1(n1), across((p.width + SIDE - 1) / SIDE),
          each((p.height + SIDE - 1) / SIDE * across),
          laid((float*)scratch(PLACES * (LAID + TAPS + (n1 - n0) * SUMS) * 4)),
          taps(laid + PLACES * LAID), sums(taps + PLACES * TAPS) {}

    // Whether a place is multiplied; with scale 2 the others are zero.
    bool kept(int64_t place) const { return p.scale == 1 || (place / N != 2 && place % N != 2); }

    // Transforms the positions of a tile, `depth` channels from k on, into [PLACES][TILES][DEPTH].
    void lay(int64_t tile, int64_t k, int64_t depth, float* to) const {
        alignas(64) static const T nothing[16] = {};
        const int64_t image = tile / each, tall = p.rows / p.scale, wide = p.width / p.scale;
        const int64_t top = tile % each / across * SIDE - !p.above, left = tile % across * SIDE - 1;
        const T* at[PLACES];
        for (int i = 0; i < PLACES; i++) {
            const int64_t y = top + i / N, x = left + i % N;
            const bool inside = y >= 0 && x >= 0 && y < p.rows && x < p.width;
            at[i] = inside ? p.x + ((image * tall + y / p.scale) * wide + x / p.scale) * p.inner + k : nullptr;
        }
        for (int64_t c = 0; c < depth; c += LANES) {
            vec half[PLACES];
            for (int j = 0; j < N; j++)
                Transform<SIDE>::in(
                    [&](int i) { return load(at[i * N + j] ? at[i * N + j] + c : nothing); },
                    [&](int i, vec v) { half[i * N + j] = v; });
            for (int i = 0; i < N; i++)
                Transform<SIDE>::in([&](int j) { return half[i * N + j]; },
                                    [&](int j, vec v) { store(to + (i * N + j) * LAID + c, v); });
        }
    }

    const T* weights(int64_t n, int64_t k) const { return p.weights + (n * p.inner + k) * 9 * PANEL; }

    // Transforms the weights of a panel, of `depth` channels, into [PLACES][DEPTH][PANEL].
    void weigh(const T* w, int64_t depth) const {
        for (float *to = taps, *end = to + depth * PANEL; to < end; to += PANEL, w += 9 * PANEL)
            for (int64_t c = 0; c < PANEL; c += LANES) {
                vec half[3 * N];
                for (int j = 0; j < 3; j++)
                    Transform<SIDE>::taps([&](int i) { return load(w + (3 * i + j) * PANEL + c); },
                                          [&](int i, vec v) { half[3 * i + j] = v; });
                for (int i = 0; i < N; i++)
                    Transform<SIDE>::taps([&](int j) { return half[3 * i + j]; },
                                          [&](int j, vec v) { store(to + (i * N + j) * TAPS + c, v); });
            }
    }

    // Writes the products of `count` tiles to sums [PLACES][TILES][PANEL], or adds them with `add`.
    // next: the weights that are read after these; they are fetched meanwhile.
    void products(int64_t count, int64_t depth, float* sums, bool add, const T* next) const {
        const char* const line = (const char*)next;
        for (int64_t i = 0, fetched = 0; i < PLACES; i++) {
            const int64_t until = (i + 1) * 9 * depth * PANEL * sizeof(T) / PLACES;
            for (; fetched < until; fetched += 64) __builtin_prefetch(line + fetched, 0, 2);
            if (!kept(i)) continue;
            for (int64_t t = 0; t < count;) {
                const float *from = laid + i * LAID + t * DEPTH, *w = taps + i * TAPS;
                float* to = sums + (i * TILES + t) * PANEL;
                // MANY - 1 tiles are multiplied with one of zeros, as REST twice would go beyond TILES.
                const bool many = count - t >= MANY - 1;
                for (int64_t c = 0; c < PANEL; c += 2 * LANES)
                    if (many) multiply<MANY, 2>(from, DEPTH, w + c, PANEL, depth, to + c, PANEL, add);
                    else multiply<REST, 2>(from, DEPTH, w + c, PANEL, depth, to + c, PANEL, add);
                t += many ? MANY : REST;
            }
        }
    }

    // Transforms the sums of a tile and writes its results, `wide` channels from c on.
    void write(int64_t tile, const float* from, int64_t c, int64_t wide) const {
        const int64_t image = tile / each;
        const int64_t top = tile % each / across * SIDE, left = tile % across * SIDE;
        for (const int64_t end = c + wide; c < end; c += LANES, from += LANES) {
            const vec add = p.bias ? floats(p.bias + image * p.bias_step + c) : splat(0);
            vec half[SIDE * N];
            for (int j = 0; j < N; j++)
                Transform<SIDE>::out(
                    [&](int i) { return floats(from + (i * N + j) * SUMS); },
                    [&](int i, vec v) { half[i * N + j] = v; });
            for (int i = 0; i < SIDE && top + i < p.height; i++)
                Transform<SIDE>::out(
                    [&](int j) { return half[i * N + j]; },
                    [&](int j, vec v) {
                        if (left + j >= p.width) return;
                        const int64_t y = image * p.height + top + i;
                        const int64_t to = (y * p.width + left + j) * p.channels + c;
                        v = v + add;
                        if (p.plus) v = v + load(p.plus + to);
                        if (p.relu) v = v < 0.f ? splat(0) : v;  // NaN stays
                        store(p.out + to, v);
                    });
        }
    }

    // Convolves `count` tiles from the first on.
    void convolve(int64_t first, int64_t count) const {
        for (int64_t k = 0; k < p.inner; k += DEPTH) {
            const int64_t depth = p.inner - k < DEPTH ? p.inner - k : DEPTH;
            for (int64_t t = 0; t < count; t++) lay(first + t, k, depth, laid + t * DEPTH);
            for (int64_t t = count; t % REST; t++)
                for (int i = 0; i < PLACES; i++) memset(laid + i * LAID + t * DEPTH, 0, DEPTH * 4);
            for (int64_t n = n0; n < n1; n++) {
                weigh(weights(n, k), depth);
                const T* next = n + 1 < n1 ? weights(n + 1, k) : weights(n0, k + depth);
                products(count, depth, sums + (n - n0) * PLACES * SUMS, k > 0, next);
            }
        }
        for (int64_t n = n0; n < n1; n++) {
            float* const found = sums + (n - n0) * PLACES * SUMS;
            for (int i = 0; i < PLACES; i++)
                if (!kept(i)) memset(found + i * SUMS, 0, SUMS * 4);
            const int64_t left = p.channels - n * PANEL, wide = left < PANEL ? left : PANEL;
            for (int64_t t = 0; t < count; t++) write(first + t, found + t * PANEL, n * PANEL, wide);
        }
    }
};

template <int SIDE, class T> void winograd_of(const Winograd<T> p) {
    const int64_t all = p.images * ((p.height + SIDE - 1) / SIDE) * ((p.width + SIDE - 1) / SIDE);
    const int64_t panels = (p.channels + PANEL - 1) / PANEL, threads = omp_get_max_threads();
    // All threads get equal parts of the tiles; with few tiles, panels are split, too.
    const int64_t turns = (all + threads * TILES - 1) / (threads * TILES);
    const int64_t even = (all + turns * threads - 1) / (turns * threads);
    const int64_t count = (even + REST - 1) / REST * REST;
    const int64_t blocks = (all + count - 1) / count;
    const int64_t wanted = blocks < threads ? (threads + blocks - 1) / blocks : 1;
    const int64_t parts = wanted < panels ? wanted : panels;
#pragma omp parallel for schedule(dynamic) firstprivate(p)
    for (int64_t i = 0; i < blocks * parts; i++) {
        const int64_t first = i / parts * count, part = i % parts;
        Block<SIDE, T>(p, part * panels / parts, (part + 1) * panels / parts)
            .convolve(first, all - first < count ? all - first : count);
    }
}

template <class T> const char* winograd(const Winograd<T>& p) {
    REQUIRE(sizes({p.bias_step, p.images, p.rows, p.height, p.width, p.inner, p.channels}));
    REQUIRE(p.inner % 16 == 0 && p.channels % 16 == 0 && (p.side == 2 || p.side == 4));
    REQUIRE(p.scale == 1 || (p.scale == 2 && !p.above && p.rows % 2 == 0 && p.width % 2 == 0));
    REQUIRE(p.above == 0 || p.above == 1);
    REQUIRE(p.relu == 0 || p.relu == 1);
    REQUIRE(p.rows == p.height + 2 * p.above);
    if (!p.images || !p.height || !p.width || !p.channels) return nullptr;
    REQUIRE(p.inner && pointers(p.x, p.weights, p.out));
    REQUIRE(pointer_or_null(p.bias) && pointer_or_null(p.plus));
    if (p.side == 4) winograd_of<4>(p);
    else winograd_of<2>(p);
    return nullptr;
}
