// Products of float32 on AMX tiles, which multiply bfloat16. Each number is split into a head and a
// rest, and a product is head·head + rest·head + head·rest (Henry, Tang and Heinecke,
// arXiv:1904.06376). This leaves out about 2^-17 of the product. Sums are float32.

#include "heads.h"

// Splits 32 numbers into 32 heads and 32 rests.
inline void halve(vec low, vec high, bf16* heads, bf16* lefts) {
    store(heads, low, high);
    store(lefts, low - load(heads), high - load(heads + 16));
}
inline void halve(const float* from, bf16* heads, bf16* lefts) {
    halve(floats(from), floats(from + 16), heads, lefts);
}

// Adds the products of 32 numbers of 32 rows, `step` bytes apart, and of two tiles of columns or of one. Of
// one, products of the rows' rests go to the second tile's place, as sums in only two tiles wait for one
// another.
template <bool two>
inline void multiply(const bf16* heads, const bf16* rests, int64_t step, const bf16* w, const bf16* w_rests) {
    _tile_loadd(4, heads, step);
    _tile_loadd(6, w_rests, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, heads + 8 * step, step);
    _tile_dpbf16ps(2, 5, 6);
    if (two) {
        _tile_loadd(7, w_rests + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (two) {
        _tile_loadd(7, w + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, rests, step);
    _tile_loadd(5, rests + 8 * step, step);
    if (two) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
}

// --- linear layers ------------------------------------------------------------------------------

// 32 by 32 numbers are four tiles: two of heads, two of rests.
const int64_t BLOCK = 2048;
// Rows that a thread takes at once, and blocks of 32 of their numbers: they stay in the
// second-level cache while the weights of all columns are read.
const int64_t TALL = 256, DEEP = 40;

// out = x·weightsᵀ + bias + plus; out and plus are [rows][columns], bias and plus may be null.
struct Linear {
    const float* x;         // [rows][inner]
    const bf16* weights;    // [columns/32][inner/32][BLOCK]
    const float *bias, *plus;
    float* out;
    int64_t rows, inner, columns;
};

// Writes the sums of 32 rows, from m to m_end at most, by 32 columns.
static void finish(const Linear& p, const float* sums, int64_t m, int64_t m_end, int64_t n, bool first) {
    for (int64_t i = 0; i < 32 && m + i < m_end; i++)
        for (int64_t c = 0; c < 32; c += 16) {
            const int64_t at = (m + i) * p.columns + n + c;
            vec total = floats(sums + place(i, c / 16));
            if (!first) total = total + floats(p.out + at);
            else if (p.bias) total = total + floats(p.bias + n + c);
            if (first && p.plus) total = total + floats(p.plus + at);
            store(p.out + at, total);
        }
}

// Computes rows m0..m1 by panels n0..n1.
static void region(const Linear& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    int64_t tall = (m1 - m0 + 31) / 32, blocks = p.inner / 32, deep = blocks < DEEP ? blocks : DEEP;
    bf16* x = (bf16*)scratch(tall * deep * BLOCK * 2 + 2 * 4096);
    float* sums = (float*)(x + tall * deep * BLOCK);
    for (int64_t first = 0; first < blocks; first += deep) {
        int64_t now = blocks - first < deep ? blocks - first : deep;
        for (int64_t m = m0; m < m0 + 32 * tall; m++) {
            bf16* to = x + (m - m0) / 32 * now * BLOCK + (m - m0) % 32 * 32;
            for (int64_t k = 0; k < now; k++, to += BLOCK) {
                if (m < m1) halve(p.x + m * p.inner + (first + k) * 32, to, to + 1024);
                else memset(to, 0, 64), memset(to + 1024, 0, 64);
            }
        }
        fence();
        // A block's sums are finished while the next block is multiplied, as memory that tiles
        // have just stored cannot be read at once.
        const float* ready = nullptr;
        int64_t ready_m = 0, ready_n = 0, turn = 0;
        for (int64_t n = n0; n < n1; n++) {
            const bf16* w = p.weights + (n * blocks + first) * BLOCK;
            for (int64_t i = 0; i < tall; i++, turn++) {
                const bf16* from = x + i * now * BLOCK;
                const char* next = (const char*)(w + blocks * BLOCK) + i * now * 512;
                const int lines = n + 1 < n1 && i < 8 ? 8 : 0;  // of the next weights, as loading takes longest
                clear();
                for (int64_t k = 0; k < now * BLOCK; k += BLOCK) {
                    multiply<true>(from + k, from + k + 1024, 64, w + k, w + k + 1024);
                    for (int c = 0; c < lines; c++, next += 64) fetch(next);
                }
                if (ready) finish(p, ready, ready_m, m1, ready_n, !first);
                give(sums + turn % 2 * 1024);
                ready = sums + turn % 2 * 1024, ready_m = m0 + 32 * i, ready_n = n * 32;
            }
        }
        if (ready) finish(p, ready, ready_m, m1, ready_n, !first);
    }
}

// --- attention ----------------------------------------------------------------------------------

// A score is one product, of (head, rest, head) of a query and (head, head, rest) of a key. The heads
// and the rests of weights and values are stored apart.
struct Split : Head<float, 3, 2> {
    bf16 *const value_rests, *const weight_rests;

    Split(const Attention<float>& a, char* packed)
        : Head(a, packed), value_rests(values + padded * outer * 16),
          weight_rests(weights + 32 * STEP) {}

    // Writes a query or a key: heads, and rests in the second place (query) or the third (key).
    void lay_out(const float* from, bf16* to, bool is_query) const {
        for (int64_t c = 0; c < a.size; c += 16) {
            vec x = load_first(from + c, a.size - c);
            halves head = narrow(x), rest = narrow(x - widen(head));
            store_first(to + c, head, a.size - c);
            store_first(to + a.size + c, is_query ? rest : head, a.size - c);
            store_first(to + 2 * a.size + c, is_query ? head : rest, a.size - c);
        }
    }
    void lay(int64_t i, const float* from) const { lay_out(from, query + i * inner * 32, true); }

    void pack(const float* k, const float* v, int64_t begin, int64_t end) const {
        pack_keys(k, begin, end, [&](const float* from, bf16* to) { lay_out(from, to, false); });
        for (int64_t n = begin; n < end; n++)
            for (int64_t c = 0; c < a.size; c += 16) {
                vec x = load_first(v + n * a.v_steps.row + c, n < a.keys ? a.size - c : 0);
                alignas(64) bf16 heads[16], rests[16];
                store(heads, x);
                store(rests, x - load(heads));
                int64_t at = (n / 32 * outer + c / 16) * 512 + n % 32 / 2 * 32 + n % 2;
                for (int i = 0; i < 16; i++) {
                    values[at + 2 * i] = heads[i];
                    value_rests[at + 2 * i] = rests[i];
                }
            }
    }

    void soften(const Pass& p, const float* most, float* total) const {
        const vec factor = splat(a.scale * LOG2E);
        for (int i = 0; i < 32; i++) {
            const float* s = scores + place(i, 0);
            const vec shift = splat(-most[i] * a.scale * LOG2E);
            vec all = splat(0);
            for (int64_t j = 0; j < p.count; j += 32, s += 1024) {
                vec low = exp2(fma(floats(s), factor, shift));
                vec high = exp2(fma(floats(s + 256), factor, shift));
                all = all + (low + high);
                halve(low, high, weights + i * STEP + j, weight_rests + i * STEP + j);
            }
            total[i] += sum(all);
        }
    }

    void weigh(const Pass& p) const {
        fence();
        for (int64_t t = 0; t < outer; t += 2) {
            int64_t at = p.begin * outer * 16 + t * 512;
            if (p.begin) take(sums + t * 512);
            else clear();
            for (int64_t j = 0; j < p.count; j += 32, at += outer * 512)
                if (t + 1 < outer)
                    multiply<true>(weights + j, weight_rests + j, STEP * 2, values + at, value_rests + at);
                else
                    multiply<false>(weights + j, weight_rests + j, STEP * 2, values + at, value_rests + at);
            give(sums + t * 512);
        }
    }

    void write(int64_t i, float* out, float total) const {
        for (int64_t c = 0; c < a.size; c += 16) {
            const float* found = summed(i, c / 16);
            vec x = floats(found);
            bool alone = c % 32 == 0 && c + 16 >= a.size;
            if (alone) x = x + floats(found + 256);
            x = x * splat(1.f / total);
            store_first(out + c, x, a.size - c);
        }
    }
};

KERNEL safelight_split_linear(const Linear* p) {
    REQUIRE(sizes({p->rows, p->columns, p->inner}) && p->columns % 32 == 0 && p->inner % 32 == 0);
    REQUIRE(p->inner > 0);
    if (!p->rows || !p->columns) return nullptr;
    REQUIRE(pointers(p->x, p->weights, p->out) && pointer_or_null(p->bias));
    REQUIRE(pointer_or_null(p->plus));
    int64_t threads = omp_get_max_threads(), panels = p->columns / 32;
    int64_t chunks = (p->rows + TALL - 1) / TALL;
    // With few rows, each thread takes all of them and some of the columns.
    int64_t splits = chunks % threads && chunks < 2 * threads ? threads : 1;
    regions(p->rows, TALL, panels, splits,
            [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) { region(*p, m0, m1, n0, n1); });
    return nullptr;
}

KERNEL safelight_split_attend(const Attention<float>* a) { return attend<Split>(*a); }
