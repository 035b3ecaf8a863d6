// A stack of decoder layers as one program. What a layer does is data: which norms it has, whether
// heads are turned, what stands between the products of its feed-forward block.
#pragma once
#include "backend.h"

namespace phalanx {

constexpr int64_t kMostRanks = 64;

struct Norm {
    const float* weight;  // offset included; null: there is no such norm
    const float* bias;    // or null
};

// With h the residual, a the attention and m the feed-forward block, norms that are not there left
// out:
//
//     h += behind_attention(a(input(h)));  h += behind_mlp(m(post(h)))
//
// and in a parallel stack  h += a(input(h)) + m(post(h)), or m(input(h)) without `post`.
struct Layer {
    Norm input, behind_attention, post, behind_mlp;  // [hidden]
    Norm query, key;  // of heads, see Stack::head_norm_stride
    const Matrix *qkv, *output, *up, *down;
    void *keys, *values;  // [kv_heads, blocks, block_size, row], see Attention
    int64_t window;
    const float *slopes, *sinks;
    int32_t turning;  // 1 + which of the step's angles; 0: heads are not turned
};

struct Stack {
    int64_t count, hidden, heads, kv_heads, dim, inner;
    int32_t type, pool_type;
    int64_t head_stride, block_size, row;
    float scale, softcap, eps;
    float residual_scale;  // of all that is added to the residual
    float clip;            // queries, keys and values are cut off there; 0: not
    int32_t layer_norm;    // norms subtract the mean
    int32_t parallel, gated, activation;
    int64_t head_norm_stride;  // of the heads' weights: dim, or 0 where all heads share [dim]
    int32_t over_width;   // one norm over all heads of all ranks, instead of one for each
    int32_t counts_keys;  // the keys' squares are counted by this rank, of those that share them
    int64_t query_width, key_width;  // elements of all ranks' queries and keys
    const Layer* layers;
    Norm final_norm;  // not there in a stack that others follow
};

// The shared-memory segment of the ranks: `size` counters, one a cache line, then slots
// [2][size][slot_bytes]; the protocol is told where the segment is made.
struct Segment {
    char* base;
    int64_t rank, size, slot_bytes;
    double patience;  // seconds
};

struct Angles {
    const void *cos, *sin;  // [T, half], in the stack's type
    int64_t half;
};

struct Step {
    int64_t tokens;
    const void* x;           // [T, hidden], embeddings or what the layers before gave
    int32_t x_type;
    Angles angles[2];
    const int64_t* slots;    // [T]
    const Spans* spans;
    const int64_t* rows;     // rows whose hidden states are wanted, each once
    int64_t num_rows;
    void* hidden;            // [num_rows, hidden]; without a final norm, float
    float* delta;            // [T, hidden], what the last part adds to the residual
    float* squares;          // [T, 2], of queries and keys, where a norm is over all of them
    char* memory;            // kept from part to part: stack_bytes of it
};

// The buffers of one step, float32 between products and in the matrices' type before them. What
// int8 matrices multiply are bytes, with a scale for each row.
struct Activations {
    float *residual, *qkv, *up, *other;  // `other`: of the second block of a parallel layer
    char *operand, *query, *attended, *inner;
    float *scales, *inner_scales;  // of `operand`, of `inner`
};

int64_t stack_bytes(const Stack& stack, int64_t tokens);

// Parts of a layer, each of which ends where ranks sum: projections if a norm is over their width,
// attention, feed-forward block unless it is beside attention.
inline int64_t parts_of(const Stack& s) { return (s.over_width ? 1 : 0) + (s.parallel ? 1 : 2); }

// Parts [first, last) of a step, counted through all layers; the one behind the last is the final
// norm of the wanted rows, or, without one, their sums, with which the next stack begins. With a
// segment the ranks' numbers are summed in here; without, the caller sums after each part: `squares`
// after projections, else `delta`. Returns 0, or 1 + the rank that did not come.
int64_t run_stack(Backend& backend, const Stack& stack, const Step& step, const Segment* segment,
                  int64_t first, int64_t last);

}  // namespace phalanx
