#include "decoder.h"

#include "reduce.h"

namespace phalanx {

namespace {

constexpr int64_t kRows = 192;  // rows that go through the feed-forward block together: the wide
                                // activations between its products stay in the cache

constexpr int64_t kGrain = 4;  // rows of elementwise work that are worth sharing

bool has_bytes(const Stack& stack) { return stack.layers[0].qkv->type == kInt8; }

// Bytes between rows of what a matrix of `width` inputs multiplies: rows of bfloat16 begin at whole
// pairs and rows of bytes at whole words; the pad stays zero.
int64_t row_stride(const Stack& stack, int64_t width) {
    return has_bytes(stack) ? round_up(width, 4) : round_up(width, 2) * type_bytes(stack.type);
}

// One thread's view of a running step. All threads of the team make the same calls.
struct Program {
    Backend& backend;
    const Stack& stack;
    const Step& step;
    const Activations& at;
    Team& team;

    int64_t bytes() const { return type_bytes(stack.type); }
    bool in_bytes() const { return has_bytes(stack); }
    int64_t stride(int64_t width) const { return row_stride(stack, width); }

    // Calls body(row, wide) for each of `rows`, which fills `wide` [width]; it is what a product
    // multiplies, row by row at `out`.
    template <class Body>
    void quantized(int64_t rows, int64_t grain, int64_t width, char* out, float* scales,
                   Body body) const {
        team.split(rows, grain, [&](int64_t first, int64_t last) {
            auto* wide = (float*)backend.scratch[team.thread].get(width * 4);
            for (int64_t row = first; row < last; row++) {
                body(row, wide);
                auto* place = (uint8_t*)out + row * stride(width);
                scales[row] = backend.isa->quantize(wide, kFloat, width, stride(width), kUnsigned,
                                                    place);
            }
        });
    }

    void begin() const {
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            int64_t start = first * stack.hidden, size = (last - first) * stack.hidden;
            backend.isa->convert((const char*)step.x + start * type_bytes(step.x_type),
                                 step.x_type, size, at.residual + start, kFloat);
        });
    }

    // residual += what the last half computed; out = norm(residual), row by row.
    void norm_row(int64_t row, const float* weight, bool fresh, void* out, int32_t type) const {
        int64_t place = row * stack.hidden;
        backend.isa->rms_norm(fresh ? nullptr : step.delta + place, kFloat, at.residual + place,
                              kFloat, weight, kFloat, 0.0f, stack.eps, stack.hidden, out, type);
    }
    // What norm_row would norm after the last half.
    void add_row(int64_t row, float* out) const {
        int64_t place = row * stack.hidden;
        for (int64_t j = 0; j < stack.hidden; j++) {
            out[j] = at.residual[place + j] + step.delta[place + j];
        }
    }
    void norm(const float* weight, bool fresh) const {
        if (in_bytes()) {
            auto body = [&](int64_t row, float* wide) {
                norm_row(row, weight, fresh, wide, kFloat);
            };
            return quantized(step.tokens, kGrain, stack.hidden, at.operand, at.scales, body);
        }
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                char* out = at.operand + row * stack.hidden * bytes();
                norm_row(row, weight, fresh, out, stack.type);
            }
        });
    }

    // Rows of what a matrix multiplies, `stride` apart.
    void product(const Matrix& matrix, const char* x, const float* scales, int64_t rows,
                 float* out) const {
        int64_t elements = in_bytes() ? stride(matrix.in) : stride(matrix.in) / bytes();
        multiply(backend, team, matrix, {x, scales, elements}, rows, out, matrix.out, kFloat);
    }

    // Queries and keys turned, keys and values into their slots.
    void place_heads(const Layer& layer) const {
        int64_t all = stack.heads + 2 * stack.kv_heads;
        team.split(step.tokens * all, kGrain * all, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) place_head(layer, i / all, i % all);
        });
    }
    void place_head(const Layer& layer, int64_t row, int64_t head) const {
        int64_t turned = stack.heads + stack.kv_heads;
        const float* in = at.qkv + (row * (turned + stack.kv_heads) + head) * stack.dim;
        if (head < stack.heads) {
            char* query = at.query + (row * stack.heads + head) * stack.dim * bytes();
            return turn(in, layer.query_norm, row, query, stack.type);
        }
        bool is_key = head < turned;
        int64_t kv_head = head - (is_key ? stack.heads : turned);
        char* pool = (char*)(is_key ? layer.keys : layer.values);
        if (stack.pool_type == kPanels) {
            bf16 word[kMostDim];
            if (is_key) turn(in, layer.key_norm, row, (char*)word, kBf16);
            else backend.isa->convert(in, kFloat, stack.dim, word, kBf16);
            auto* own = (uint16_t*)pool + kv_head * stack.head_stride;
            return store_in_panels(word, stack.dim, is_key, own, stack.block_size, step.slots[row]);
        }
        int64_t place = kv_head * stack.head_stride + step.slots[row] * stack.row;
        char* out = pool + place * type_bytes(stack.pool_type);
        if (stack.pool_type == kInt8) {
            float turned_key[kMostDim];
            if (is_key) turn(in, layer.key_norm, row, (char*)turned_key, kFloat);
            const float* source = is_key ? turned_key : in;
            return store_levels(*backend.isa, source, kFloat, stack.dim, (int8_t*)out);
        }
        if (is_key) return turn(in, layer.key_norm, row, out, stack.pool_type);
        backend.isa->convert(in, kFloat, stack.dim, out, stack.pool_type);
    }
    void turn(const float* in, const float* norm, int64_t row, char* out, int32_t type) const {
        float normed[kMostDim];
        if (norm) {
            backend.isa->rms_norm(nullptr, kFloat, (void*)in, kFloat, norm, kFloat, 0.0f,
                                  stack.eps, stack.dim, normed, kFloat);
            in = normed;
        }
        const char* cos = (const char*)step.cos + row * step.half * bytes();
        const char* sin = (const char*)step.sin + row * step.half * bytes();
        backend.isa->rope(in, kFloat, cos, sin, stack.type, step.half, stack.dim, out, type);
    }

    void attention(const Layer& layer) const {
        int64_t width = stack.heads * stack.dim;
        if (stack.heads) {
            product(*layer.qkv, at.operand, at.scales, step.tokens, at.qkv);
            place_heads(layer);
            Attention call{at.query, at.attended, width, stack.heads, stack.kv_heads, stack.dim,
                           stack.type, stack.pool_type, layer.keys, layer.values,
                           stack.head_stride, stack.block_size, stack.row, stack.scale,
                           stack.softcap, layer.window, layer.slopes, layer.sinks};
            attend(backend, team, call, *step.spans);
        }
        if (!in_bytes()) {
            return product(*layer.output, at.attended, nullptr, step.tokens, step.delta);
        }
        quantized(step.tokens, kGrain, width, at.operand, at.scales, [&](int64_t row, float* wide) {
            const char* from = at.attended + row * width * bytes();
            backend.isa->convert(from, stack.type, width, wide, kFloat);
        });
        product(*layer.output, at.operand, at.scales, step.tokens, step.delta);
    }

    void feed_forward(const Layer& layer) const {
        for (int64_t start = 0; start < step.tokens; start += kRows) {
            int64_t rows = least(kRows, step.tokens - start);
            const char* x = at.operand + start * stride(stack.hidden);
            product(*layer.gate_up, x, at.scales + start, rows, at.gate_up);
            activate_rows(rows);
            float* out = step.delta + start * stack.hidden;
            product(*layer.down, at.inner, at.inner_scales, rows, out);
        }
    }
    void activate_rows(int64_t rows) const {
        int64_t inner = stack.inner;
        if (in_bytes()) {
            auto body = [&](int64_t row, float* wide) {
                const float* gate = at.gate_up + row * 2 * inner;
                backend.isa->silu_mul(gate, gate + inner, kFloat, inner, wide, kFloat);
            };
            return quantized(rows, 1, inner, at.inner, at.inner_scales, body);
        }
        team.split(rows * inner, kGrain * inner, [&](int64_t first, int64_t last) {
            activate(first, last);
        });
    }
    // Elements [first, last) of [rows, inner].
    void activate(int64_t first, int64_t last) const {
        int64_t inner = stack.inner;
        for (int64_t i = first, size; i < last; i += size) {
            int64_t row = i / inner, column = i % inner;
            size = least(inner - column, last - i);
            const float* gate = at.gate_up + row * 2 * inner + column;
            char* out = at.inner + row * stride(inner) + column * bytes();
            backend.isa->silu_mul(gate, gate + inner, kFloat, size, out, stack.type);
        }
    }

    void half(int64_t index) const {
        const Layer& layer = stack.layers[index / 2];
        bool is_attention = index % 2 == 0;
        norm(is_attention ? layer.input_norm : layer.post_norm, index == 0);
        if (is_attention) attention(layer); else feed_forward(layer);
    }

    void finish() const {
        team.split(step.num_rows, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                if (!stack.final_norm) {
                    add_row(step.rows[i], (float*)step.hidden + i * stack.hidden);
                    continue;
                }
                char* out = (char*)step.hidden + i * stack.hidden * bytes();
                norm_row(step.rows[i], stack.final_norm, false, out, stack.type);
            }
        });
    }
};

// The buffers of a step in its memory, and their size when there is none.
int64_t lay_out(const Stack& s, int64_t tokens, char* base, Activations* at) {
    int64_t width = type_bytes(s.type), rows = least(tokens, kRows), used = 0;
    int64_t operand = row_stride(s, s.hidden);
    if (has_bytes(s)) operand = most(operand, row_stride(s, s.heads * s.dim));
    int64_t offsets[9], sizes[9] = {
        tokens * s.hidden * 4,
        tokens * (s.heads + 2 * s.kv_heads) * s.dim * 4,
        rows * 2 * s.inner * 4,
        tokens * operand,
        tokens * s.heads * s.dim * width,
        tokens * s.heads * s.dim * width,
        rows * row_stride(s, s.inner),
        tokens * 4,
        rows * 4,
    };
    for (int i = 0; i < 9; i++) {
        offsets[i] = used;
        used += round_up(sizes[i], 64);
    }
    if (base) {
        *at = {(float*)(base + offsets[0]), (float*)(base + offsets[1]),
               (float*)(base + offsets[2]), base + offsets[3], base + offsets[4],
               base + offsets[5], base + offsets[6], (float*)(base + offsets[7]),
               (float*)(base + offsets[8])};
        if (s.inner % 2) std::memset(at->inner, 0, sizes[6]);
    }
    return used;
}

}  // namespace

int64_t stack_bytes(const Stack& stack, int64_t tokens) {
    return lay_out(stack, tokens, nullptr, nullptr);
}

int64_t run_stack(Backend& backend, const Stack& stack, const Step& step, const Segment* segment,
                  int64_t first, int64_t last) {
    Activations at;
    lay_out(stack, step.tokens, step.memory, &at);
    Attention shape{};
    shape.heads = stack.heads;
    shape.kv_heads = stack.kv_heads;
    plan_units(shape, *step.spans, backend.units);
    Reduction reduction(segment);
    backend.pool.run([&](Team& team) {
        Program program{backend, stack, step, at, team};
        if (first == 0) program.begin();
        for (int64_t half = first; half < least(last, 2 * stack.count); half++) {
            program.half(half);
            reduction.sum(*backend.isa, step.delta, step.tokens * stack.hidden, team);
            if (reduction.lost()) return;
        }
        if (last > 2 * stack.count) program.finish();
    });
    return reduction.lost();
}

}  // namespace phalanx
