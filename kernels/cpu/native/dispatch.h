#pragma once
#include "common.h"

namespace phalanx {

// The named instruction set, or the best one when the name is empty; null where this machine
// does not have it.
const Isa* find_isa(const char* name);

}  // namespace phalanx
