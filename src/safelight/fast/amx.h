// Tiles for CPUs with AMX; portable.h has the same interface for every other processor.
//
// A tile holds 16 rows of 64 bytes. _tile_dpbf16ps multiplies 16 rows of 32 numbers by 16 columns
// of weights, which pack_tile lays out.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Asks the operating system for the tiles' registers: 1 if this process may use them.
extern "C" EXPORT inline __attribute__((used)) int safelight_init() {
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// The compiler does not know that tile instructions read and write memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Configures this thread's tiles, and restores oneDNN's configuration afterwards.
struct Tiles {
    Config before;
    Tiles() {
        _tile_storeconfig(&before);
        Config ours;
        for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
        fence();
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
};
