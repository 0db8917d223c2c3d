// Products of 32 rows by tiles.
#pragma once

namespace {

// Tiles of columns that `products` takes at once.
inline int64_t at_once(int64_t left) { return left < 2 ? left : 2; }

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

// 32 rows, `stride` numbers apart, of which `depth` are multiplied by `wide` tiles of weights side by
// side: the next 32 numbers' are `apart` from them. The sums go to columns 16·t on, t even; `add`:
// are added to what is there.
template <int wide>
inline void products_of(const bf16* rows, int64_t stride, int64_t depth, const bf16* w, int64_t apart,
                        float* sums, int64_t t, bool add) {
    const bf16* low = rows + 16 * stride;
    if (add) take(sums + place(0, t));
    else clear();
    for (int64_t k = 0; k < depth; k += 32, rows += 32, low += 32, w += apart) {
        _tile_loadd(4, rows, stride * 2);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (wide > 1) {
            _tile_loadd(7, w + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(5, low, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (wide > 1) _tile_dpbf16ps(3, 5, 7);
    }
    give(sums + place(0, t));
}
inline void products(int64_t wide, const bf16* rows, int64_t stride, int64_t depth, const bf16* w,
                     int64_t apart, float* sums, int64_t t, bool add) {
    if (wide > 1) products_of<2>(rows, stride, depth, w, apart, sums, t, add);
    else products_of<1>(rows, stride, depth, w, apart, sums, t, add);
}

}  // namespace
