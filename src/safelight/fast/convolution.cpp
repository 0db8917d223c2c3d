// 3x3 convolutions in bfloat16 by tiles. Sums are float32 throughout; results are rounded once.
//
// All products are blocks of 32 rows by 32 columns: two tiles of rows and two of weights give four
// tiles of sums, with one load per product.

#include "kernel.h"

// A side × side convolution of a map as safelight_lay writes it: rows have `border` positions
// between them, planes are `plane` numbers apart, and `x` is readable for 16 + side·(width + border)
// positions beyond the last. With `spread` 2 the output is twice as large: of the four pixels that
// each position gives, this writes the one at (down, right), and taps begin there, too.
struct Conv {
    const bf16 *x, *weights;  // weights [columns/32][planes][taps][1024]
    const float* bias;        // or null; those of two images are bias_step numbers apart
    const bf16* plus;         // added, as wide as the output; or null
    bf16* out;
    int64_t plane, bias_step, images, height, width, border, channels, columns, side, spread, down,
        right;
};

// A Conv, and where its rows are read and written. A row is a position of the output map. The input
// map is in planes of 32 channels, so that 16 consecutive positions are one tile, and the taps of a
// plane read memory that is close together.
struct Convolution : Conv {
    const int64_t padded_h = height + border, padded_w = width + border;
    const int64_t planes = channels / 32, taps = side * side;
    const bool narrow = width % 16;  // no multiple of 16: rows are positions of the padded map
    // Rows of one image, and of all images, including those that are not written.
    const int64_t each = narrow ? (height * padded_w + 15) / 16 * 16 : height * width;
    const int64_t count = images * each;
    int64_t offsets[25];  // of each tap, in numbers from a row's place

    explicit Convolution(const Conv& of) : Conv(of) {
        for (int64_t i = 0; i < taps; i++)
            offsets[i] = ((i / side + down) * padded_w + i % side + right) * 32;
    }
    int64_t input(int64_t m) const {
        int64_t image = m / each, p = m % each;
        int64_t at = narrow ? p : p / width * padded_w + p % width;
        return (image * padded_h * padded_w + at) * 32;
    }
    int64_t output(int64_t m) const {  // -1 if the row is not written
        if (!narrow && spread == 1) return m;
        int64_t wide = narrow ? padded_w : width;
        int64_t image = m / each, p = m % each, y = p / wide, x = p % wide;
        if (y >= height || x >= width) return -1;
        return ((image * height + y) * spread + down) * width * spread + x * spread + right;
    }
};

// Adds the products of 32 rows and a panel of 32 columns, for all taps of `planes` planes. Meanwhile
// it fetches `ahead` cache lines of `next`, which is read later, for each tap of a plane.
inline void multiply(const Convolution& p, const bf16* top, const bf16* low, int64_t planes,
                     const bf16* w, const char* next, int64_t ahead) {
    const int64_t plane = p.plane, taps = p.taps;
    for (int64_t k = 0; k < planes; k++, top += plane, low += plane)
        for (int64_t t = 0; t < taps; t++, w += 1024) {
            multiply_block<2>(top + p.offsets[t], low + p.offsets[t], 32, w);
            for (int64_t i = 0; i < ahead; i++, next += 64) fetch(next);
        }
}

// Four tiles of sums [2][2][16][16] become 32 rows of the output.
static void finish(const Convolution& p, const float* sums, int64_t m, int64_t m_end, int64_t n) {
    for (int half = 0; half < 2; half++, m += 16, sums += 512) {
        if (m >= m_end) return;
        // All 16 rows belong to one image.
        const float* bias = p.bias ? p.bias + m / p.each * p.bias_step + n : nullptr;
        vec bias_left = bias ? floats(bias) : splat(0);
        vec bias_right = bias ? floats(bias + 16) : splat(0);
        for (int64_t r = 0; r < 16 && m + r < m_end; r++) {
            int64_t row = p.output(m + r);
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

// Numbers of a map, and tiles of weights, that stay in the second-level cache.
const int64_t INPUT = 1 << 18, PANEL = 96;

static int64_t planes_at_once(const Convolution& p) {
    int64_t most = PANEL / p.taps;
    return most < 1 ? 1 : most < p.planes ? most : p.planes;
}

// Computes rows m0..m1 by columns n0..n1. For each panel of 32 columns, the weights for a few planes
// stay in the cache for all rows; the rows' sums are kept for the next planes.
static void region(const Convolution& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    int64_t tall = (m1 - m0 + 31) / 32;
    int64_t* at = (int64_t*)scratch((2 * tall + 8) * 8 + (tall + 1) * 4096);
    float* held = (float*)(at + (2 * tall + 7) / 8 * 8);
    for (int64_t i = 0; i < 2 * tall; i++) {
        int64_t m = m0 + 16 * i;
        at[i] = m < p.count ? p.input(m) : at[i - 1];
    }
    int64_t most = planes_at_once(p);
    const bf16* w = p.weights + n0 * p.planes * p.taps * 32;
    // A block's sums are finished while the next block is multiplied, as memory that tiles have
    // just stored cannot be read at once.
    const float* ready = nullptr;
    int64_t ready_m = 0, ready_n = 0, turn = 0;
    for (int64_t n = n0; n < n1; n += 32)
        for (int64_t first = 0; first < p.planes; first += most) {
            int64_t planes = p.planes - first < most ? p.planes - first : most;
            int64_t tiles = planes * p.taps;
            bool last = first + planes == p.planes;
            int64_t ahead = (32 + tall - 1) / tall;  // of the next weights' lines, by each block
            const bf16* in = p.x + first * p.plane;
            for (int64_t i = 0; i < tall; i++) {
                float* sums = held + (planes == p.planes ? turn++ & 1 : i) * 1024;
                if (first == 0) clear();
                else take(sums);
                multiply(p, in + at[2 * i], in + at[2 * i + 1], planes, w,
                         (const char*)(w + tiles * 1024) + i * ahead * tiles * 64,
                         i * ahead < 32 && (n + 32 < n1 || !last) ? ahead : 0);
                if (ready) finish(p, ready, ready_m, m1, ready_n);
                give(sums);
                ready = last ? sums : nullptr, ready_m = m0 + 32 * i, ready_n = n;
            }
            w += tiles * 1024;
        }
    if (ready) finish(p, ready, ready_m, m1, ready_n);
}

static void run(const Convolution& p) {
    int64_t threads = omp_get_max_threads(), panels = p.columns / 32;
    int64_t tall = INPUT / (planes_at_once(p) * 32) / 32 * 32;
    int64_t chunks = (p.count + tall - 1) / tall;
    if (chunks < 2 * threads && p.count >= 64 * threads) {
        chunks = (chunks + threads - 1) / threads * threads;
        tall = ((p.count + chunks - 1) / chunks + 31) / 32 * 32;
        chunks = (p.count + tall - 1) / tall;
    }
    int64_t splits = 1;
    if (chunks % threads || tall * chunks - p.count >= tall / 4) splits = threads;
    regions(p.count, tall, panels, splits, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
        region(p, m0, m1, n0 * 32, n1 * 32);
    });
}

KERNEL safelight_conv(const Conv* a) {
    REQUIRE(sizes({a->plane, a->bias_step, a->images, a->height, a->width, a->border}));
    REQUIRE(sizes({a->channels, a->columns}) && a->channels % 32 == 0 && a->columns % 32 == 0);
    REQUIRE(a->side >= 1 && a->side <= 5 && (a->spread == 1 || a->spread == 2));
    REQUIRE(a->down >= 0 && a->down < a->spread && a->right >= 0 && a->right < a->spread);
    REQUIRE(a->border + 1 >= a->side + a->spread - 1);
    if (!a->images || !a->height || !a->width || !a->columns) return nullptr;
    REQUIRE(a->channels > 0 && pointers(a->x, a->weights, a->out));
    REQUIRE(pointer_or_null(a->bias) && pointer_or_null(a->plus));
    const Convolution convolution(*a);
    REQUIRE(a->plane >= a->images * convolution.padded_h * convolution.padded_w * 32);
    run(convolution);
    return nullptr;
}
