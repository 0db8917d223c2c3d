// The vectors that the kernels are written in, for CPUs with AVX512-BF16 and AVX512-VBMI.
// portable.h has the same interface for every other processor; keep the two alike.
#pragma once

typedef __m256i halves;  // 16 numbers in bfloat16

inline float top(vec x) { return _mm512_reduce_max_ps(x); }

inline halves narrow(vec x) { return (halves)_mm512_cvtneps_pbh(x); }
inline vec widen(halves x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, halves x) { _mm256_storeu_si256((__m256i*)p, x); }
inline void store(bf16* p, vec x) { store(p, narrow(x)); }
inline void store(bf16* p, vec low, vec high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Stores numbers from -128 to 127 as bytes, with 128 added.
inline void store_bytes(uint8_t* p, vec x) {
    __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
    _mm_storeu_si128((__m128i*)p, _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}
// Integer sums minus other integers, as float32.
inline vec whole_sums(const float* p, const int32_t* less) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_loadu_si512(less)));
}

// 2^(x/128 - 127) of 32 numbers x as bfloat16, by integers: attention.cpp explains it. The order of
// the results is that of key_at. With `add`, they are added to `total`.
struct Table {  // of 128 bytes
    __m512i low, high;
    explicit Table(const uint8_t* p) : low(_mm512_load_si512(p)), high(_mm512_load_si512(p + 64)) {}
};
template <bool add> inline vec powers(vec x, vec y, const Table& apart, bf16* out, vec total) {
    __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32(x), _mm512_cvtps_epi32(y));
    both = _mm512_max_epi16(both, _mm512_setzero_si512());
    __m512i less = _mm512_maskz_permutex2var_epi8(0x5555555555555555, apart.low, both, apart.high);
    both = _mm512_sub_epi16(both, less);
    _mm512_storeu_si512(out, both);
    if (!add) return total;
    return _mm512_dpbf16_ps(total, (__m512bh)both, (__m512bh)_mm512_set1_epi16(0x3f80));
}
