// Every kernel for AVX-512 with bfloat16 and int8 dot products.
#include "compact.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on the compiler may use these instructions; nothing above this line may be compiled
// out of line, or the linker could hand it to a machine without them.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")
#endif
#define PHX_NAME "avx512_bf16"
#define PHX_BF16_DOT
namespace phalanx {
namespace avx512_bf16 {
#include "vector_avx512.h"
#include "kernels.inl"
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Isa* isa_avx512_bf16() { return &avx512_bf16::kTable; }
}  // namespace phalanx
#else
namespace phalanx {
const Isa* isa_avx512_bf16() { return nullptr; }
}  // namespace phalanx
#endif
