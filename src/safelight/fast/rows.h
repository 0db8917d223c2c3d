// Products of 32 rows by vectors, for CPUs with AVX512-BF16 and without AMX: the interface of tiles.h.
#pragma once

const int WIDEST = 3;  // tiles of columns at once: with eight rows their sums stay in registers

// Adds the products of a row's 32 bits, in each lane of `row`, and those of 16 columns.
inline vec dot(vec sum, __m512i row, __m512i columns, bf16) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)columns);
}
inline vec dot(vec sum, __m512i row, __m512i columns, uint8_t) {
    return (vec)_mm512_dpbusd_epi32((__m512i)sum, row, columns);
}

template <int wide, class T>
inline void products_of(const T* rows, int64_t stride, int64_t depth, const T* w, int64_t apart,
                        float* sums, int64_t t, bool add) {
    const int TALL = 8, EACH = 4 / sizeof(T);  // numbers in 32 bits
    for (int64_t i = 0; i < 32; i += TALL, rows += TALL * stride) {
        vec found[TALL][wide];
        for (int r = 0; r < TALL; r++)
            for (int x = 0; x < wide; x++)
                found[r][x] = add ? floats(sums + place(i + r, t + x)) : splat(0);
        const T* at = w;
        for (int64_t k = 0; k < depth; k += 16 * EACH, at += apart) {
            int64_t count = depth - k < 16 * EACH ? (depth - k + EACH - 1) / EACH : 16;
            for (int64_t p = 0; p < count; p++) {
                __m512i columns[wide];
                for (int x = 0; x < wide; x++)
                    columns[x] = _mm512_loadu_si512(at + (x * 256 + p * 16) * EACH);
                for (int r = 0; r < TALL; r++) {
                    int bits;
                    memcpy(&bits, rows + r * stride + k + EACH * p, 4);
                    __m512i row = _mm512_set1_epi32(bits);
                    for (int x = 0; x < wide; x++)
                        found[r][x] = dot(found[r][x], row, columns[x], T());
                }
            }
        }
        for (int r = 0; r < TALL; r++)
            for (int x = 0; x < wide; x++) store(sums + place(i + r, t + x), found[r][x]);
    }
}
