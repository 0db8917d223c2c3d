// Norms, gates, Winograd convolutions and the layout of maps in bfloat16.

#include "kernel.h"
#include "norms.h"
#include "winograd.h"

KERNEL safelight_moments(const Moments<bf16>* p) { return moments(*p); }
KERNEL safelight_normalise(const Normalise<bf16>* p) { return normalise(*p); }
KERNEL safelight_layer_norm(const LayerNorm<bf16>* p) { return layer_norm(*p); }
KERNEL safelight_gate(const Gate<bf16>* p) { return gate(*p); }
KERNEL safelight_winograd(const Winograd<bf16>* p) { return winograd(*p); }

// Lays out the rows first..last of a map [images, height, width, channels] as a convolution reads
// them: in planes [channels/32][images][rows][width + 2][32] that are `plane` numbers apart, with a
// border of zeros and one more row at both ends. With factors, it norms by them and applies SiLU.
struct Lay {
    const bf16* x;
    const float* factors;  // or null
    bf16* out;
    int64_t plane, images, height, width, channels, first, last;
};
KERNEL safelight_lay(const Lay* given) {
    const Lay p = *given;
    const int64_t wide = p.width + 2, tall = p.last - p.first + 2;
    REQUIRE(sizes({p.plane, p.images, p.height, p.width, p.channels, p.first}));
    REQUIRE(p.channels % 32 == 0 && p.first <= p.last && p.last <= p.height);
    REQUIRE(p.plane >= p.images * tall * wide * 32);
    if (!p.images || !p.channels) return nullptr;
    REQUIRE(pointers(p.out) && pointer_or_null(p.factors));
    REQUIRE(!p.height || !p.width || pointers(p.x));
#pragma omp parallel for schedule(static) firstprivate(p)
    for (int64_t r = 0; r < p.images * tall; r++) {
        int64_t i = r / tall, y = p.first + r % tall - 1;
        for (int64_t c = 0; c < p.channels; c += 32) {
            const bf16* from = p.x + (i * p.height + y) * p.width * p.channels;
            bf16* to = p.out + c / 32 * p.plane + r * wide * 32;
            const bool beyond = y < 0 || y >= p.height;
            memset(to, 0, beyond ? wide * 64 : 64);
            if (beyond) continue;
            to += 32;
            for (int64_t n = 0; n < p.width; n++, to += 32, from += p.channels) {
                if (!p.factors) memcpy(to, from + c, 64);
                for (int h = 0; p.factors && h < 32; h += 16) {
                    const float* factor = p.factors + i * 2 * p.channels + c + h;
                    store(to + h, silu(fma(load(from + c + h), floats(factor), floats(factor + p.channels))));
                }
            }
            memset(to, 0, 64);
        }
    }
    return nullptr;
}
