// Weights on their way into panels, and rows of them back.
#pragma once
#include "backend.h"

namespace phalanx {

// weight [out, in] of floats or bfloat16, row by row; bias [out] floats or null. `packed` is kInt8, for
// levels with a scale for each output, kCompact for bfloat16 that is kept so where its exponents are
// few enough and else plain, or `type`.
Matrix* pack(Backend& backend, const void* weight, int32_t type, int64_t out, int64_t in,
             const float* bias, int32_t packed);

// A matrix whose panels are not filled; one of kCompact has neither table nor escapes yet.
Matrix* new_matrix(Backend& backend, int64_t out, int64_t in, int32_t type);

int64_t panel_bytes(const Matrix& matrix);   // of its panels
int64_t packed_bytes(const Matrix& matrix);  // of its weights: panels, and what is kept beside them

// Rows `ids` as they were, out [count, in]; not of kInt8.
void unpack_rows(const Matrix& matrix, const int64_t* ids, int64_t count, void* out);

}  // namespace phalanx
