// Attention in bfloat16. Sums are float32 throughout; results are rounded once.

#include "heads.h"

const bf16 ONE = 0x3f80, NOT_A_NUMBER = 0x7fc0;

// f - 128·(2^(f/128) - 1), rounded, for f from 0 to 127.
struct Fractions {
    uint8_t apart[128];
    Fractions() {
        for (int f = 0; f < 128; f++) apart[f] = f - lround(128 * (pow(2, f / 128.0) - 1));
    }
};

// The key, of 32, at a place in the order in which `powers` packs two vectors of scores.
inline int64_t key_at(int64_t place) { return place % 8 / 4 * 16 + place / 8 * 4 + place % 4; }

struct Rounded : Head<bf16, 1, 1> {
    const bool counted;  // a column of ones beside the values sums up the weights

    Rounded(const Attention<bf16>& a, char* packed) : Head(a, packed), counted(a.size % 16) {}

    // NaN or infinity in a key would give a weight of 0, as 2^x is computed here. So such a key's
    // value is made NaN.
    bool finite(const bf16* key) const {
        bool found = true;
        for (int64_t c = 0; c < a.size; c++) found &= (key[c] & 0x7f80) != 0x7f80;
        return found;
    }

    void pack(const bf16* k, const bf16* v, int64_t begin, int64_t end) const {
        pack_keys(k, begin, end, [&](const bf16* from, bf16* to) { memcpy(to, from, a.size * 2); });
        for (int64_t n = begin; n < end; n += 32)
            for (int64_t t = 0; t < outer; t++) {
                bf16* to = values + n * outer * 16 + t * 512;
                int64_t width = a.size - 16 * t < 16 ? a.size - 16 * t : 16;
                for (int64_t i = 0; i < 32; i++) {
                    int64_t key = n + key_at(i);
                    bool good = key >= a.keys || finite(k + key * a.k_steps.row);
                    for (int64_t c = 0; c < 16; c++)
                        to[i / 2 * 32 + 2 * c + i % 2] =
                            !good           ? NOT_A_NUMBER
                            : key >= a.keys ? 0
                            : c < width     ? v[key * a.v_steps.row + 16 * t + c]
                            : c == width    ? ONE
                                            : 0;
                }
            }
    }

    void lay(int64_t i, const bf16* from) const { memcpy(query + i * inner * 32, from, a.size * 2); }

    // In bfloat16 2^x needs no polynomial (N. Schraudolph, 1999, with a table in place of his
    // constant): as an integer of 1/128ths, x has its whole part where a float has its exponent,
    // and its fraction f where 2^f - 1 belongs. A table has the differences between these two.
    template <bool sum_them> void soften_by(const Pass& p, const float* most, float* total) const {
        alignas(64) static const Fractions fractions;
        const Table table(fractions.apart);
        const vec factor = splat(128 * a.scale * LOG2E);
        for (int i = 0; i < 32; i++) {
            const float* s = scores + place(i, 0);
            vec shift = splat(128 * (127 - most[i] * a.scale * LOG2E)), all = splat(0);
            bf16* w = weights + i * STEP;
            for (int64_t j = 0; j < p.count / 32; j++, s += 1024, w += 32)
                all = powers<sum_them>(fma(floats(s), factor, shift),
                                       fma(floats(s + 256), factor, shift), table, w, all);
            if (sum_them) total[i] += sum(all);
        }
    }
    void soften(const Pass& p, const float* most, float* total) const {
        if (counted) soften_by<false>(p, most, total);
        else soften_by<true>(p, most, total);
    }
    void sum_up(float* total) const {
        for (int i = 0; counted && i < 32; i++) total[i] = summed(i, outer - 1)[a.size % 16];
    }

    void weigh(const Pass& p) const {
        fence();
        for (int64_t t = 0, wide; t < outer; t += wide) {
            wide = at_once(outer - t);
            products(wide, weights, STEP, p.count, values + p.begin * outer * 16 + t * 512,
                     outer * 512, sums, t, p.begin);
        }
    }

    void write(int64_t i, bf16* out, float total) const {
        for (int64_t c = 0; c < a.size; c += 16) {
            vec x = floats(summed(i, c / 16)) * splat(1.f / total);
            store_first(out + c, narrow(x), a.size - c);
        }
    }
};

KERNEL safelight_attend(const Attention<bf16>* a) { return attend<Rounded>(*a); }
