// What the C functions of all kernels share. Each takes one struct, which safelight/fast/kernels.py
// repeats: pointers first, then 64-bit integers, then floats. It returns null or, before it reads or
// writes anything, the condition that its arguments break, or "memory" if there is too little.
#pragma once

#include <initializer_list>
#include <new>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else  // one thread
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define KERNEL extern "C" EXPORT const char*
#define REQUIRE(condition) if (!(condition)) return #condition

typedef uint16_t bf16;

const float LOG2E = 1.44269504f;

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // as GCC says, and as Clang does
#define AMX
#include "amx.h"
#else
inline void fence() {}
struct Tiles {
    Tiles() {}
};
#endif

// Whether these can be sizes of something in memory.
inline bool sizes(std::initializer_list<int64_t> all) {
    for (int64_t n : all)
        if (n < 0 || n > INT64_C(1) << 31) return false;
    return true;
}
// Whether these point to numbers of their type.
inline bool pointers() { return true; }
template <class T, class... More> inline bool pointers(const T* p, More... more) {
    return p && (uintptr_t)p % alignof(T) == 0 && pointers(more...);
}
template <class T> inline bool pointer_or_null(const T* p) { return !p || pointers(p); }

// Memory for as long as this lives.
struct Memory {
    static constexpr std::align_val_t PAGE{4096};
    char* at = nullptr;
    size_t size = 0;
    bool need(size_t bytes) {  // false if there is too little
        if (bytes <= size) return true;
        release();
        at = (char*)operator new(bytes, PAGE, std::nothrow);
        size = at ? bytes : 0;
        return at;
    }
    void release() {
        operator delete(at, PAGE);
        at = nullptr, size = 0;
    }
    ~Memory() { release(); }
};
// Memory of this thread, valid until the thread asks for more or ends. It is little; if there is none, the
// process ends, as a parallel region cannot be left.
inline void* scratch(size_t bytes) {
    static thread_local Memory mine;
    if (!mine.need(bytes)) abort();
    return mine.at;
}

// c₀xⁿ + … + cₙ of each number in a vector.
template <class V, size_t n> inline V polynomial(V x, const float (&c)[n]) {
    V y = c[0] - V{};
    for (size_t i = 1; i < n; i++) y = y * x + c[i];
    return y;
}
// 2^x for x from -0.5 to 0.5; the relative error is below 2e-7.
template <class V> inline V power_of_fraction(V x) {
    return polynomial(x, {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f,
                          2.40226507e-1f, 6.93147182e-1f, 1.f});
}

// kernels.py compares this with its own number. Raise both when a struct changes, or the layout of
// what it points to.
extern "C" EXPORT inline __attribute__((used)) int safelight_interface() { return 8; }
