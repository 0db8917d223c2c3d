// A float32 product by vectors whose sums stay in the registers.
#pragma once

#include "call.h"

namespace {

// sums [rows][row] = (or, with `add`, +=) a [rows][depth] · b [depth][regs * LANES].
template <int rows, int regs>
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                     float* sums, int64_t row, bool add) {
    vec found[rows][regs];
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < regs; x++) found[r][x] = splat(0);
    for (int64_t k = 0; k < depth; k++, b += b_row) {
        vec columns[regs];
        for (int x = 0; x < regs; x++) columns[x] = floats(b + x * LANES);
        for (int r = 0; r < rows; r++) {
            const vec one = splat(a[r * a_row + k]);
            for (int x = 0; x < regs; x++) found[r][x] = found[r][x] + one * columns[x];
        }
    }
    // Added at the end, as a sum of sums rounds less than one long sum.
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < regs; x++) {
            float* to = sums + r * row + x * LANES;
            store(to, add ? floats(to) + found[r][x] : found[r][x]);
        }
}

}  // namespace
