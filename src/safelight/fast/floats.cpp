// Attention in float32 by vectors, for processors without AMX: some queries of a head at a time, over
// its keys a pass at a time (arXiv:2112.05682).
//
// Plain C interface: pointers and sizes, no Python and no torch headers.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

namespace {

// A register's numbers, and rows of sums that fit into the registers beside each other.
#ifdef __AVX512F__
const int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
const int LANES = 8, ROWS = 6;
#else
const int LANES = 4, ROWS = 6;
#endif
const int WIDE = 2 * LANES;         // columns of a panel
const long TALL = 4 * ROWS;         // queries of a block: keys and values are read once for all
const long KEYS = 256;              // of a pass: their scores stay in the first-level cache
const float LEAST = -1e30f;         // of a score
const float MOST = 1e15f;           // of a sum of weights: beyond, its product may overflow

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

inline vec splat(float x) { return x - vec{}; }
inline vec read(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline void write(float* p, vec x) { memcpy(p, &x, sizeof x); }

// 2^x, of -126 to 127. The polynomial's relative error is below 2e-7.
inline vec exp2(vec x) {
    x = x < -126.f ? splat(-126.f) : x;  // NaN, if x is
    x = x > 127.f ? splat(127.f) : x;
    const vec shift = splat(12582912.f);  // 1.5 * 2^23: what is added to it becomes whole
    vec n = (x + shift) - shift, f = x - n;
    vec y = splat(1.54035304e-4f);
    y = y * f + 1.33335581e-3f;
    y = y * f + 9.61812911e-3f;
    y = y * f + 5.55041087e-2f;
    y = y * f + 2.40226507e-1f;
    y = y * f + 6.93147182e-1f;
    y = y * f + 1.f;
    ints power = (__builtin_convertvector(x == x ? n : splat(0), ints) + 127) << 23;
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

// sums [rows][stride] = (or, with `add`, +=) a [ROWS][depth] · b [depth][WIDE].
template <int regs>
inline void multiply(const float* a, long a_row, const float* b, long b_row, long depth,
                     float* sums, long row, bool add) {
    vec found[ROWS][regs];
    for (int r = 0; r < ROWS; r++)
        for (int x = 0; x < regs; x++) found[r][x] = splat(0);
    for (long k = 0; k < depth; k++, b += b_row) {
        vec columns[regs];
        for (int x = 0; x < regs; x++) columns[x] = read(b + x * LANES);
        for (int r = 0; r < ROWS; r++) {
            vec one = splat(a[r * a_row + k]);
            for (int x = 0; x < regs; x++) found[r][x] += one * columns[x];
        }
    }
    // Added at the end: a sum of sums rounds less than one long sum.
    for (int r = 0; r < ROWS; r++)
        for (int x = 0; x < regs; x++) {
            float* to = sums + r * row + x * LANES;
            write(to, add ? read(to) + found[r][x] : found[r][x]);
        }
}

// A place in [batch, length, heads, size]: numbers between neighbours; the last lie side by side.
struct Steps {
    long batch, row, head;
};

struct Attend {
    const float *q, *k, *v;
    float* out;
    Steps qs, ks, vs, os;
    long heads, queries, keys, size;
    float scale;
    long padded() const { return (keys + WIDE - 1) / WIDE * WIDE; }
    long across() const { return (size + LANES - 1) / LANES * LANES; }  // of a value
};

// What a thread works in, for one head at a time.
struct Head {
    const Attend& a;
    char* memory;
    float *keys, *values, *query, *scores, *sums;

    explicit Head(const Attend& a) : a(a) {
        long sizes[] = {a.padded() * a.size, a.padded() * a.across(), TALL * a.size, TALL * KEYS,
                        TALL * a.across()};
        long total = 0;
        for (long size : sizes) total += (size + 15) / 16 * 16;
        memory = (char*)aligned_alloc(64, total * 4);
        float** places[] = {&keys, &values, &query, &scores, &sums};
        float* at = (float*)memory;
        for (int i = 0; i < 5; i++) *places[i] = at, at += (sizes[i] + 15) / 16 * 16;
    }
    ~Head() { free(memory); }

    // Keys in panels [size][WIDE]; values in rows. Those beyond the last are zeros.
    void pack(long b, long head) {
        const float* k = a.k + b * a.ks.batch + head * a.ks.head;
        const float* v = a.v + b * a.vs.batch + head * a.vs.head;
        memset(values, 0, a.padded() * a.across() * 4);
        for (long n = 0; n < a.padded(); n++) {
            float* panel = keys + n / WIDE * WIDE * a.size + n % WIDE;
            for (long c = 0; c < a.size; c++)
                panel[c * WIDE] = n < a.keys ? k[n * a.ks.row + c] : 0;
            if (n < a.keys) memcpy(values + n * a.across(), v + n * a.vs.row, a.size * 4);
        }
    }

    void score(long begin, long count) {
        for (long r = 0; r < TALL; r += ROWS)
            for (long n = 0; n < count; n += WIDE)
                multiply<2>(query + r * a.size, a.size, keys + (begin + n) * a.size, WIDE, a.size,
                            scores + r * KEYS + n, KEYS, false);
        for (long n = a.keys - begin; n < count; n++)
            for (long r = 0; r < TALL; r++) scores[r * KEYS + n] = LEAST;
    }

    void peaks(long count, float* most) const {
        for (long r = 0; r < TALL; r++) {
            vec top = splat(most[r]);
            for (long n = 0; n < count; n += LANES) {
                vec s = read(scores + r * KEYS + n);
                top = s > top ? s : top;
            }
            for (int i = 0; i < LANES; i++) most[r] = top[i] > most[r] ? top[i] : most[r];
        }
    }

    // Scores become weights, exp(score - most).
    void soften(long count, const float* most, float* total) {
        for (long r = 0; r < TALL; r++) {
            vec all = splat(0), shift = splat(most[r]);
            for (long n = 0; n < count; n += LANES) {
                float* s = scores + r * KEYS + n;
                vec weight = exp2(read(s) - shift);
                write(s, weight);
                all += weight;
            }
            for (int i = 0; i < LANES; i++) total[r] += all[i];
        }
    }

    void weigh(long begin, long count) {
        long across = a.across();
        for (long r = 0; r < TALL; r += ROWS)
            for (long c = 0; c < across; c += WIDE) {
                const float *weights = scores + r * KEYS, *v = values + begin * across + c;
                float* to = sums + r * across + c;
                if (c + WIDE <= across)
                    multiply<2>(weights, KEYS, v, across, count, to, across, begin);
                else
                    multiply<1>(weights, KEYS, v, across, count, to, across, begin);
            }
    }

    template <class Do> void each_pass(Do act) {
        for (long begin = 0; begin < a.padded(); begin += KEYS)
            act(begin, a.padded() - begin < KEYS ? a.padded() - begin : KEYS);
    }

    // exp is taken of a score's distance to the largest of the first pass. Any number not far below
    // the largest of all does: floats lose nothing by a factor. False if it was too far below.
    bool attend_by(float* most, float* total) {
        for (long r = 0; r < TALL; r++) total[r] = 0;
        each_pass([&](long begin, long count) {
            score(begin, count);
            if (begin == 0) peaks(count, most);
            soften(count, most, total);
            weigh(begin, count);
        });
        bool fine = true;
        for (long r = 0; r < TALL; r++) fine = fine && total[r] < MOST;
        return fine;
    }

    void rows(const float* q, float* out, long count) {
        memset(query, 0, TALL * a.size * 4);
        for (long r = 0; r < count; r++)
            for (long c = 0; c < a.size; c++)  // in powers of 2
                query[r * a.size + c] = q[r * a.qs.row + c] * (a.scale * 1.44269504f);
        float most[TALL], total[TALL];
        for (long r = 0; r < TALL; r++) most[r] = LEAST;
        if (!attend_by(most, total)) {
            each_pass([&](long begin, long count) {
                score(begin, count);
                peaks(count, most);
            });
            attend_by(most, total);
        }
        for (long r = 0; r < count; r++)
            for (long c = 0; c < a.size; c++)
                out[r * a.os.row + c] = sums[r * a.across() + c] / total[r];
    }
};

}  // namespace

extern "C" {

// softmax(q·kᵀ·scale)·v of [batch, length, heads, size], each at its own steps.
void safelight_attend_floats(const float* q, const float* k, const float* v, float* out,
                             const long* s, long batch, long heads, long queries, long keys,
                             long size, float scale) {
    Attend a{q, k, v, out, {s[0], s[1], s[2]}, {s[3], s[4], s[5]}, {s[6], s[7], s[8]},
             {s[9], s[10], s[11]}, heads, queries, keys, size, scale};
    long threads = omp_get_max_threads(), parts = batch * heads % threads ? threads : 1;
    long blocks = (queries + TALL - 1) / TALL;
#pragma omp parallel
    {
        Head h(a);
#pragma omp for schedule(static)
        for (long task = 0; task < batch * heads * parts; task++) {
            long part = task % parts, head = task / parts % heads, b = task / parts / heads;
            h.pack(b, head);
            for (long i = blocks * part / parts; i < blocks * (part + 1) / parts; i++) {
                long left = queries - TALL * i;
                h.rows(q + b * a.qs.batch + head * a.qs.head + TALL * i * a.qs.row,
                       out + b * a.os.batch + head * a.os.head + TALL * i * a.os.row,
                       left < TALL ? left : TALL);
            }
        }
    }
}

}  // extern "C"
