// Attention by products of 32 rows: what bfloat16 and split float32 share.
#pragma once

#include "attention.h"
#include "kernel.h"

const int64_t STEP = KEYS + 32;  // numbers between two rows of weights

// A query takes PARTS times its size in bfloat16. Values and weights have COPIES, one after the other.
template <class T, int PARTS, int COPIES> struct Head {
    typedef T Number;
    static const int TALL = 32;
    const Attention<T>& a;
    const int64_t depth, inner, outer, padded;  // numbers and tiles of a query, tiles of a value, keys
    bf16 *keys, *values, *query, *weights;
    float *scores, *sums;

    Head(const Attention<T>& a, char* packed)
        : a(a), depth(PARTS * a.size), inner((depth + 31) / 32), outer((a.size + 15) / 16),
          padded((a.keys + 31) / 32 * 32) {
        keys = (bf16*)packed;
        values = keys + padded * inner * 32;
        size_t query_size = 32 * inner * 64, weights_size = COPIES * 32 * STEP * 2;
        size_t scores_size = 32 * KEYS * 4, sums_size = (outer + 1) / 2 * 4096;
        char* at = (char*)scratch(query_size + weights_size + scores_size + sums_size);
        query = (bf16*)at;
        weights = (bf16*)(at + query_size);
        scores = (float*)(at + query_size + weights_size);
        sums = (float*)(at + query_size + weights_size + scores_size);
    }
    static size_t packed_bytes(const Attention<T>& a) {
        int64_t outer = (a.size + 15) / 16, inner = (PARTS * a.size + 31) / 32;
        return (a.keys + 31) / 32 * 32 * (inner * 64 + COPIES * outer * 32);
    }

    // Packs keys begin..end into tiles; put(from, to) writes a key in bfloat16.
    template <class Put> void pack_keys(const T* k, int64_t begin, int64_t end, Put put) const {
        bf16* rows = query;  // 16 keys, in memory that queries do not need yet
        for (int64_t n = begin; n < end; n += 16) {
            memset(rows, 0, 16 * inner * 64);
            for (int64_t i = 0; i < 16 && n + i < a.keys; i++)
                put(k + (n + i) * a.k_steps.row, rows + i * inner * 32);
            for (int64_t t = 0; t < inner; t++)
                pack_tile(rows + t * 32, inner * 32,
                          keys + (n / 32 * inner + t) * 1024 + n % 32 * 32);
        }
    }

    void clear_queries() const { memset(query, 0, 32 * inner * 64); }

    // Computes the scores of a pass; those beyond the last key are LEAST.
    void score(const Pass& p) const {
        fence();
        for (int64_t j = 0; j < p.count / 32; j++)
            products(2, query, inner * 32, depth, keys + (p.begin / 32 + j) * inner * 1024, 1024,
                     scores + j * 1024, 0, false);
        int64_t beyond = p.begin + p.count - a.keys;
        float* last = scores + (p.count / 32 - 1) * 1024;
        for (int64_t c = 32 - beyond; c < 32; c++)
            for (int64_t i = 0; i < 32; i++) last[place(i, c / 16) + c % 16] = LEAST;
    }

    void peaks(const Pass& p, float* most) const {
        for (int i = 0; i < 32; i++) {
            const float* s = scores + place(i, 0);
            vec peak = splat(most[i]);
            for (int64_t j = 0; j < p.count / 32; j++, s += 1024) {
                peak = larger(peak, floats(s));
                peak = larger(peak, floats(s + 256));
            }
            most[i] = top(peak);
        }
    }

    // The sums of query i, from tile t on.
    const float* summed(int64_t i, int64_t t) const { return sums + place(i, t); }

    void sum_up(float*) const {}
};
