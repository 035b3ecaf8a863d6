// A stack of plain decoder layers as one program: pre-norm (RMS), rotary attention, gated SiLU
// feed-forward.
#pragma once
#include "backend.h"

namespace phalanx {

constexpr int64_t kMostDim = 1024;
constexpr int64_t kMostRanks = 64;

struct Layer {
    const float *input_norm, *post_norm;  // [hidden], offset included
    const float *query_norm, *key_norm;   // [dim], or null
    const Matrix *qkv, *output, *gate_up, *down;
    void *keys, *values;  // [kv_heads, blocks, block_size, row], see Attention
    int64_t window;
    const float *slopes, *sinks;
};

struct Stack {
    int64_t count, hidden, heads, kv_heads, dim, inner;
    int32_t type, pool_type;
    int64_t head_stride, block_size, row;
    float scale, softcap, eps;
    const Layer* layers;
    const float* final_norm;  // null in a stack that others follow
};

// The shared-memory segment of the ranks: `size` counters, one a cache line, then slots
// [2][size][slot_bytes]; the protocol is told where the segment is made.
struct Segment {
    char* base;
    int64_t rank, size, slot_bytes;
    double patience;  // seconds
};

struct Step {
    int64_t tokens;
    const void* x;           // [T, hidden], embeddings or what the layers before gave
    int32_t x_type;
    const void *cos, *sin;   // [T, half]
    int64_t half;
    const int64_t* slots;    // [T]
    const Spans* spans;
    const int64_t* rows;     // rows whose hidden states are wanted
    int64_t num_rows;
    void* hidden;            // [num_rows, hidden]; without a final norm, float
    float* delta;            // [T, hidden], what the last half layer adds to the residual
    char* memory;            // kept from half to half: stack_bytes of it
};

// The buffers of one step, float32 between products and in the matrices' type before them. What
// int8 matrices multiply are bytes, with a scale for each row.
struct Activations {
    float *residual, *qkv, *gate_up;
    char *operand, *query, *attended, *inner;
    float *scales, *inner_scales;  // of `operand`, of `inner`
};

int64_t stack_bytes(const Stack& stack, int64_t tokens);

// Half layers [first, last) of a step: half 2 i is the attention of layer i, 2 i + 1 its
// feed-forward; "half" 2 * count is the final norm of the wanted rows, or, without one, their
// sums, with which the next stack begins. With a segment
// the ranks' parts are summed in here; without, the caller sums `delta` after each half.
// Returns 0, or 1 + the rank that did not come.
int64_t run_stack(Backend& backend, const Stack& stack, const Step& step, const Segment* segment,
                  int64_t first, int64_t last);

}  // namespace phalanx
