// Attention, 32 queries of a head at a time, over its keys a pass at a time
// (arXiv:2112.05682): what bfloat16 and split float32 share.
#pragma once

#include "kernel.h"

namespace {

const long KEYS = 256;           // of one pass: their scores stay near the first-level cache
const long STEP = KEYS + 32;     // numbers between two rows of weights
const float LEAST = -1e30f;      // of a score
const float MOST = 1e15f;        // of a sum of weights: beyond, its product with values may overflow

// A place in [batch, length, heads, size]: numbers between neighbours; the last lie side by side.
struct Steps {
    long batch, row, head;
};

template <class T> struct Attend {
    const T *q, *k, *v;
    T* out;
    Steps qs, ks, vs, os;
    long batch, heads, queries, keys, size;
    float scale;
    long outer() const { return (size + 15) / 16; }   // tiles of a value
    long padded() const { return (keys + 31) / 32 * 32; }
};

template <class T>
Attend<T> attention(const T* q, const T* k, const T* v, T* out, const long* s, long batch,
                    long heads, long queries, long keys, long size, float scale) {
    return {q, k, v, out, {s[0], s[1], s[2]}, {s[3], s[4], s[5]}, {s[6], s[7], s[8]},
            {s[9], s[10], s[11]}, batch, heads, queries, keys, size, scale};
}

// One pass: 32 queries by up to KEYS keys, in whole groups of 32.
struct Pass {
    long begin, count;
};

// One head's numbers, in a thread's scratch. A kernel is made of it by adding
//   void pack(b, head)               keys and values, into tiles
//   void lay(i, from)                query i; what is not written is zero
//   void soften(p, most, total)      exp(score - most) as weights; their sums are added to total
//   void weigh(p)                    adds weights·values to sums
//   void sum_up(total)               if the sums of weights come otherwise
//   void write(i, out, factor)       sums of query i
template <class T> struct Head {
    typedef T Number;
    const Attend<T>& a;
    const long inner;    // tiles of a query
    const long depth;    // numbers of it that are not zero
    bf16 *query, *keys;
    float *scores, *sums;
    char* rest;          // of the scratch: for the kernel's own

    Head(const Attend<T>& a, long inner, long depth, size_t more)
        : a(a), inner(inner), depth(depth) {
        size_t query_size = 32 * inner * 64, keys_size = a.padded() * inner * 64;
        size_t scores_size = 32 * KEYS * 4, sums_size = (a.outer() + 1) / 2 * 4096;
        char* at = (char*)scratch(query_size + keys_size + scores_size + sums_size + more);
        query = (bf16*)at, at += query_size;
        keys = (bf16*)at, at += keys_size;
        scores = (float*)at, at += scores_size;
        sums = (float*)at, rest = at + sums_size;
    }

    template <class U> U* take_room(size_t bytes) {
        char* at = rest;
        rest += bytes;
        return (U*)at;
    }

    // The scores of a pass; those beyond the last key are as low as can be.
    void score(const Pass& p) const {
        for (long j = 0; j < p.count / 32; j++)
            products(2, query, inner * 32, depth, keys + (p.begin / 32 + j) * inner * 1024, 1024,
                     scores + j * 1024, 0, false);
        long beyond = p.begin + p.count - a.keys;
        float* last = scores + (p.count / 32 - 1) * 1024;
        for (long c = 32 - beyond; c < 32; c++)
            for (long i = 0; i < 32; i++) last[place(i, c / 16) + c % 16] = LEAST;
    }

    // The largest score of each query, or what it was before.
    void peaks(const Pass& p, float* most) const {
        for (int i = 0; i < 32; i++) {
            const float* s = scores + place(i, 0);
            vec peak = splat(most[i]);
            for (long j = 0; j < p.count / 32; j++, s += 1024) {
                peak = larger(peak, floats(s));
                peak = larger(peak, floats(s + 256));
            }
            most[i] = top(peak);
        }
    }

    // Where the values of a query are, from tile t on.
    const float* summed(long i, long t) const { return sums + place(i, t); }

    void sum_up(float*) const {}
};

template <class Kernel, class Do> void each_pass(const Kernel& h, Do act) {
    for (long begin = 0; begin < h.a.padded(); begin += KEYS)
        act(Pass{begin, h.a.padded() - begin < KEYS ? h.a.padded() - begin : KEYS});
}

// exp is taken of a score's distance to the largest of the first pass. Any number not far below the
// largest of all does: floats lose nothing by a factor. False if that one was too far below.
template <class Kernel> bool attend_by(const Kernel& h, float* most, float* total) {
    for (int i = 0; i < 32; i++) total[i] = 0;
    each_pass(h, [&](const Pass& p) {
        h.score(p);
        if (p.begin == 0) h.peaks(p, most);
        h.soften(p, most, total);
        fence();
        h.weigh(p);
    });
    h.sum_up(total);
    bool fine = true;
    for (int i = 0; i < 32; i++) fine = fine && total[i] < MOST;
    return fine;
}

template <class Kernel, class T>
void attend_rows(const Kernel& h, const T* q, T* out, long count) {
    memset(h.query, 0, 32 * h.inner * 64);
    for (long i = 0; i < count; i++) h.lay(i, q + i * h.a.qs.row);
    fence();
    float most[32], total[32];
    for (int i = 0; i < 32; i++) most[i] = LEAST;
    if (!attend_by(h, most, total)) {
        each_pass(h, [&](const Pass& p) {
            h.score(p);
            h.peaks(p, most);
        });
        attend_by(h, most, total);
    }
    for (long i = 0; i < count; i++) h.write(i, out + i * h.a.os.row, 1.f / total[i]);
}

template <class Kernel> void attend(const Attend<typename Kernel::Number>& a) {
    long threads = omp_get_max_threads(), parts = a.batch * a.heads % threads ? threads : 1;
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(static)
        for (long task = 0; task < a.batch * a.heads * parts; task++) {
            long part = task % parts, head = task / parts % a.heads, b = task / parts / a.heads;
            Kernel h(a);
            h.pack(b, head);
            long blocks = (a.queries + 31) / 32;
            for (long i = blocks * part / parts; i < blocks * (part + 1) / parts; i++)
                attend_rows(h, a.q + b * a.qs.batch + head * a.qs.head + 32 * i * a.qs.row,
                            a.out + b * a.os.batch + head * a.os.head + 32 * i * a.os.row,
                            a.queries - 32 * i < 32 ? a.queries - 32 * i : 32);
        }
    }
}

}  // namespace
