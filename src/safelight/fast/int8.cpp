// Linear layers by products of 8-bit integers. A row's numbers are whole multiples of 1/127 of the largest
// in the row, a column's weights of 1/127 of theirs. Sums of products are integers, and exact.

#include "kernel.h"

const int64_t HELD = 640 << 10;  // bytes of rows that stay in the second-level cache

// out = x·weightsᵀ + bias + plus. `offsets` has 128 times the sum of each column's weights, because 128 is
// added to the numbers of rows.
struct Int8Linear {
    const bf16* x;            // [rows][inner]
    const int32_t* weights;   // four signed bytes each, in tiles: [panels of 32 columns][blocks][2][256]
    const float* factors;     // [32 · panels]: the value of an integer's 1
    const int32_t* offsets;   // [32 · panels]
    const float* bias;        // [32 · panels], or null
    const bf16* plus;         // [rows][columns], or null
    bf16* out;
    int64_t rows, inner, columns;
};

// Writes a row as integers and returns the value of their 1: NaN if a number is not finite.
inline float quantise(const bf16* from, int64_t count, uint8_t* to) {
    vec most = splat(0), odd = splat(0);
    for (int64_t c = 0; c < count; c += 16) {
        vec x = load(from + c);
        most = larger(most, magnitude(x));
        odd = fma(x, splat(0), odd);
    }
    const float peak = top(most);
    const vec by = splat(peak > 1e-30f ? 127 / peak : 0);  // below that, 127 / peak overflows
    for (int64_t c = 0; c < count; c += 16) store_bytes(to + c, load(from + c) * by);
    return peak / 127 + sum(odd);
}

// Computes rows m0..m1 by panels n0..n1.
static void region(const Int8Linear& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    const int64_t count = m1 - m0, depth = (p.inner + 63) / 64 * 64, tall = (count + 31) / 32 * 32;
    uint8_t* rows = (uint8_t*)scratch(tall * (depth + 4) + 4096);
    float *sums = (float*)(rows + tall * depth), *factors = sums + 1024;
    memset(rows, 0, tall * depth);
    for (int64_t m = 0; m < count; m++)
        factors[m] = quantise(p.x + (m0 + m) * p.inner, p.inner, rows + m * depth);
    const uint8_t* w = (const uint8_t*)p.weights + n0 * 32 * depth;
    for (int64_t n = n0 * 32; n < n1 * 32; n += 32, w += 32 * depth) {
        const int64_t end = n + 32 < p.columns ? n + 32 : p.columns;
        for (int64_t m = 0; m < count; m += 32) {
            fence();
            products(2, rows + m * depth, depth, depth, w, 2048, sums, 0, false);
            for (int64_t i = 0; i < 32 && m + i < count; i++)
                for (int64_t c = n; c < end; c += 16) {
                    const int64_t at = (m0 + m + i) * p.columns + c;
                    vec x = whole_sums(sums + place(i, (c - n) / 16), p.offsets + c);
                    x = fma(x, splat(factors[m + i]) * floats(p.factors + c),
                            p.bias ? floats(p.bias + c) : splat(0));
                    store(p.out + at, p.plus ? x + load(p.plus + at) : x);
                }
        }
    }
}

KERNEL safelight_int8_linear(const Int8Linear* p) {
    REQUIRE(sizes({p->rows, p->inner, p->columns}) && p->inner % 16 == 0 && p->columns % 16 == 0);
    REQUIRE(p->inner > 0 && p->inner <= 1 << 16);  // so that sums fit into 32 bits
    if (!p->rows || !p->columns) return nullptr;
    REQUIRE(pointers(p->x, p->weights, p->factors, p->offsets, p->out));
    REQUIRE(pointer_or_null(p->bias) && pointer_or_null(p->plus));
    const int64_t threads = omp_get_max_threads(), rows = p->rows;
    const int64_t most = HELD / ((p->inner + 63) / 64 * 64) / 32 * 32, held = most < 32 ? 32 : most;
    const int64_t turns = (rows + held * threads - 1) / (held * threads);  // of all threads
    const int64_t tall = ((rows - 1) / (turns * threads) + 32) / 32 * 32;
    regions(rows, tall, (p->columns + 31) / 32, (rows + tall - 1) / tall % threads ? threads : 1,
            [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) { region(*p, m0, m1, n0, n1); });
    return nullptr;
}
