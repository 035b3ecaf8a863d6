// Every kernel for AVX2 with FMA and int8 dot products.
#include "compact.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>

// From here on the compiler may use these instructions; nothing above this line may be compiled
// out of line, or the linker could hand it to a machine without them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define PHX_NAME "avx2_vnni"
#define PHX_BYTE_DOT
namespace phalanx {
namespace avx2_vnni {
#include "vector_avx2.h"
#include "kernels.inl"
}  // namespace avx2_vnni
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Isa* isa_avx2_vnni() { return &avx2_vnni::kTable; }
}  // namespace phalanx
#else
namespace phalanx {
const Isa* isa_avx2_vnni() { return nullptr; }
}  // namespace phalanx
#endif
