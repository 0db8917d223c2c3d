// Products of 32 rows by vectors, for CPUs with AVX512-BF16 and without AMX: the interface of tiles.h.
#pragma once

namespace {

inline bool permitted() { return true; }
inline void fence() {}
struct Tiles {
    Tiles() {}
};

// Tiles of columns that `products` takes at once: with eight rows their sums stay in registers.
inline int64_t at_once(int64_t left) { return left == 4 || left < 3 ? (left < 2 ? left : 2) : 3; }

template <int wide>
inline void products_of(const bf16* rows, int64_t stride, int64_t depth, const bf16* w, int64_t apart,
                        float* sums, int64_t t, bool add) {
    const int TALL = 8;
    for (int64_t i = 0; i < 32; i += TALL, rows += TALL * stride) {
        vec found[TALL][wide];
        for (int r = 0; r < TALL; r++)
            for (int x = 0; x < wide; x++)
                found[r][x] = add ? floats(sums + place(i + r, t + x)) : splat(0);
        const bf16* at = w;
        for (int64_t k = 0; k < depth; k += 32, at += apart) {
            int64_t pairs = depth - k < 32 ? (depth - k + 1) / 2 : 16;
            for (int64_t p = 0; p < pairs; p++) {
                __m512bh columns[wide];
                for (int x = 0; x < wide; x++)
                    columns[x] = (__m512bh)_mm512_loadu_si512(at + x * 512 + p * 32);
                for (int r = 0; r < TALL; r++) {
                    int pair;
                    memcpy(&pair, rows + r * stride + k + 2 * p, 4);
                    __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
                    for (int x = 0; x < wide; x++)
                        found[r][x] = _mm512_dpbf16_ps(found[r][x], row, columns[x]);
                }
            }
        }
        for (int r = 0; r < TALL; r++)
            for (int x = 0; x < wide; x++) store(sums + place(i + r, t + x), found[r][x]);
    }
}
inline void products(int64_t wide, const bf16* rows, int64_t stride, int64_t depth, const bf16* w,
                     int64_t apart, float* sums, int64_t t, bool add) {
    if (wide == 3) products_of<3>(rows, stride, depth, w, apart, sums, t, add);
    else if (wide == 2) products_of<2>(rows, stride, depth, w, apart, sums, t, add);
    else products_of<1>(rows, stride, depth, w, apart, sums, t, add);
}

}  // namespace
