// The interface of amx.h in plain C++, for any processor, with vectors of 16 numbers that the compiler
// splits. Results equal those of amx.h up to the order of sums and the rounding of products.
#pragma once

typedef int32_t ints __attribute__((vector_size(64)));
typedef bf16 halves __attribute__((vector_size(32)));

// GCC warns about the calling convention of vectors that need registers a processor may lack.
#pragma GCC diagnostic ignored "-Wpsabi"

template <class T, class From> inline T read(const From* p) {
    T x;
    memcpy(&x, p, sizeof x);
    return x;
}
template <class T, class From> inline T as(From x) { return read<T>(&x); }
template <class Do> inline vec each(Do value) {
    vec out;
    for (int i = 0; i < 16; i++) out[i] = value(i);
    return out;
}

inline float top(vec x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline halves narrow(vec x) {  // to the nearest, ties to even
    ints bits = as<ints>(x);
    ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = x == x ? rounded : (bits >> 16) | 0x40;
    return __builtin_convertvector(rounded, halves);
}
inline vec widen(halves x) { return as<vec>(__builtin_convertvector(x, ints) << 16); }
inline vec load(const bf16* p) { return widen(read<halves>(p)); }
inline void store(bf16* p, halves x) { memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vec x) { store(p, narrow(x)); }
inline void store(bf16* p, vec low, vec high) {
    store(p, low);
    store(p + 16, high);
}

inline void store_bytes(uint8_t* p, vec x) {
    for (int i = 0; i < 16; i++) {
        float n = rintf(x[i]);
        p[i] = n > -128 ? n < 127 ? int(n) + 128 : 255 : 0;  // 0 if NaN
    }
}
inline vec whole_sums(const float* p, const int32_t* less) {
    return __builtin_convertvector(read<ints>(p) - read<ints>(less), vec);
}

struct Table {
    const uint8_t* at;
    explicit Table(const uint8_t* p) : at(p) {}
};
template <bool add> inline vec powers(vec x, vec y, const Table& apart, bf16* out, vec total) {
    for (int i = 0; i < 32; i++) {
        // In the order of _mm512_packs_epi32: four of x, four of y.
        float value = i % 8 < 4 ? x[i / 8 * 4 + i % 4] : y[i / 8 * 4 + i % 4];
        int bits = value > 0 ? value < 32767 ? int(lrintf(value)) : 32767 : 0;  // 0 if NaN
        out[i] = bits - apart.at[bits % 128];
    }
    if (!add) return total;
    return each([&](int i) {
        vec low = load(out), high = load(out + 16);
        int at = i % 8 * 2;
        return total[i] + (i < 8 ? low[at] + low[at + 1] : high[at] + high[at + 1]);
    });
}

// Eight tiles of a thread, 16 rows of 64 bytes each.
struct alignas(64) Tile {
    char row[16][64];
};
inline thread_local Tile tiles_of_thread[8];

inline void _tile_zero(int t) { tiles_of_thread[t] = {}; }
inline void _tile_loadd(int t, const void* from, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(tiles_of_thread[t].row[i], (const char*)from + i * stride, 64);
}
inline void _tile_stored(int t, void* to, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char*)to + i * stride, tiles_of_thread[t].row[i], 64);
}
inline void _tile_dpbusd(int to, int a, int b) {
    Tile *sums = tiles_of_thread + to, *rows = tiles_of_thread + a, *columns = tiles_of_thread + b;
    for (int k = 0; k < 16; k++)
        for (int m = 0; m < 16; m++) {
            ints row = read<ints>(sums->row[m]);
            for (int i = 0; i < 4; i++)
                row += (read<ints>(columns->row[k]) << (24 - 8 * i) >> 24)
                       * int(uint8_t(rows->row[m][4 * k + i]));
            memcpy(sums->row[m], &row, 64);
        }
}
inline void _tile_dpbf16ps(int to, int a, int b) {
    Tile *sums = tiles_of_thread + to, *rows = tiles_of_thread + a, *columns = tiles_of_thread + b;
    for (int k = 0; k < 16; k++) {
        ints pairs = read<ints>(columns->row[k]);
        vec even = as<vec>(pairs << 16), odd = as<vec>((pairs >> 16) << 16);
        for (int m = 0; m < 16; m++) {
            vec row = read<vec>(sums->row[m]);
            uint32_t pair = read<uint32_t>(rows->row[m] + 4 * k);
            row += as<float>(pair << 16) * even;
            row += as<float>(pair & 0xffff0000) * odd;
            memcpy(sums->row[m], &row, 64);
        }
    }
}
