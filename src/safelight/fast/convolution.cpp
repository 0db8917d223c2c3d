// 3x3 convolutions in bfloat16 by tiles. Sums are float32 throughout; results are rounded once.
//
// Every product is made of blocks of 32 rows by 32 columns: two tiles of rows and two of weights
// give four tiles of sums, one load for each product.
//
// Plain C interface: pointers and sizes, no Python and no torch headers.

#include "kernel.h"

namespace {

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
            for (long i = 0; i < ahead; i++, next += 64) fetch(next);
        }
}

// Four tiles of sums [2][2][16][16] become 32 rows of the output.
void finish(const Convolution& p, const float* sums, long m, long m_end, long n) {
    for (int half = 0; half < 2; half++, m += 16, sums += 512) {
        if (m >= m_end) return;
        // Sixteen rows are of one image.
        const float* bias = p.bias ? p.bias + m / p.rows.each * p.bias_step + n : nullptr;
        vec bias_left = bias ? floats(bias) : splat(0);
        vec bias_right = bias ? floats(bias + 16) : splat(0);
        for (long r = 0; r < 16 && m + r < m_end; r++) {
            long row = p.rows.output(m + r);
            if (row < 0) continue;
            bf16* out = p.out + row * p.columns + n;
            vec left = floats(sums + r * 16) + bias_left;
            vec right = floats(sums + 256 + r * 16) + bias_right;
            if (p.plus) {
                const bf16* plus = p.plus + row * p.columns + n;
                left = left + load(plus);
                right = right + load(plus + 16);
            }
            store(out, left, right);
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

}  // namespace

extern "C" {

// 1 if this process may use the kernels.
int safelight_init() { return permitted(); }

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

}  // extern "C"
