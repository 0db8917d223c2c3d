// Attention, norms, gates and Winograd convolutions in float32 by vectors. The attention is for
// processors without AMX.

#include "attention.h"
#include "norms.h"
#include "winograd.h"

// Rows of sums that fit into the registers at once.
const int ROWS = LANES == 16 ? 8 : 6;
const int WIDE = 2 * LANES;  // columns of a panel

struct Floats {
    typedef float Number;
    static const int TALL = 4 * ROWS;  // keys and values are read once for all of them
    const Attention<float>& a;
    const int64_t padded, across;  // keys, and numbers of a value, in whole panels and registers
    float *keys, *values, *query, *scores, *sums;

    Floats(const Attention<float>& a, char* packed)
        : a(a), padded(panels(a.keys)), across(registers(a.size)) {
        keys = (float*)packed;
        values = keys + padded * a.size;
        query = (float*)scratch((TALL * registers(a.size) + TALL * KEYS + TALL * across) * 4);
        scores = query + TALL * registers(a.size);
        sums = scores + TALL * KEYS;
    }
    static int64_t panels(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }
    static int64_t registers(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
    static size_t packed_bytes(const Attention<float>& a) {
        return panels(a.keys) * (a.size + registers(a.size)) * 4;
    }

    // Keys in panels [size][WIDE], values in panels [keys][WIDE], of which the last may have LANES
    // columns. What is beyond the last key and the last column is zero.
    void pack(const float* k, const float* v, int64_t begin, int64_t end) const {
        for (int64_t n = begin; n < end; n++) {
            float* panel = keys + n / WIDE * WIDE * a.size + n % WIDE;
            for (int64_t c = 0; c < a.size; c++)
                panel[c * WIDE] = n < a.keys ? k[n * a.k_steps.row + c] : 0;
            for (int64_t c = 0; c < across; c += WIDE) {
                float* to = values + c * padded + n * columns(c);
                const int64_t count = a.size - c < WIDE ? a.size - c : WIDE;
                memset(to, 0, columns(c) * 4);
                if (n < a.keys) memcpy(to, v + n * a.v_steps.row + c, count * 4);
            }
        }
    }
    int64_t columns(int64_t c) const { return c + WIDE <= across ? WIDE : LANES; }

    void clear_queries() const { memset(query, 0, TALL * a.size * 4); }
    void lay(int64_t i, const float* from) const {  // scaled, so that exp2 of a score is its weight
        for (int64_t c = 0; c < a.size; c++) query[i * a.size + c] = from[c] * (a.scale * LOG2E);
    }

    void score(const Pass& p) const {
        for (int64_t r = 0; r < TALL; r += ROWS)
            for (int64_t n = 0; n < p.count; n += WIDE)
                multiply<ROWS, 2>(query + r * a.size, a.size, keys + (p.begin + n) * a.size, WIDE,
                                  a.size, scores + r * KEYS + n, KEYS, false);
        for (int64_t n = a.keys - p.begin; n < p.count; n++)
            for (int64_t r = 0; r < TALL; r++) scores[r * KEYS + n] = LEAST;
    }

    void peaks(const Pass& p, float* most) const {
        for (int64_t r = 0; r < TALL; r++) {
            vec top = splat(most[r]);
            for (int64_t n = 0; n < p.count; n += LANES) {
                vec s = floats(scores + r * KEYS + n);
                top = s > top ? s : top;
            }
            for (int i = 0; i < LANES; i++) most[r] = top[i] > most[r] ? top[i] : most[r];
        }
    }

    void soften(const Pass& p, const float* most, float* total) const {
        for (int64_t r = 0; r < TALL; r++) {
            vec all = splat(0), shift = splat(most[r]);
            for (int64_t n = 0; n < p.count; n += LANES) {
                float* s = scores + r * KEYS + n;
                vec weight = exp2(floats(s) - shift);
                store(s, weight);
                all += weight;
            }
            for (int i = 0; i < LANES; i++) total[r] += all[i];
        }
    }

    void weigh(const Pass& p) const {
        for (int64_t c = 0; c < across; c += WIDE) {
            const int64_t wide = columns(c);
            const float* v = values + c * padded + p.begin * wide;
            for (int64_t r = 0; r < TALL; r += ROWS) {
                const float* weights = scores + r * KEYS;
                float* to = sums + r * across + c;
                if (wide == WIDE) multiply<ROWS, 2>(weights, KEYS, v, wide, p.count, to, across, p.begin);
                else multiply<ROWS, 1>(weights, KEYS, v, wide, p.count, to, across, p.begin);
            }
        }
    }

    void sum_up(float*) const {}
    void write(int64_t i, float* out, float total) const {
        for (int64_t c = 0; c < a.size; c++) out[c] = sums[i * across + c] / total;
    }
};

KERNEL safelight_attend_floats(const Attention<float>* a) { return attend<Floats>(*a); }
KERNEL safelight_moments_floats(const Moments<float>* p) { return moments(*p); }
KERNEL safelight_normalise_floats(const Normalise<float>* p) { return normalise(*p); }
KERNEL safelight_layer_norm_floats(const LayerNorm<float>* p) { return layer_norm(*p); }
KERNEL safelight_gate_floats(const Gate<float>* p) { return gate(*p); }
KERNEL safelight_winograd_floats(const Winograd<float>* p) { return winograd(*p); }
