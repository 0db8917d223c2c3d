// Attention for all precisions: some queries of a head at a time, over its keys a pass at a time
// (arXiv:2112.05682).
#pragma once

#include "call.h"

const int64_t KEYS = 256;        // keys of a pass: their scores stay near the first-level cache
const int64_t PACKED = 16 << 20; // bytes of packed keys and values in memory at once
const float LEAST = -1e30f;      // the lowest score
const float MOST = 1e15f;        // the largest sum of weights: beyond it products with values may overflow

// Strides of [batch, length, heads, size], in numbers; the last one is 1.
struct Steps {
    int64_t batch, row, head;
};

// softmax(q·kᵀ·scale)·v of [batch, length, heads, size], each with strides of its own.
template <class T> struct Attention {
    const T *q, *k, *v;
    T* out;
    Steps q_steps, k_steps, v_steps, out_steps;
    int64_t batch, heads, queries, keys, size;
    float scale;
};

// One pass: a block's queries by up to KEYS keys, from the padded ones.
struct Pass {
    int64_t begin, count;
};

template <class Kernel, class Do> void each_pass(const Kernel& h, Do act) {
    for (int64_t begin = 0; begin < h.padded; begin += KEYS)
        act(Pass{begin, h.padded - begin < KEYS ? h.padded - begin : KEYS});
}

// Subtracts the largest score of the first pass from scores before exp. Any number that is not far below
// the largest of all will do: a factor costs floats no precision. Returns false if it was too far below.
template <class Kernel> bool attend_by(const Kernel& h, float* most, float* total) {
    for (int i = 0; i < Kernel::TALL; i++) total[i] = 0;
    each_pass(h, [&](const Pass& p) {
        h.score(p);
        if (p.begin == 0) h.peaks(p, most);
        h.soften(p, most, total);
        h.weigh(p);
    });
    h.sum_up(total);
    bool fine = true;
    for (int i = 0; i < Kernel::TALL; i++) fine = fine && total[i] < MOST;
    return fine;
}

template <class Kernel, class T>
void attend_rows(const Kernel& h, const T* q, T* out, int64_t count) {
    h.clear_queries();
    for (int64_t i = 0; i < count; i++) h.lay(i, q + i * h.a.q_steps.row);
    float most[Kernel::TALL], total[Kernel::TALL];
    for (int i = 0; i < Kernel::TALL; i++) most[i] = LEAST;
    if (!attend_by(h, most, total)) {
        each_pass(h, [&](const Pass& p) {
            h.score(p);
            h.peaks(p, most);
        });
        attend_by(h, most, total);
    }
    for (int64_t i = 0; i < count; i++) h.write(i, out + i * h.a.out_steps.row, total[i]);
}

// With many heads, a free thread takes the next head. With few, all threads pack keys and values, and then
// a free thread takes the next block of queries.
//
// A Kernel computes one head in a thread's scratch memory. It is made from the arguments and memory of
// packed_bytes(a) for the head's packed keys and values, and has
//   Number, TALL, padded                type of numbers; queries in a block; keys, with padding
//   void pack(k, v, begin, end)         packs keys and values begin..end, of the padded ones
//   void clear_queries(), lay(i, from)  set all queries to zero; write query i
//   void score(p), peaks(p, most)       scores of a pass; raises most to the largest of each query
//   void soften(p, most, total)         makes weights exp(score - most); adds their sums to total
//   void weigh(p)                       adds weights·values to sums
//   void sum_up(total)                  writes the sums of weights, if soften does not add them
//   void write(i, out, total)           writes the result of query i
template <class Kernel> const char* attend(const Attention<typename Kernel::Number>& a) {
    REQUIRE(sizes({a.batch, a.heads, a.queries, a.keys, a.size}));
    const int64_t heads = a.batch * a.heads;
    if (!heads || !a.queries || !a.size) return nullptr;
    REQUIRE(a.keys > 0);
    REQUIRE(pointers(a.q, a.k, a.v, a.out));
    const int64_t threads = omp_get_max_threads(), each = Kernel::packed_bytes(a);
    const int64_t blocks = (a.queries + Kernel::TALL - 1) / Kernel::TALL;
    const int64_t passes = (a.keys + KEYS - 1) / KEYS, room = PACKED / each + 1;
    const bool many = heads >= 4 * threads;
    const int64_t group = many ? threads : room < heads ? room : heads;
    const int64_t share = group * blocks / (8 * threads) + 1;
    static thread_local Memory held;
    if (!held.need(group * each)) return "memory";
    char* const packed = held.at;

    auto pack = [&](int64_t n, const Kernel& h, int64_t pass) {
        const int64_t b = n / a.heads, head = n % a.heads, begin = pass * KEYS;
        h.pack(a.k + b * a.k_steps.batch + head * a.k_steps.head,
               a.v + b * a.v_steps.batch + head * a.v_steps.head, begin,
               h.padded - begin < KEYS ? h.padded : begin + KEYS);
    };
    auto attend_block = [&](int64_t n, const Kernel& h, int64_t block) {
        const int64_t b = n / a.heads, head = n % a.heads, row = block * Kernel::TALL;
        attend_rows(h, a.q + b * a.q_steps.batch + head * a.q_steps.head + row * a.q_steps.row,
                    a.out + b * a.out_steps.batch + head * a.out_steps.head + row * a.out_steps.row,
                    a.queries - row < Kernel::TALL ? a.queries - row : Kernel::TALL);
    };
#pragma omp parallel
    {
        Tiles tiles;
        if (many) {
            const Kernel h(a, packed + omp_get_thread_num() * each);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < heads; n++) {
                for (int64_t pass = 0; pass < passes; pass++) pack(n, h, pass);
                for (int64_t block = 0; block < blocks; block++) attend_block(n, h, block);
            }
        }
        for (int64_t first = 0; first < heads && !many; first += group) {
            const int64_t count = heads - first < group ? heads - first : group;
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * passes; i++)
                pack(first + i / passes, Kernel(a, packed + i / passes * each), i % passes);
#pragma omp for schedule(dynamic, share)
            for (int64_t i = 0; i < count * blocks; i++)
                attend_block(first + i / blocks, Kernel(a, packed + i / blocks * each), i % blocks);
        }
    }
    if (held.size > 2 * PACKED) held.release();  // of a large picture: others do not need it
    return nullptr;
}
