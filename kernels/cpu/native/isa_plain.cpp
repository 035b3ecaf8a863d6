// Every kernel in plain C++.
#include "compact.h"

#define PHX_NAME "plain"
namespace phalanx {
namespace plain {
#include "vector_plain.h"
#include "kernels.inl"
}  // namespace plain
const Isa* isa_plain() { return &plain::kTable; }
}  // namespace phalanx
