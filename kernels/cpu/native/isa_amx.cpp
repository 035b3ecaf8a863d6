// Products by AMX tiles; all else as for AVX-512 with bfloat16.
#include "compact.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace phalanx {
namespace imitated {
#include "amx.inl"

// What the tile registers do, in plain C++: the same steps in the same order.
template <class Sum>
struct Tiles {
    explicit Tiles(int64_t rows) : rows(rows) {}
    void clear() { std::memset(sums, 0, sizeof sums); }
    void resume(const uint32_t* from) { std::memcpy(sums, from, rows * kPanel * 4); }
    void step(const uint32_t* x, int64_t x_stride, const uint32_t* panel) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t u = 0; u < kTile; u++) {
                uint32_t word = x[r * x_stride + u];
                for (int64_t i = 0; i < kPanel; i++) {
                    add(sums[r * kPanel + i], word, panel[u * kPanel + i]);
                }
            }
        }
    }
    void store(uint32_t* out) const { std::memcpy(out, sums, rows * kPanel * 4); }

  private:
    static void add(float& sum, uint32_t x, uint32_t w) {
        sum += from_bits(x << 16) * from_bits(w << 16);
        sum += from_bits(x & 0xffff0000u) * from_bits(w & 0xffff0000u);
    }
    static void add(int32_t& sum, uint32_t x, uint32_t w) {
        for (int bit = 0; bit < 32; bit += 8) sum += (int)(x >> bit & 255) * (int8_t)(w >> bit);
    }
    const int64_t rows;
    Sum sums[2 * kTile * kPanel];
};
}  // namespace imitated

namespace {
Isa with_products(const char* name, const Isa* base, Isa::Matmul floats, Isa::Matmul compact,
                  Isa::MatmulInt8 bytes) {
    Isa table = *base;
    table.name = name;
    table.matmul_bf16 = floats;
    table.matmul_compact = compact;
    table.matmul_int8 = bytes;
    return table;
}
}  // namespace

const Isa* isa_amx_imitated() {
    static const Isa table = with_products("amx_imitated", isa_plain(),
                                           imitated::matmul_tiles<imitated::Tiles<float>>,
                                           imitated::matmul_compact_tiles<imitated::Tiles<float>,
                                                                          isa_plain>,
                                           imitated::matmul_int8_tiles<imitated::Tiles<int32_t>>);
    return &table;
}
// Nothing below may run on a machine without AMX.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f"))), \
                             apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f")
#endif

namespace amx {
#include "amx.inl"

// Some compilers do not know that the tile instructions read memory.
INLINE void memory_is_written() { asm volatile("" ::: "memory"); }

struct alignas(64) Configuration {  // as LDTILECFG reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Registers: 0 1 / 2 3 sums of the upper / lower rows, 4 5 rows of x, 6 7 halves of the panel.
template <bool kBytes>
struct Tiles {
    explicit Tiles(int64_t rows) : upper(least(rows, kTile)), lower(rows - upper) {
        Configuration c;
        for (int t = 0; t < 8; t++) c.row_bytes[t] = 64;
        c.rows[0] = c.rows[1] = c.rows[4] = (uint8_t)upper;
        c.rows[2] = c.rows[3] = c.rows[5] = (uint8_t)most(lower, 1);
        c.rows[6] = c.rows[7] = kTile;
        memory_is_written();
        _tile_loadconfig(&c);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

    void clear() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    void resume(const uint32_t* from) {
        memory_is_written();
        _tile_loadd(0, from, kPanel * 4);
        _tile_loadd(1, from + kTile, kPanel * 4);
        if (!lower) return;
        _tile_loadd(2, from + kTile * kPanel, kPanel * 4);
        _tile_loadd(3, from + kTile * kPanel + kTile, kPanel * 4);
    }
    void step(const uint32_t* x, int64_t x_stride, const uint32_t* panel) {
        memory_is_written();
        _tile_loadd(6, panel, kPanel * 4);
        _tile_loadd(7, panel + kTile, kPanel * 4);
        _tile_loadd(4, x, x_stride * 4);
        if (kBytes) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!lower) return;
        _tile_loadd(5, x + kTile * x_stride, x_stride * 4);
        if (kBytes) {
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        } else {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    void store(uint32_t* out) const {
        _tile_stored(0, out, kPanel * 4);
        _tile_stored(1, out + kTile, kPanel * 4);
        if (!lower) return;
        _tile_stored(2, out + kTile * kPanel, kPanel * 4);
        _tile_stored(3, out + kTile * kPanel + kTile, kPanel * 4);
    }

  private:
    const int64_t upper, lower;
};
}  // namespace amx

#if defined(__clang__)
#pragma clang attribute pop
#endif

const Isa* isa_amx() {
    static const Isa table = with_products("amx", isa_avx512_bf16(),
                                           amx::matmul_tiles<amx::Tiles<false>>,
                                           amx::matmul_compact_tiles<amx::Tiles<false>,
                                                                     isa_avx512_bf16>,
                                           amx::matmul_int8_tiles<amx::Tiles<true>>);
    return &table;
}
}  // namespace phalanx
#else
namespace phalanx {
const Isa* isa_amx() { return nullptr; }
const Isa* isa_amx_imitated() { return nullptr; }
}  // namespace phalanx
#endif
