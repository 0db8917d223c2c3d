// What all kernels on AMX tiles share: the tiles' registers, bfloat16 in vectors, memory of a thread.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <omp.h>

typedef uint16_t bf16;

// Memory of this thread, until it asks for more or ends.
struct Scratch {
    void* held = nullptr;
    size_t size = 0;
    ~Scratch() { free(held); }
};
inline void* scratch(size_t bytes) {
    static thread_local Scratch mine;
    if (mine.size < bytes) {
        free(mine.held);
        mine.size = (bytes + 4095) & ~size_t(4095);
        mine.held = aligned_alloc(4096, mine.size);
    }
    return mine.held;
}

namespace {

// The compiler does not know that tile instructions read and write memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// oneDNN has a tile configuration of its own in each thread; it is put back.
struct Tiles {
    Config before;
    Tiles() {
        _tile_storeconfig(&before);
        Config ours;
        for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
        fence();
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
};

inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, __m512 x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x. The polynomial's relative error is below 2e-7 for the fraction in -0.5..0.5.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // NaN, if x is: it gives its second one
    __m512 whole = _mm512_roundscale_ps(x, 0);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.54035304e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.33335581e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147182e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(y, whole);
}
const float LOG2E = 1.44269504f;

// x·Phi(x): erfc by Abramowitz and Stegun 7.1.26, to 2e-7; unless `fine`, to the 6e-5 of a quick
// reciprocal, of which bfloat16 sees nothing.
template <bool fine> inline __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f);
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    __m512 t = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one);
    t = fine ? _mm512_div_ps(one, t) : _mm512_rcp14_ps(t);
    __m512 y = _mm512_set1_ps(1.061405429f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
    __m512 fall = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2E)));
    __m512 tail = _mm512_mul_ps(_mm512_mul_ps(y, t), _mm512_mul_ps(fall, _mm512_set1_ps(0.5f)));
    __mmask16 up = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, up, one, tail));
}

// 32 numbers of each of 16 rows, `stride` apart, into one tile of weights: pairs of k side by side.
inline void pack_tile(const bf16* rows, long stride, bf16* out) {
    uint32_t* pairs = (uint32_t*)out;
    for (int n = 0; n < 16; n++)
        for (int r = 0; r < 16; r++) {
            memcpy(pairs + r * 16 + n, rows + n * stride + 2 * r, 4);
        }
}

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

// act(m0, m1, n0, n1) by all threads: rows in chunks of `tall`, panels of columns in `splits` parts.
template <class Do> void regions(long rows, long tall, long panels, long splits, Do act) {
    long chunks = (rows + tall - 1) / tall;
    if (splits > panels) splits = panels;
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(static) collapse(2)
        for (long s = 0; s < splits; s++)
            for (long c = 0; c < chunks; c++)
                act(c * tall, (c + 1) * tall < rows ? (c + 1) * tall : rows, s * panels / splits,
                    (s + 1) * panels / splits);
    }
}

}  // namespace
