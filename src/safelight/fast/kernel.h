// What the kernels in bfloat16 and the kernels by tiles share: vectors, blocks of tiles, threads.
#pragma once

#include "lanes.h"

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "portable.h"
#endif

// Fetches a line into the second-level cache.
inline void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }

// The first `count` numbers, of 16 at most. Of those that are loaded the others are 0.
inline vec load_first(const float* p, int64_t count) {
    float all[16] = {};
    if (count >= 16) return floats(p);
    for (int64_t i = 0; i < count; i++) all[i] = p[i];
    return floats(all);
}
template <class T, class V> inline void store_first(T* p, V x, int64_t count) {
    T all[16];
    if (count >= 16) return store(p, x);
    store(all, x);
    memcpy(p, all, count * sizeof(T));
}

// Packs 32 numbers of each of 16 rows, `stride` apart, into one tile of weights, in pairs along a row.
inline void pack_tile(const bf16* rows, int64_t stride, bf16* out) {
    uint32_t* pairs = (uint32_t*)out;
    for (int n = 0; n < 16; n++)
        for (int r = 0; r < 16; r++) {
            memcpy(pairs + r * 16 + n, rows + n * stride + 2 * r, 4);
        }
}

// Sums are in blocks of four tiles, 32 rows by 32 columns; further columns follow. Returns where row i
// of the columns from 16·t on begins.
inline int64_t place(int64_t i, int64_t t) {
    return i / 16 * 512 + i % 16 * 16 + t / 2 * 1024 + t % 2 * 256;
}

#if defined(__AVX512BF16__) && !defined(AMX)
#include "rows.h"
#else
#include "tiles.h"
#endif

// How many tiles of columns `products` takes next, of those that are left.
inline int64_t at_once(int64_t left) {
    return WIDEST == 3 && left > 2 && left != 4 ? 3 : left < 2 ? left : 2;
}

// Multiplies 32 rows of `depth` numbers, `stride` numbers apart, by `wide` adjacent tiles of weights; the
// tiles for the next 64 bytes of a row are `apart` from these. Numbers are bfloat16, or bytes: then
// weights are signed, and sums are 32-bit integers. Sums go to the columns from 16·t on, t even, or are
// added there with `add`.
template <class T>
inline void products(int64_t wide, const T* rows, int64_t stride, int64_t depth, const T* w,
                     int64_t apart, float* sums, int64_t t, bool add) {
    if (wide == 1) products_of<1>(rows, stride, depth, w, apart, sums, t, add);
    else if (wide == 2) products_of<2>(rows, stride, depth, w, apart, sums, t, add);
    else products_of<WIDEST>(rows, stride, depth, w, apart, sums, t, add);
}

// Runs act(m0, m1, n0, n1) in all threads: rows in chunks of `tall`, panels of columns in `splits` parts.
template <class Do> void regions(int64_t rows, int64_t tall, int64_t panels, int64_t splits, Do act) {
    int64_t chunks = (rows + tall - 1) / tall;
    if (splits > panels) splits = panels;
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(static) collapse(2)
        for (int64_t s = 0; s < splits; s++)
            for (int64_t c = 0; c < chunks; c++)
                act(c * tall, (c + 1) * tall < rows ? (c + 1) * tall : rows, s * panels / splits,
                    (s + 1) * panels / splits);
    }
}
