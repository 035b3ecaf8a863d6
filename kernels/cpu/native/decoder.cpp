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
    if (has_bytes(stack)) return round_up(width, 4);
    return stack.type == kBf16 ? round_up(width, 2) * 2 : width * 4;
}

// The attended heads of a token, which are multiplied as they are unless that is in bytes.
int64_t attended_stride(const Stack& stack) {
    int64_t width = stack.heads * stack.dim;
    return has_bytes(stack) ? width * type_bytes(stack.type) : row_stride(stack, width);
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

    // One row; without a norm it is only converted. out may be x if it is float.
    void normalize(const Norm& norm, const float* x, int64_t size, void* out, int32_t type) const {
        const Isa& isa = *backend.isa;
        if (!norm.weight) return isa.convert(x, kFloat, size, out, type);
        if (stack.layer_norm) {
            return isa.layer_norm(x, norm.weight, norm.bias, stack.eps, size, out, type);
        }
        isa.rms_norm(nullptr, kFloat, (void*)x, kFloat, norm.weight, kFloat, 0.0f, stack.eps, size,
                     out, type);
    }

    // The residual's row, once what the last part gave is added.
    float* settled(int64_t row, const Norm& behind) const {
        float *residual = at.residual + row * stack.hidden, *delta = step.delta + row * stack.hidden;
        if (behind.weight) normalize(behind, delta, stack.hidden, delta, kFloat);
        backend.isa->add_scaled(delta, stack.residual_scale, stack.hidden, residual);
        return residual;
    }

    // operand = norm(residual), row by row. `behind` is the norm of what the last part gave; null
    // where nothing is to be added.
    void enter(const Norm* behind, const Norm& norm) const {
        auto body = [&](int64_t row, void* out, int32_t type) {
            const float* x = behind ? settled(row, *behind) : at.residual + row * stack.hidden;
            normalize(norm, x, stack.hidden, out, type);
        };
        if (in_bytes()) {
            return quantized(step.tokens, kGrain, stack.hidden, at.operand, at.scales,
                             [&](int64_t row, float* wide) { body(row, wide, kFloat); });
        }
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                body(row, at.operand + row * stride(stack.hidden), stack.type);
            }
        });
    }

    // Rows of what a matrix multiplies, `stride` apart.
    void product(const Matrix& matrix, const char* x, const float* scales, int64_t rows,
                 float* out) const {
        int64_t elements = in_bytes() ? stride(matrix.in) : stride(matrix.in) / bytes();
        multiply(backend, team, matrix, {x, scales, elements}, rows, out, matrix.out, kFloat);
    }

    void project(const Layer& layer) const {
        product(*layer.qkv, at.operand, at.scales, step.tokens, at.qkv);
        if (stack.clip <= 0.0f && !stack.over_width) return;
        int64_t queries = stack.heads * stack.dim, keys = stack.kv_heads * stack.dim;
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                float* x = at.qkv + row * (queries + 2 * keys);
                for (int64_t i = 0; i < queries + 2 * keys && stack.clip > 0.0f; i++) {
                    x[i] = x[i] > stack.clip ? stack.clip : x[i] < -stack.clip ? -stack.clip : x[i];
                }
                if (!stack.over_width) continue;
                float of_keys = backend.isa->squares(x + queries, keys);
                step.squares[2 * row] = backend.isa->squares(x, queries);
                step.squares[2 * row + 1] = stack.counts_keys ? of_keys : 0.0f;
            }
        });
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
            return turn(layer, in, row, head, query, stack.type);
        }
        bool is_key = head < turned;
        int64_t kv_head = head - (is_key ? stack.heads : turned);
        char* pool = (char*)(is_key ? layer.keys : layer.values);
        if (stack.pool_type == kPanels) {
            bf16 word[kMostDim];
            if (is_key) turn(layer, in, row, head, (char*)word, kBf16);
            else backend.isa->convert(in, kFloat, stack.dim, word, kBf16);
            auto* own = (uint16_t*)pool + kv_head * stack.head_stride;
            return store_in_panels(word, stack.dim, is_key, own, stack.block_size, step.slots[row]);
        }
        if (stack.pool_type == kBytePanels) {
            float turned_key[kMostDim];
            if (is_key) turn(layer, in, row, head, (char*)turned_key, kFloat);
            auto* own = (uint8_t*)pool + kv_head * stack.head_stride;
            return store_in_byte_panels(*backend.isa, is_key ? turned_key : in, kFloat, stack.dim,
                                        is_key, own, stack.block_size, step.slots[row]);
        }
        int64_t place = kv_head * stack.head_stride + step.slots[row] * stack.row;
        char* out = pool + place * type_bytes(stack.pool_type);
        if (stack.pool_type == kInt8) {
            float turned_key[kMostDim];
            if (is_key) turn(layer, in, row, head, (char*)turned_key, kFloat);
            const float* source = is_key ? turned_key : in;
            return store_levels(*backend.isa, source, kFloat, stack.dim, (int8_t*)out);
        }
        if (is_key) return turn(layer, in, row, head, out, stack.pool_type);
        backend.isa->convert(in, kFloat, stack.dim, out, stack.pool_type);
    }
    // `head` counts queries, then keys.
    void turn(const Layer& layer, const float* in, int64_t row, int64_t head, char* out,
              int32_t type) const {
        float normed[kMostDim];
        if (layer.query.weight) {
            norm_head(layer, in, row, head, normed);
            in = normed;
        }
        if (!layer.turning) return backend.isa->convert(in, kFloat, stack.dim, out, type);
        const Angles& angles = step.angles[layer.turning - 1];
        const char* cos = (const char*)angles.cos + row * angles.half * bytes();
        const char* sin = (const char*)angles.sin + row * angles.half * bytes();
        backend.isa->rope(in, kFloat, cos, sin, stack.type, angles.half, stack.dim, out, type);
    }
    void norm_head(const Layer& layer, const float* in, int64_t row, int64_t head,
                   float* out) const {
        bool is_key = head >= stack.heads;
        Norm norm = is_key ? layer.key : layer.query;
        norm.weight += (is_key ? head - stack.heads : head) * stack.head_norm_stride;
        if (!stack.over_width) return normalize(norm, in, stack.dim, out, kFloat);
        float mean = step.squares[2 * row + is_key];
        mean /= (float)(is_key ? stack.key_width : stack.query_width);
        float scale = 1.0f / std::sqrt(mean + stack.eps);
        for (int64_t i = 0; i < stack.dim; i++) out[i] = in[i] * scale * norm.weight[i];
    }

    void attention(const Layer& layer) const {
        int64_t width = stack.heads * stack.dim, apart = attended_stride(stack);
        if (stack.heads) {
            place_heads(layer);
            Attention call{at.query, at.attended, width, apart / bytes(), stack.heads,
                           stack.kv_heads, stack.dim, stack.type, stack.pool_type, layer.keys,
                           layer.values, stack.head_stride, stack.block_size, stack.row,
                           stack.scale, stack.softcap, layer.window, layer.slopes, layer.sinks};
            attend(backend, team, call, *step.spans);
        }
        if (!in_bytes()) {
            return product(*layer.output, at.attended, nullptr, step.tokens, step.delta);
        }
        quantized(step.tokens, kGrain, width, at.operand, at.scales, [&](int64_t row, float* wide) {
            backend.isa->convert(at.attended + row * apart, stack.type, width, wide, kFloat);
        });
        product(*layer.output, at.operand, at.scales, step.tokens, step.delta);
    }

    void feed_forward(const Layer& layer, float* out) const {
        for (int64_t start = 0; start < step.tokens; start += kRows) {
            int64_t rows = least(kRows, step.tokens - start);
            const char* x = at.operand + start * stride(stack.hidden);
            product(*layer.up, x, at.scales + start, rows, at.up);
            activate_rows(rows);
            product(*layer.down, at.inner, at.inner_scales, rows, out + start * stack.hidden);
        }
    }
    void activate_rows(int64_t rows) const {
        int64_t inner = stack.inner, apart = up_width(stack);
        auto body = [&](const float* x, int64_t size, void* out, int32_t type) {
            const float* up = stack.gated ? x + inner : nullptr;
            backend.isa->activate(x, up, stack.activation, kFloat, size, out, type);
        };
        if (in_bytes()) {
            return quantized(rows, 1, inner, at.inner, at.inner_scales,
                             [&](int64_t row, float* wide) {
                body(at.up + row * apart, inner, wide, kFloat);
            });
        }
        team.split(rows * inner, kGrain * inner, [&](int64_t first, int64_t last) {
            for (int64_t i = first, size; i < last; i += size) {
                int64_t row = i / inner, column = i % inner;
                size = least(inner - column, last - i);
                char* out = at.inner + row * stride(inner) + column * bytes();
                body(at.up + row * apart + column, size, out, stack.type);
            }
        });
    }
    static int64_t up_width(const Stack& s) { return (s.gated ? 2 : 1) * s.inner; }

    // To where the heads are projected. `behind` as for `enter`.
    void begin_layer(const Layer& layer, const Norm* behind) const {
        if (stack.parallel) {
            bool alike = !layer.post.weight;
            enter(behind, alike ? layer.input : layer.post);
            feed_forward(layer, at.other);
            if (!alike) enter(nullptr, layer.input);
        } else {
            enter(behind, layer.input);
        }
        project(layer);
    }
    void part(int64_t index) const {
        int64_t parts = parts_of(stack), number = index / parts, place = index % parts;
        const Layer& layer = stack.layers[number];
        if (place == 0) {
            begin_layer(layer, number ? &stack.layers[number - 1].behind_mlp : nullptr);
        }
        if (place == stack.over_width) attention(layer);
        if (place == stack.over_width && stack.parallel) add_other();
        if (place > stack.over_width) {
            enter(&layer.behind_attention, layer.post);
            feed_forward(layer, step.delta);
        }
    }
    void add_other() const {
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            int64_t start = first * stack.hidden, size = (last - first) * stack.hidden;
            backend.isa->add_scaled(at.other + start, 1.0f, size, step.delta + start);
        });
    }
    // What ranks sum behind a part.
    void sum(Reduction& reduction, int64_t index) const {
        bool projected = stack.over_width && index % parts_of(stack) == 0;
        int64_t width = projected ? 2 : stack.hidden;
        reduction.sum(*backend.isa, projected ? step.squares : step.delta, step.tokens * width,
                      team);
    }

    void finish() const {
        const Norm& behind = stack.layers[stack.count - 1].behind_mlp;
        int32_t type = stack.final_norm.weight ? stack.type : (int32_t)kFloat;
        team.split(step.num_rows, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                char* out = (char*)step.hidden + i * stack.hidden * type_bytes(type);
                const float* x = settled(step.rows[i], behind);
                normalize(stack.final_norm, x, stack.hidden, out, type);
            }
        });
    }
};

// The buffers of a step in its memory, and their size when there is none. What products read has
// zeros behind rows of odd length.
int64_t lay_out(const Stack& s, int64_t tokens, char* base, Activations* at) {
    int64_t width = type_bytes(s.type), rows = least(tokens, kRows), used = 0;
    int64_t heads = s.heads * s.dim, operand = row_stride(s, s.hidden);
    if (has_bytes(s)) operand = most(operand, row_stride(s, heads));
    auto take = [&](int64_t bytes, bool padded = false) {
        char* p = base ? base + used : nullptr;
        if (p && padded) std::memset(p, 0, bytes);
        used += round_up(bytes, 64);
        return p;
    };
    Activations all;
    all.residual = (float*)take(tokens * s.hidden * 4);
    all.qkv = (float*)take(tokens * (heads + 2 * s.kv_heads * s.dim) * 4);
    all.up = (float*)take(rows * Program::up_width(s) * 4);
    all.other = (float*)take(s.parallel ? tokens * s.hidden * 4 : 0);
    all.operand = take(tokens * operand, s.hidden % 2);
    all.query = take(tokens * heads * width);
    all.attended = take(tokens * attended_stride(s), heads % 2);
    all.inner = take(rows * row_stride(s, s.inner), s.inner % 2);
    all.scales = (float*)take(tokens * 4);
    all.inner_scales = (float*)take(rows * 4);
    if (at) *at = all;
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
    int64_t all = parts_of(stack) * stack.count;
    backend.pool.run([&](Team& team) {
        Program program{backend, stack, step, at, team};
        if (first == 0) program.begin();
        for (int64_t index = first; index < least(last, all); index++) {
            program.part(index);
            program.sum(reduction, index);
            if (reduction.lost()) return;
        }
        if (last > all) program.finish();
    });
    return reduction.lost();
}

}  // namespace phalanx
