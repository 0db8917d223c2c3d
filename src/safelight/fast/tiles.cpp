// Convolutions and attention in bfloat16 on AMX tiles, and the norms and gates beside them. Float32
// sums throughout; results are rounded once.
//
// A tile holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 numbers with 32x16
// packed weights. Every product here is made of blocks of 32 rows by 32 columns: two tiles of
// rows and two of weights give four tiles of sums, one load for each product.
//
// Plain C interface: pointers and sizes, no Python and no torch headers.

#include "attention.h"

namespace {

inline __m512 silu(__m512 x) {
    __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.f)));
}

// Where the rows of a convolution are read and written. A row is a position of the output map. The
// map that is read is cut into planes of 32 channels, so that 16 positions one after the other
// are one tile, and what the taps of a plane read lies close together.
struct Rows {
    long count;                 // rows, those that are not written among them
    long height, width;         // of the map that is read, without its border
    long padded_h, padded_w;    // with it
    bool narrow;                // the map's rows are no multiple of 16: walk the padded map
    long each;                  // rows of one image
    long spread, down, right;   // the output is every `spread`-th pixel, from there on

    long input(long m) const {
        long image = m / each, p = m % each;
        long at = narrow ? p : p / width * padded_w + p % width;
        return (image * padded_h * padded_w + at) * 32;
    }
    long output(long m) const {  // -1 for a position that is none
        if (!narrow && spread == 1) return m;
        long wide = narrow ? padded_w : width;
        long image = m / each, p = m % each, y = p / wide, x = p % wide;
        if (y >= height || x >= width) return -1;
        return ((image * height + y) * spread + down) * width * spread + x * spread + right;
    }
};

struct Convolution {
    const bf16* in;
    Rows rows;
    const bf16* weights;    // [columns/32][planes][taps][1024]
    const long* offsets;    // of each tap, in numbers from a row's place
    int taps;
    long planes, plane;     // how many, and numbers from one to the next
    long columns;
    const float* bias;      // [columns], or [images][columns]
    long bias_step;
    const bf16* plus;       // added, as wide as the output; or null
    bf16* out;
};

// 32 rows by a panel of 32 columns: of each of `planes`, all taps. Meanwhile `ahead` lines of
// `next`, what will be read later, are fetched for every tile of a row.
inline void multiply(const bf16* top, const bf16* low, long planes, long plane,
                     const long* offsets, int taps, const bf16* w, const char* next, long ahead) {
    for (long k = 0; k < planes; k++, top += plane, low += plane)
        for (int t = 0; t < taps; t++, w += 1024) {
            _tile_loadd(4, top + offsets[t], 64);
            _tile_loadd(6, w, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, low + offsets[t], 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (long i = 0; i < ahead; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        }
}

// Four tiles of sums [2][2][16][16] become 32 rows of the output.
void finish(const Convolution& p, const float* sums, long m, long m_end, long n) {
    for (int half = 0; half < 2; half++, m += 16, sums += 512) {
        if (m >= m_end) return;
        // Sixteen rows are of one image.
        const float* bias = p.bias ? p.bias + m / p.rows.each * p.bias_step + n : nullptr;
        __m512 bias_left = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
        __m512 bias_right = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
        for (long r = 0; r < 16 && m + r < m_end; r++) {
            long row = p.rows.output(m + r);
            if (row < 0) continue;
            bf16* out = p.out + row * p.columns + n;
            __m512 left = _mm512_add_ps(_mm512_load_ps(sums + r * 16), bias_left);
            __m512 right = _mm512_add_ps(_mm512_load_ps(sums + 256 + r * 16), bias_right);
            if (p.plus) {
                const bf16* plus = p.plus + row * p.columns + n;
                left = _mm512_add_ps(left, load(plus));
                right = _mm512_add_ps(right, load(plus + 16));
            }
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(right, left));
        }
    }
}

// Numbers of a map that stay in the second-level cache, and tiles of weights.
const long INPUT = 1 << 18, PANEL = 96;

long planes_at_once(const Convolution& p) {
    long most = PANEL / p.taps;
    return most < 1 ? 1 : most < p.planes ? most : p.planes;
}

// Rows m0..m1 by columns n0..n1. Of each panel of 32 columns, the weights for a few planes stay in
// the cache while the rows pass; the rows' sums wait for the next planes.
void region(const Convolution& p, long m0, long m1, long n0, long n1) {
    long tall = (m1 - m0 + 31) / 32;
    long* at = (long*)scratch((2 * tall + 8) * 8 + (tall + 1) * 4096);
    float* held = (float*)(at + (2 * tall + 7) / 8 * 8);
    for (long i = 0; i < 2 * tall; i++) {
        long m = m0 + 16 * i;
        at[i] = m < p.rows.count ? p.rows.input(m) : at[i - 1];
    }
    long most = planes_at_once(p);
    const bf16* w = p.weights + n0 * p.planes * p.taps * 32;
    // A block's sums are finished while the next block's are made: what tiles have stored cannot
    // be read at once.
    const float* ready = nullptr;
    long ready_m = 0, ready_n = 0, turn = 0;
    for (long n = n0; n < n1; n += 32)
        for (long first = 0; first < p.planes; first += most) {
            long planes = p.planes - first < most ? p.planes - first : most;
            long tiles = planes * p.taps;
            bool last = first + planes == p.planes;
            long ahead = (32 + tall - 1) / tall;  // of the next weights' lines, by each block
            const bf16* in = p.in + first * p.plane;
            for (long i = 0; i < tall; i++) {
                float* sums = held + (planes == p.planes ? turn++ & 1 : i) * 1024;
                if (first == 0) clear();
                else take(sums);
                multiply(in + at[2 * i], in + at[2 * i + 1], planes, p.plane, p.offsets,
                         p.taps, w, (const char*)(w + tiles * 1024) + i * ahead * tiles * 64,
                         i * ahead < 32 && (n + 32 < n1 || !last) ? ahead : 0);
                if (ready) finish(p, ready, ready_m, m1, ready_n);
                give(sums);
                ready = last ? sums : nullptr, ready_m = m0 + 32 * i, ready_n = n;
            }
            w += tiles * 1024;
        }
    if (ready) finish(p, ready, ready_m, m1, ready_n);
}

void run(const Convolution& p) {
    long threads = omp_get_max_threads(), panels = p.columns / 32;
    long tall = INPUT / (planes_at_once(p) * 32) / 32 * 32;
    long chunks = (p.rows.count + tall - 1) / tall;
    if (chunks < 2 * threads && p.rows.count >= 64 * threads) {
        chunks = (chunks + threads - 1) / threads * threads;
        tall = ((p.rows.count + chunks - 1) / chunks + 31) / 32 * 32;
        chunks = (p.rows.count + tall - 1) / tall;
    }
    long splits = 1;
    if (chunks % threads || tall * chunks - p.rows.count >= tall / 4) splits = threads;
    regions(p.rows.count, tall, panels, splits, [&](long m0, long m1, long n0, long n1) {
        region(p, m0, m1, n0 * 32, n1 * 32);
    });
}

// --- attention ----------------------------------------------------------------------------------

const bf16 ONE = 0x3f80, NOT_A_NUMBER = 0x7fc0;

// How far f, of 128, is above 128·(2^(f/128) - 1).
struct Fractions {
    uint8_t apart[128];
    Fractions() {
        for (int f = 0; f < 128; f++) apart[f] = f - lround(128 * (pow(2, f / 128.0) - 1));
    }
};

// The weights lie in the order in which two registers of scores are packed into one: which of 32
// keys is at a place.
inline long key_at(long place) { return place % 8 / 4 * 16 + place / 8 * 4 + place % 4; }

struct Rounded : Head<bf16> {
    bf16 *values, *weights;
    const bool counted;    // a column of ones beside the values sums up the weights

    explicit Rounded(const Attend<bf16>& a)
        : Head(a, (a.size + 31) / 32, a.padded() * a.outer() * 32 + 32 * STEP * 2),
          counted(a.size % 16) {
        values = take_room<bf16>(a.padded() * a.outer() * 32);
        weights = take_room<bf16>(32 * STEP * 2);
    }

    // What is no number in a key would become a weight of 0, as 2^x is made here: then the value is
    // none either.
    bool finite(const bf16* key) const {
        bool found = true;
        for (long c = 0; c < a.size; c++) found &= (key[c] & 0x7f80) != 0x7f80;
        return found;
    }

    void pack(long b, long head) const {
        const bf16* k = a.k + b * a.ks.batch + head * a.ks.head;
        const bf16* v = a.v + b * a.vs.batch + head * a.vs.head;
        alignas(64) bf16 row[16 * 32];
        for (long n = 0; n < a.padded(); n += 16)
            for (long t = 0; t < inner; t++) {
                memset(row, 0, sizeof row);
                long width = a.size - 32 * t < 32 ? a.size - 32 * t : 32;
                for (long i = 0; i < 16 && n + i < a.keys; i++)
                    memcpy(row + 32 * i, k + (n + i) * a.ks.row + 32 * t, width * 2);
                pack_tile(row, 32, keys + (n / 32 * inner + t) * 1024 + n % 32 * 32);
            }
        for (long n = 0; n < a.padded(); n += 32)
            for (long t = 0; t < a.outer(); t++) {
                bf16* to = values + n * a.outer() * 16 + t * 512;
                long width = a.size - 16 * t < 16 ? a.size - 16 * t : 16;
                for (long i = 0; i < 32; i++) {
                    long key = n + key_at(i);
                    bool good = key >= a.keys || finite(k + key * a.ks.row);
                    for (long c = 0; c < 16; c++)
                        to[i / 2 * 32 + 2 * c + i % 2] =
                            !good           ? NOT_A_NUMBER
                            : key >= a.keys ? 0
                            : c < width     ? v[key * a.vs.row + 16 * t + c]
                            : c == width    ? ONE
                                            : 0;
                }
            }
    }

    void lay(long i, const bf16* from) const { memcpy(query + i * inner * 32, from, a.size * 2); }

    // In bfloat16 2^x needs no polynomial (N. Schraudolph, 1999, with a table in place of his
    // constant): as an integer of 1/128ths, x has its whole part where a float has its exponent,
    // and beside it the fraction f where 2^f - 1 belongs. A table tells how far apart these are.
    template <bool sum_them> void soften_by(const Pass& p, const float* most, float* total) const {
        alignas(64) static const Fractions table;
        const __m512i low = _mm512_load_si512(table.apart);
        const __m512i high = _mm512_load_si512(table.apart + 64);
        const __m512 factor = _mm512_set1_ps(128 * a.scale * LOG2E);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(ONE);
        for (int i = 0; i < 32; i++) {
            const float* s = scores + row(i);
            __m512 shift = _mm512_set1_ps(128 * (127 - most[i] * a.scale * LOG2E));
            __m512 sum = _mm512_setzero_ps();
            bf16* w = weights + i * STEP;
            for (long j = 0; j < p.count / 32; j++, s += 1024, w += 32) {
                __m512 x = _mm512_fmadd_ps(_mm512_load_ps(s), factor, shift);
                __m512 y = _mm512_fmadd_ps(_mm512_load_ps(s + 256), factor, shift);
                __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32(x), _mm512_cvtps_epi32(y));
                both = _mm512_max_epi16(both, _mm512_setzero_si512());
                __m512i apart = _mm512_maskz_permutex2var_epi8(0x5555555555555555, low, both, high);
                both = _mm512_sub_epi16(both, apart);
                if (sum_them) sum = _mm512_dpbf16_ps(sum, (__m512bh)both, ones);
                _mm512_storeu_si512(w, both);
            }
            if (sum_them) total[i] += _mm512_reduce_add_ps(sum);
        }
    }
    void soften(const Pass& p, const float* most, float* total) const {
        if (counted) soften_by<false>(p, most, total);
        else soften_by<true>(p, most, total);
    }
    void sum_up(float* total) const {
        for (int i = 0; counted && i < 32; i++) total[i] = summed(i, a.outer() - 1)[a.size % 16];
    }

    void weigh(const Pass& p) const {
        for (long t = 0; t < a.outer(); t += 2) {
            const bf16* v = values + p.begin * a.outer() * 16 + t * 512;
            bool two = t + 1 < a.outer();
            if (p.begin) take(sums + t * 512);
            else clear();
            for (long j = 0; j < p.count / 32; j++, v += a.outer() * 512) {
                _tile_loadd(4, weights + 32 * j, STEP * 2);
                _tile_loadd(6, v, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, weights + 32 * j + 16 * STEP, STEP * 2);
                _tile_dpbf16ps(2, 5, 6);
                if (!two) continue;
                _tile_loadd(7, v + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            give(sums + t * 512);
        }
    }

    void write(long i, bf16* out, float factor) const {
        for (long c = 0; c < a.size; c += 16) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(summed(i, c / 16)), _mm512_set1_ps(factor));
            _mm256_mask_storeu_epi16(out + c, within(c, a.size), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }
};

}  // namespace

extern "C" {

// softmax(q·kᵀ·scale)·v of [batch, length, heads, size], each at its own steps.
void safelight_attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, const long* steps,
                      long batch, long heads, long queries, long keys, long size, float scale) {
    attend<Rounded>(
        attention(q, k, v, out, steps, batch, heads, queries, keys, size, scale));
}

// Asks the kernel for the tiles' registers: 1 if this process may use them.
int safelight_init() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// weights [columns][blocks·32] into the order that products want.
void safelight_pack(const bf16* w, bf16* out, long columns, long blocks) {
#pragma omp parallel for
    for (long n = 0; n < columns / 16; n++)
        for (long k = 0; k < blocks; k++)
            pack_tile(w + (n * 16 * blocks + k) * 32, blocks * 32,
                      out + (n / 2 * blocks + k) * 1024 + n % 2 * 512);
}

// A side by side convolution of what safelight_lay wrote, a map with a border of `border` positions
// in all between its rows; `plane` numbers lie between its planes, and `in` is readable for 16 +
// side·(width + border) positions beyond the last. Where `spread` is 2, the result is one of the
// four pixels (down, right) that each pixel of an output twice as large is made of, and taps begin
// there, too.
void safelight_conv(const bf16* in, long plane, const bf16* weights, const float* bias,
                    long bias_step, const bf16* plus, bf16* out, long images, long height,
                    long width, long border, long channels, long columns, int side, long spread,
                    long down, long right) {
    long padded_w = width + border, padded_h = height + border, offsets[25];
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++)
            offsets[y * side + x] = ((y + down) * padded_w + x + right) * 32;
    bool narrow = width % 16;
    long each = narrow ? (height * padded_w + 15) / 16 * 16 : height * width;
    Rows rows{images * each, height, width, padded_h, padded_w, narrow, each,
              spread, down, right};
    run(Convolution{in, rows, weights, offsets, side * side, channels / 32, plane, columns, bias,
                bias_step, plus, out});
}

// Of a group norm of a map [images, positions, channels]: each channel's factor and addend, as
// [images][2][channels]. scale, shift: [channels].
void safelight_moments(const bf16* in, const float* scale, const float* shift, float* factors,
                       long images, long positions, long channels, long groups, float eps) {
    long threads = omp_get_max_threads(), row = images * 2 * channels;
    float* sums = (float*)aligned_alloc(64, (threads * row * 4 + 63) / 64 * 64);
    memset(sums, 0, threads * row * 4);
#pragma omp parallel num_threads(threads)
    {
        long t = omp_get_thread_num(), team = omp_get_num_threads();
        for (long i = 0; i < images; i++) {
            float *sum = sums + t * row + i * 2 * channels, *square = sum + channels;
            long begin = positions * t / team, end = positions * (t + 1) / team;
            // A few positions at a time, so that their lines are still there for the next channels.
            for (long p = begin; p < end; p += 16) {
                long last = p + 16 < end ? p + 16 : end;
                for (long c = 0; c < channels; c += 16) {
                    __m512 s = _mm512_loadu_ps(sum + c), q = _mm512_loadu_ps(square + c);
                    for (long n = p; n < last; n++) {
                        __m512 v = load(in + (i * positions + n) * channels + c);
                        s = _mm512_add_ps(s, v);
                        q = _mm512_fmadd_ps(v, v, q);
                    }
                    _mm512_storeu_ps(sum + c, s);
                    _mm512_storeu_ps(square + c, q);
                }
            }
        }
    }
    long size = channels / groups;
    for (long i = 0; i < images; i++)
        for (long g = 0; g < groups; g++) {
            double s = 0, q = 0;
            for (long t = 0; t < threads; t++)
                for (long c = g * size; c < (g + 1) * size; c++) {
                    s += sums[t * row + i * 2 * channels + c];
                    q += sums[t * row + (i * 2 + 1) * channels + c];
                }
            double n = double(size) * positions, mean = s / n, var = q / n - mean * mean;
            double factor = 1 / sqrt((var > 0 ? var : 0) + eps);
            for (long c = g * size; c < (g + 1) * size; c++) {
                factors[i * 2 * channels + c] = float(factor * scale[c]);
                factors[(i * 2 + 1) * channels + c] = float(shift[c] - mean * factor * scale[c]);
            }
        }
    free(sums);
}

// in · factor + addend of a map [images, positions, channels].
void safelight_normalise(const bf16* in, const float* factors, bf16* out, long images,
                         long positions, long channels) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < images * positions; p++) {
        const float *factor = factors + p / positions * 2 * channels, *addend = factor + channels;
        for (long c = 0; c < channels; c += 16)
            store(out + p * channels + c,
                  _mm512_fmadd_ps(load(in + p * channels + c), _mm512_loadu_ps(factor + c),
                                  _mm512_loadu_ps(addend + c)));
    }
}

// Layer norm of rows of `channels`, a multiple of 16. With `plus`, of the sum of both, which goes
// to `sum`.
void safelight_layer_norm(const bf16* in, const bf16* plus, bf16* sum, const float* scale,
                          const float* shift, bf16* out, long rows, long channels, float eps) {
#pragma omp parallel
    {
        float* row = (float*)scratch(channels * 4);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            __m512 total = _mm512_setzero_ps(), square = _mm512_setzero_ps();
            for (long c = 0; c < channels; c += 16) {
                __m512 v = load(in + r * channels + c);
                if (plus) {
                    bf16* to = sum + r * channels + c;
                    store(to, _mm512_add_ps(v, load(plus + r * channels + c)));
                    v = load(to);
                }
                _mm512_store_ps(row + c, v);
                total = _mm512_add_ps(total, v);
            }
            __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / channels);
            for (long c = 0; c < channels; c += 16) {
                __m512 v = _mm512_sub_ps(_mm512_load_ps(row + c), mean);
                _mm512_store_ps(row + c, v);
                square = _mm512_fmadd_ps(v, v, square);
            }
            float var = _mm512_reduce_add_ps(square) / channels;
            __m512 factor = _mm512_set1_ps(1 / sqrtf(var + eps));
            for (long c = 0; c < channels; c += 16)
                store(out + r * channels + c,
                      _mm512_fmadd_ps(_mm512_mul_ps(_mm512_load_ps(row + c), factor),
                                      _mm512_loadu_ps(scale + c), _mm512_loadu_ps(shift + c)));
        }
    }
}

// value · gelu(gate), of `count` numbers, a multiple of 16 of them.
void safelight_gate(const bf16* value, const bf16* gate, bf16* out, long count) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += 16)
        store(out + i, _mm512_mul_ps(load(value + i), gelu<false>(load(gate + i))));
}

// The rows first..last of a map [images, height, width, channels], as a convolution reads them: in
// planes [channels/32][images][rows][width + 2][32] that are `plane` numbers apart, with a border
// of zeros and a row more at both ends. With factors, normed by them and through SiLU.
void safelight_lay(const bf16* in, const float* factors, bf16* out, long plane, long images,
                   long height, long width, long channels, long first, long last) {
    long wide = width + 2, tall = last - first + 2;
#pragma omp parallel for schedule(static)
    for (long r = 0; r < images * tall; r++) {
        long i = r / tall, y = first + r % tall - 1;
        const bf16* from = in + (i * height + y) * width * channels;
        for (long c = 0; c < channels; c += 32) {
            bf16* to = out + c / 32 * plane + r * wide * 32;
            if (y < 0 || y >= height) {
                memset(to, 0, wide * 64);
                continue;
            }
            memset(to, 0, 64);
            to += 32;
            if (factors) {
                const float *factor = factors + i * 2 * channels + c, *addend = factor + channels;
                __m512 f0 = _mm512_loadu_ps(factor), f1 = _mm512_loadu_ps(factor + 16);
                __m512 a0 = _mm512_loadu_ps(addend), a1 = _mm512_loadu_ps(addend + 16);
                for (long x = 0; x < width; x++, to += 32) {
                    const bf16* v = from + x * channels + c;
                    __m512 low = silu(_mm512_fmadd_ps(load(v), f0, a0));
                    __m512 high = silu(_mm512_fmadd_ps(load(v + 16), f1, a1));
                    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                }
            } else {
                for (long x = 0; x < width; x++, to += 32)
                    _mm512_storeu_si512(to, _mm512_loadu_si512(from + x * channels + c));
            }
            memset(to, 0, 64);
        }
    }
}

}  // extern "C"
