// Every kernel for AVX2 with FMA.
#include "compact.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on the compiler may use these instructions; nothing above this line may be compiled
// out of line, or the linker could hand it to a machine without them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define PHX_NAME "avx2"
namespace phalanx {
namespace avx2 {
#include "vector_avx2.h"
#include "kernels.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Isa* isa_avx2() { return &avx2::kTable; }
}  // namespace phalanx
#else
namespace phalanx {
const Isa* isa_avx2() { return nullptr; }
}  // namespace phalanx
#endif
