// AMX in software, for the tests of processors without it. There its instructions raise SIGILL, and the
// handler here does what they would have done: the kernels that are tested are those that are shipped.
//
// The semantics are those of Intel's manual (Software Developer's Manual, volume 2), of what the kernels
// use: palette 1, loads and stores of tiles, TILEZERO, TDPBF16PS and TDPBUSD. Anything else, and what
// a processor refuses (tiles that are not configured, or whose sizes do not fit), ends the process. Start_row
// is always 0, as no instruction is interrupted halfway.
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>

struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
// What a configuration does not give a tile, of its 16 rows of 64 bytes, stays 0.
struct Tiles {
    Config config;
    alignas(64) uint8_t data[8][16][64];
};
static thread_local Tiles mine;
static std::atomic<int64_t> done;
static struct sigaction before;

// An instruction: its prefix (0, or 1 to 3 for 66, F3, F2), opcode, operands, and bytes.
struct Instruction {
    int prefix, opcode, mod, reg, rm, other, bytes;
    bool indexed;
    char* address;
    int64_t stride;
};

static int64_t number(const uint8_t* p, int bytes) {
    int32_t four;
    if (bytes == 1) return (int8_t)*p;
    memcpy(&four, p, 4);
    return bytes ? four : 0;
}

// Reads VEX.128.0F38.W0, an opcode and its operands. Returns false if it is something else.
static bool read(const uint8_t* at, const greg_t* registers, Instruction& out) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    if (at[0] != 0xc4 || (at[1] & 0x9f) != 0x82 || at[2] & 0x84) return false;
    const int index_high = ~at[1] >> 3 & 8, base_high = ~at[1] >> 2 & 8;
    out = {at[2] & 3, at[3], at[4] >> 6, at[4] >> 3 & 7, at[4] & 7, ~at[2] >> 3 & 15, 5, false, nullptr, 0};
    if (out.mod == 3) return true;
    int base = out.rm, size = out.mod == 1 ? 1 : out.mod == 2 ? 4 : 0;
    if (base == 4) {
        const uint8_t sib = at[out.bytes++];
        const int index = (sib >> 3 & 7) + index_high;
        if (index != 4) out.stride = (int64_t)registers[places[index]] << (sib >> 6);
        base = sib & 7, out.indexed = true;
    }
    const bool bare = out.mod == 0 && base == 5;  // no register: a place, or one after the instruction
    if (bare) size = 4;
    int64_t address = number(at + out.bytes, size);
    out.bytes += size;
    if (!bare) address += registers[places[base + base_high]];
    else if (!out.indexed) address += (int64_t)at + out.bytes;
    out.address = (char*)address;
    return true;
}

// Returns what is wrong with a configuration, or null.
static const char* load_config(const void* from) {
    Config c;
    memcpy(&c, from, sizeof c);
    bool zeros = true;
    for (uint8_t one : c.reserved) zeros = zeros && !one;
    for (int i = 8; i < 16; i++) zeros = zeros && !c.bytes[i] && !c.rows[i];
    memset(&mine, 0, sizeof mine);
    if (c.palette == 0) return nullptr;
    if (c.palette != 1 || c.start || !zeros) return "another palette, or reserved bits";
    for (int i = 0; i < 8; i++)
        if (c.bytes[i] > 64 || c.rows[i] > 16 || !c.bytes[i] != !c.rows[i]) return "a tile's size";
    mine.config = c;
    return nullptr;
}

// Whether a tile has rows, of whole numbers of 32 bits.
static bool fit(int t) { return mine.config.rows[t] && mine.config.bytes[t] % 4 == 0; }

// The tiles are 16 rows by 16 columns at most: dot(sums, k) adds the products of number k in a row of `a`.
template <class Do> static const char* products(int to, int a, int b, Do dot) {
    const Config& c = mine.config;
    if (b > 7 || to == a || to == b || a == b) return "tiles that are not three";
    if (!fit(to) || !fit(a) || !fit(b)) return "a tile that is not configured";
    if (c.bytes[to] != c.bytes[b] || c.rows[to] != c.rows[a] || c.bytes[a] / 4 != c.rows[b])
        return "tiles whose sizes do not fit";
    for (int m = 0; m < c.rows[to]; m++) dot(mine.data[to][m], mine.data[a][m], mine.data[b], c.rows[b]);
    return nullptr;
}

// Both numbers of a pair have sums of their own within an instruction, by fused multiply-adds, rounded to
// the nearest, ties to even. They are added, and then added to the tile's. Numbers below 2^-126 count as
// 0, before and after each operation: the handler sets MXCSR so.
static const char* bfloat16(int to, int a, int b) {
    return products(to, a, b, [](uint8_t* sums, const uint8_t* row, const uint8_t (*columns)[64], int depth) {
        const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
        __m512 even_sums = _mm512_setzero_ps(), odd_sums = even_sums;
        for (int k = 0; k < depth; k++) {
            const __m512i pair = _mm512_set1_epi32((int)number(row + 4 * k, 4));
            const __m512i w = _mm512_loadu_si512(columns[k]);
            even_sums = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)),
                                        _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even_sums);
            odd_sums = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, odd)),
                                       _mm512_castsi512_ps(_mm512_and_si512(w, odd)), odd_sums);
        }
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even_sums, odd_sums)));
    });
}

// Unsigned bytes of `a` by signed ones of `b`, in sums of 32 bits that wrap around.
static const char* bytes(int to, int a, int b) {
    return products(to, a, b, [](uint8_t* sums, const uint8_t* row, const uint8_t (*columns)[64], int depth) {
        __m512i total = _mm512_loadu_si512(sums);
        for (int k = 0; k < depth; k++)
            total = _mm512_dpbusd_epi32(total, _mm512_set1_epi32((int)number(row + 4 * k, 4)),
                                        _mm512_loadu_si512(columns[k]));
        _mm512_storeu_si512(sums, total);
    });
}

static const char* move(const Instruction& in, bool store) {
    const int t = in.reg;
    if (!in.indexed) return "a load or store without a stride";
    if (!fit(t)) return "a tile that is not configured";
    if (!store) memset(mine.data[t], 0, sizeof mine.data[t]);
    for (int i = 0; i < mine.config.rows[t]; i++) {
        char* row = in.address + i * in.stride;
        if (store) memcpy(row, mine.data[t][i], mine.config.bytes[t]);
        else memcpy(mine.data[t][i], row, mine.config.bytes[t]);
    }
    return nullptr;
}

// Does what the instruction says. Returns why it cannot, or null.
static const char* obey(const Instruction& in) {
    const int prefix = in.prefix;
    const bool registers = in.mod == 3;
    if (registers && in.opcode == 0x5c && prefix == 2) return bfloat16(in.reg, in.rm, in.other);
    if (registers && in.opcode == 0x5e && prefix == 1) return bytes(in.reg, in.rm, in.other);
    if (in.other) return "an unknown instruction";
    if (!registers && in.opcode == 0x4b && prefix) return move(in, prefix == 2);
    if (registers && in.opcode == 0x49 && prefix == 3 && in.rm == 0) {
        if (!fit(in.reg)) return "a tile that is not configured";
        memset(mine.data[in.reg], 0, sizeof mine.data[in.reg]);
        return nullptr;
    }
    if (in.opcode != 0x49 || in.reg || prefix > 1 || (registers && (prefix || in.rm)))
        return "an unknown instruction";
    if (registers) memset(&mine, 0, sizeof mine);
    else if (prefix) memcpy(in.address, &mine.config, sizeof mine.config);
    else return load_config(in.address);
    return nullptr;
}

static void handle(int, siginfo_t*, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    _mm_setcsr(0x9fc0);  // no exceptions, no denormals in or out, rounding to the nearest
    Instruction in;
    int64_t count = 0;
    // What follows at once is done at once, as a signal takes microseconds.
    while (read((const uint8_t*)registers[REG_RIP], registers, in)
           && (in.opcode == 0x49 || in.opcode == 0x4b || in.opcode == 0x5c || in.opcode == 0x5e)) {
        if (const char* why = obey(in)) {
            fprintf(stderr, "AMX in software: %s, at %p\n", why, (void*)registers[REG_RIP]);
            count = 0;
            break;
        }
        registers[REG_RIP] += in.bytes;
        count++;
    }
    done += count;
    if (!count) sigaction(SIGILL, &before, nullptr);  // the instruction is tried again, and ends the process
}

// Answers instructions of AMX from now on, in all threads. Returns 0, or -1 if it cannot.
extern "C" int emulate() {
    struct sigaction ours = {}, was;
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    const int failed = sigaction(SIGILL, &ours, &was);
    if (was.sa_sigaction != handle) before = was;
    return failed;
}

// Returns how many instructions it answered.
extern "C" int64_t answered() { return done; }
