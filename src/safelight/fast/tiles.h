// Products of 32 rows by tiles.
#pragma once

const int WIDEST = 2;  // tiles of columns at once

// Tiles 0 to 3 are the sums of a block of 32 rows by 32 columns.
inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
inline void take(const float* sums) {
    fence();
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}
inline void give(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    fence();
}

// A tile's number is part of an instruction, so it cannot be a function's argument.
#define DOT(to, a, b) do { \
    if (sizeof(T) == 2) _tile_dpbf16ps(to, a, b); \
    else _tile_dpbusd(to, a, b); \
} while (0)

// Adds the products of the next 64 bytes of 32 rows, 16 from `rows` on and 16 from `low` on, and `wide`
// tiles of weights.
template <int wide, class T>
inline void multiply_block(const T* rows, const T* low, int64_t stride, const T* w) {
    _tile_loadd(4, rows, stride * sizeof(T));
    _tile_loadd(6, w, 64);
    DOT(0, 4, 6);
    if (wide > 1) {
        _tile_loadd(7, w + 1024 / sizeof(T), 64);
        DOT(1, 4, 7);
    }
    _tile_loadd(5, low, stride * sizeof(T));
    DOT(2, 5, 6);
    if (wide > 1) DOT(3, 5, 7);
}
template <int wide, class T>
inline void products_of(const T* rows, int64_t stride, int64_t depth, const T* w, int64_t apart,
                        float* sums, int64_t t, bool add) {
    const int64_t EACH = 64 / sizeof(T);  // numbers of a row of a tile
    if (add) take(sums + place(0, t));
    else clear();
    for (int64_t k = 0; k < depth; k += EACH, rows += EACH, w += apart)
        multiply_block<wide>(rows, rows + 16 * stride, stride, w);
    give(sums + place(0, t));
}
