// What the C functions of all kernels share. Each takes one struct, which safelight/fast/kernels.py
// describes once more: pointers first, then 64-bit integers, then floats. It returns null, or the
// condition that its arguments break: then nothing has been read or written.
#pragma once

#include <initializer_list>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
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
#include <malloc.h>
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define KERNEL extern "C" EXPORT const char*
#define REQUIRE(condition) if (!(condition)) return #condition

typedef uint16_t bf16;

const float LOG2E = 1.44269504f;

namespace {

// Whether these are sizes of something in memory.
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

// Memory for as long as this lives. There is no way out of a parallel region but the last.
struct Memory {
    char* at = nullptr;
    size_t size = 0;
    void need(size_t bytes) {
        if (bytes <= size) return;
        release();
        size = (bytes + 4095) / 4096 * 4096;
#ifdef _WIN32
        at = (char*)_aligned_malloc(size, 4096);
#else
        at = (char*)aligned_alloc(4096, size);
#endif
        if (at) return;
        fprintf(stderr, "safelight: no memory for %zu bytes in a kernel\n", size);
        abort();
    }
    void release() {
#ifdef _WIN32
        _aligned_free(at);
#else
        free(at);
#endif
    }
    ~Memory() { release(); }
};
// Memory of this thread, until it asks for more or ends.
inline void* scratch(size_t bytes) {
    static thread_local Memory mine;
    mine.need(bytes);
    return mine.at;
}

}  // namespace

// What kernels.py compares with its own number: raise both where a struct changes.
extern "C" EXPORT inline __attribute__((used)) int safelight_interface() { return 3; }
