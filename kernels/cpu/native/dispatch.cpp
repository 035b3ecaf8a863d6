// Which instruction sets this processor and system offer.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace phalanx {

namespace {
#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx2_vnni() {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}
// The system lets a process use the tile registers only when asked (arch_prctl, Linux 5.16).
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kAskPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
    return false;
#endif
}
bool tiles_work();

bool has_amx() {
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTiles = 1u << 24, kBf16Products = 1u << 22, kInt8Products = 1u << 25;
    constexpr unsigned kAll = kTiles | kBf16Products | kInt8Products;
    return (d & kAll) == kAll && may_use_tiles() && tiles_work();
}
#else
bool has_amx() { return false; }
bool has_avx2() { return false; }
bool has_avx2_vnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

// Whether tiles and vectors multiply alike: a product of odd sizes, small whole numbers.
bool tiles_work() {
    constexpr int64_t kOut = 40, kIn = 70, kRows = 35;
    alignas(64) static uint32_t words[2 * kIn / 2 * kPanel];
    static bf16 x[kRows * kIn];
    static float bias[2 * kPanel], by_tiles[kRows * kOut], by_vectors[kRows * kOut];
    for (int64_t i = 0; i < 2 * kIn / 2 * kPanel; i++) {
        words[i] = narrow((float)(i % 7)).bits | (uint32_t)narrow((float)(i % 5)).bits << 16;
    }
    for (int64_t i = 0; i < kRows * kIn; i++) x[i] = narrow((float)(i % 11 - 5));
    Matrix m{kOut, kIn, kIn / 2, 2, kBf16, words, bias, nullptr, nullptr};
    isa_amx()->matmul_bf16(m, x, kIn, kRows, by_tiles, kOut, kFloat, 0, 2);
    isa_avx512_bf16()->matmul_bf16(m, x, kIn, kRows, by_vectors, kOut, kFloat, 0, 2);
    return std::memcmp(by_tiles, by_vectors, sizeof by_tiles) == 0;
}

struct Choice {
    const char* name;
    const Isa* (*table)();
    bool (*supported)();
};
bool always() { return true; }
const Choice kChoices[] = {  // best first
    {"amx", isa_amx, has_amx},
    {"avx512_bf16", isa_avx512_bf16, has_avx512_bf16},
    {"avx512", isa_avx512, has_avx512},
    {"avx2_vnni", isa_avx2_vnni, has_avx2_vnni},
    {"avx2", isa_avx2, has_avx2},
    {"plain", isa_plain, always},
    {"amx_imitated", isa_amx_imitated, always},  // never chosen; tests the walk over the tiles
};
}  // namespace

const Isa* find_isa(const char* name) {
    for (const Choice& choice : kChoices) {
        bool wanted = !name || !*name || std::strcmp(name, choice.name) == 0;
        if (wanted && choice.supported() && choice.table()) return choice.table();
    }
    return nullptr;
}

}  // namespace phalanx
