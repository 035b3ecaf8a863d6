// What all sources share: number types, the structures that cross the C interface, the table of
// kernels that each instruction set fills in.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// Every function of this header is inlined by force. The same header is compiled for several
// instruction sets; an out-of-line copy of the widest could be linked into the plainest.
#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")

namespace phalanx {

struct bf16 { uint16_t bits; };

INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
INLINE float widen(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
INLINE float widen(float x) { return x; }
INLINE bf16 narrow(float x) {  // round to nearest even; a NaN keeps a set mantissa bit
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {(uint16_t)((bits | 0x400000u) >> 16)};
    return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { *p = narrow(x); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

constexpr int64_t kPanel = 32;      // outputs whose weights stand side by side
constexpr int64_t kAheadBytes = 8192;  // of weights asked for early: 200 ns of one core's bandwidth
constexpr int64_t kKeys = 64;       // keys of one attention tile, at absolute positions
constexpr int64_t kPartition = 512; // keys after which a fresh online softmax begins
constexpr int64_t kQueryRows = 48;  // query rows of one tile: tokens x heads, one token at least
constexpr int64_t kMostGroup = 256; // query heads that may share one kv head
constexpr int64_t kMostDim = 1024;  // of a head, where it is kept on the stack

// Pools whose blocks are laid out as attention reads them: kPanels, of bfloat16 (panels.inl), and
// kBytePanels, of int8 (byte_panels.inl). Weights of bfloat16 in 12 bits: kCompact (compact.h).
enum Type : int32_t {
    kFloat = 0, kBf16 = 1, kInt8 = 2, kPanels = 3, kBytePanels = 4, kCompact = 5
};
INLINE int64_t type_bytes(int32_t type) {
    return type == kFloat ? 4 : type == kInt8 || type == kBytePanels ? 1 : 2;
}

// Activations are unsigned bytes, 128 standing for 0, as the products of bytes want one operand.
constexpr int32_t kUnsigned = 128;
// A token of one head in an int8 pool: its levels, and behind them their scale, a float.
constexpr int64_t kScaleBytes = 4;

struct CompactTable;
struct Escape;

// A weight [out, in] cut into panels of 32 outputs. A panel is [units][32] words of 32 bits; a
// word holds one float, two bfloat16 or four int8 of consecutive inputs. Missing outputs and
// inputs are zeros.
struct Matrix {
    int64_t out, in, units, panels;
    int32_t type;
    uint32_t* data;
    float* bias;    // [panels * 32], zeros where there is none
    float* scales;  // int8: [panels * 32], weight = scale * int8
    int32_t* sums;  // int8: [panels * 32], kUnsigned * sum of the row's int8
    const CompactTable* table;    // kCompact, as are the next
    const Escape* escapes;
    const int64_t* first_escape;  // [panels + 1]
};

// Where one step's sequences stand in the batch and in the pages.
struct Spans {
    int64_t count;
    const int32_t* start;      // first query row of the batch
    const int32_t* num_query;
    const int32_t* length;     // tokens attended to, the queries being the last of them
    const int32_t* first;      // index of the sequence's first block in `blocks`
    const int32_t* blocks;
};

struct Attention {
    const void* query;  // [T, heads, dim], token_stride elements between tokens
    void* output;       // [T, heads, dim], output_stride elements between tokens
    int64_t query_stride, output_stride, heads, kv_heads, dim;
    int32_t type;       // of query and output
    int32_t pool_type;
    const void* keys;   // [kv_heads, blocks, block_size, row]
    const void* values;
    int64_t head_stride, block_size;  // elements between heads; tokens of a block
    int64_t row;                      // elements of a token and head: dim, or dim + kScaleBytes
    float scale, softcap;             // softcap 0 = none
    int64_t window;                   // 0 = none, else a query sees the last `window` tokens
    const float* slopes;              // ALiBi, [heads], or null
    const float* sinks;               // [heads] scores whose weight goes nowhere, or null
};

// What a feed-forward block does to the numbers between its products.
enum Activation : int32_t { kSilu, kGelu, kGeluTanh, kGeluQuick, kRelu, kRelu2 };

// Part of a step's attention that one thread does: some tokens of a sequence, one kv head.
struct AttentionUnit { int64_t span, head, begin, end; };

struct Isa {
    const char* name;
    // Outputs of panels [begin, end) of x [rows, in] into out [rows, matrix.out]; x is in the
    // matrix's type, x_stride in elements.
    using Matmul = void (*)(const Matrix& matrix, const void* x, int64_t x_stride, int64_t rows,
                            void* out, int64_t out_stride, int32_t out_type, int64_t begin,
                            int64_t end);
    Matmul matmul_float, matmul_bf16, matmul_compact;
    // Units [begin, end) of a panel of a compact matrix, `begin` even, as they are in a plain one.
    void (*expand_units)(const Matrix& matrix, int64_t panel, int64_t begin, int64_t end,
                         uint32_t* words);
    // A panel [units][32] of `count` rows of so many bytes, `row_bytes` apart; zeros where there is
    // no row or no input.
    void (*pack_panel)(const char* rows, int64_t row_bytes, int64_t count, int64_t bytes,
                       int64_t units, uint32_t* panel);
    // One row to bytes round(x / scale) + zero, and zeros up to `padded`; returns its scale,
    // largest |x| / 127, which is NaN where a number is not finite.
    float (*quantize)(const void* x, int32_t type, int64_t size, int64_t padded, int32_t zero,
                      uint8_t* out);
    using MatmulInt8 = void (*)(const Matrix& matrix, const uint8_t* x, int64_t x_stride,
                                const float* x_scales, int64_t rows, void* out,
                                int64_t out_stride, int32_t out_type, int64_t begin, int64_t end);
    MatmulInt8 matmul_int8;
    // residual += delta (delta may be null); out = residual / rms(residual) * (offset + weight).
    void (*rms_norm)(const void* delta, int32_t delta_type, void* residual, int32_t residual_type,
                     const void* weight, int32_t weight_type, float offset, float eps,
                     int64_t size, void* out, int32_t out_type);
    // out = x / std(x - mean) * weight + bias; bias may be null, out may be x.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps,
                       int64_t size, void* out, int32_t out_type);
    // out = activation(x) * up; up may be null.
    void (*activate)(const void* x, const void* up, int32_t activation, int32_t in_type,
                     int64_t size, void* out, int32_t out_type);
    // One head: out = in rotated by cos, sin [half]; elements from 2 * half on pass through.
    void (*rope)(const void* in, int32_t in_type, const void* cos, const void* sin,
                 int32_t angle_type, int64_t half, int64_t dim, void* out, int32_t out_type);
    void (*convert)(const void* in, int32_t in_type, int64_t size, void* out, int32_t out_type);
    // total = parts[0] + parts[1] + ... in this order.
    void (*add_parts)(const float* const* parts, int64_t count, int64_t size, float* total);
    void (*add_scaled)(const float* x, float scale, int64_t size, float* total);  // += scale x
    float (*squares)(const float* x, int64_t size);  // their sum
    int64_t (*attention_scratch)(const Attention& call);  // bytes a thread needs
    void (*attention)(const Attention& call, const Spans& spans, const AttentionUnit& unit,
                      const AttentionUnit* after, void* scratch);
    int64_t (*argmax)(const float* x, int64_t size);  // the first of several
    float (*flaw)(const float* x, int64_t size);      // 0, or NaN where one is not finite
};

const Isa* isa_plain();
const Isa* isa_avx2();        // null where the compiler has no such target
const Isa* isa_avx2_vnni();
const Isa* isa_avx512();
const Isa* isa_avx512_bf16();
const Isa* isa_amx();
const Isa* isa_amx_imitated();

}  // namespace phalanx
