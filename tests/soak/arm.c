// Calls a library's kernels for arm.py, which writes on stdin and reads on stdout. A call is
//   name[64], count of regions, size of each, their bytes, count of patches, then of each: region,
//   offset there, region that is pointed to, offset there
// Numbers have 8 bytes. Region 0 is the kernel's struct. The answer is message[256] and all regions.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void take(void* to, size_t size) {
    if (size && fread(to, size, 1, stdin) != 1) exit(0);
}
static uint64_t number(void) {
    uint64_t n;
    take(&n, 8);
    return n;
}

int main(int count, char** names) {
    void* library = dlopen(count > 1 ? names[1] : "", RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    for (;;) {
        char name[64], message[256] = "", *regions[64];
        uint64_t sizes[64];
        take(name, sizeof name);
        uint64_t all = number();
        for (uint64_t i = 0; i < all; i++) sizes[i] = number();
        for (uint64_t i = 0; i < all; i++) {
            regions[i] = aligned_alloc(64, (sizes[i] + 64) / 64 * 64);
            take(regions[i], sizes[i]);
        }
        for (uint64_t i = number(); i; i--) {
            uint64_t in = number(), at = number(), of = number(), offset = number();
            char* to = regions[of] + offset;
            memcpy(regions[in] + at, &to, 8);
        }
        const char* (*kernel)(const void*) = (const char* (*)(const void*))dlsym(library, name);
        const char* broken = kernel ? kernel(regions[0]) : "no such kernel";
        if (broken) strncpy(message, broken, sizeof message - 1);
        fwrite(message, sizeof message, 1, stdout);
        for (uint64_t i = 0; i < all; i++) {
            fwrite(regions[i], 1, sizes[i], stdout);
            free(regions[i]);
        }
        fflush(stdout);
    }
}
