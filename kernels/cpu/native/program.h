// What layers do to rows: to all of a step's, by a team that shares out every operation, or to some
// of them, by one thread.
#pragma once
#include <memory>

#include "decoder.h"

namespace phalanx {

constexpr int64_t kRows = 192;  // rows that go through the feed-forward block together: the wide
                                // activations between its products stay in the cache

constexpr int64_t kGrain = 4;  // rows of elementwise work that are worth sharing

inline bool has_bytes(const Stack& stack) { return stack.layers[0].qkv->type == kInt8; }

// Bytes between rows of what a matrix of `width` inputs multiplies: rows of bfloat16 begin at whole
// pairs and rows of bytes at whole words; the pad stays zero.
inline int64_t row_stride(const Stack& stack, int64_t width) {
    if (has_bytes(stack)) return round_up(width, 4);
    return stack.type == kBf16 ? round_up(width, 2) * 2 : width * 4;
}

// The attended heads of a token, which are multiplied as they are unless that is in bytes.
inline int64_t attended_stride(const Stack& stack) {
    int64_t width = stack.heads * stack.dim;
    return has_bytes(stack) ? width * type_bytes(stack.type) : row_stride(stack, width);
}

// Floats of what is activated.
inline int64_t up_width(const Stack& s) { return (s.gated ? 2 : 1) * s.inner; }

// The buffers of so many rows between the products of a feed-forward block. What products read has
// zeros behind rows of odd length.
inline int64_t lay_out_inner(const Stack& s, int64_t rows, char* base, Activations* at) {
    int64_t up = round_up(rows * up_width(s) * 4, 64);
    int64_t inner = round_up(rows * row_stride(s, s.inner), 64);
    if (base) {
        if (s.inner % 2) std::memset(base + up, 0, inner);
        at->up = (float*)base;
        at->inner = base + up;
        at->inner_scales = (float*)(base + up + inner);
    }
    return up + inner + round_up(rows * 4, 64);
}

// Of normed hidden states, which attended heads in bytes follow at the same place.
inline int64_t operand_stride(const Stack& s) {
    int64_t hidden = row_stride(s, s.hidden);
    return has_bytes(s) ? most(hidden, row_stride(s, s.heads * s.dim)) : hidden;
}

// The buffers of a step in its memory, and their size when there is none.
inline int64_t lay_out(const Stack& s, int64_t tokens, char* base, Activations* at) {
    int64_t heads = s.heads * s.dim, used = 0;
    auto take = [&](int64_t bytes, bool padded = false) {
        char* p = base ? base + used : nullptr;
        if (p && padded) std::memset(p, 0, bytes);
        used += round_up(bytes, 64);
        return p;
    };
    Activations all;
    all.residual = (float*)take(tokens * s.hidden * 4);
    all.qkv = (float*)take(tokens * (heads + 2 * s.kv_heads * s.dim) * 4);
    all.other = (float*)take(s.parallel ? tokens * s.hidden * 4 : 0);
    all.operand = take(tokens * operand_stride(s), s.hidden % 2);
    all.query = take(tokens * heads * type_bytes(s.type));
    all.attended = take(tokens * attended_stride(s), heads % 2);
    all.scales = (float*)take(tokens * 4);
    used += lay_out_inner(s, least(tokens, kRows), base ? base + used : nullptr, &all);
    if (at) *at = all;
    return used;
}

// One thread's view of a running step. All threads of the team make the same calls.
struct Program {
    Backend& backend;
    const Stack& stack;
    Step step;
    Activations at;
    Team& team;

    int64_t bytes() const { return type_bytes(stack.type); }
    bool in_bytes() const { return has_bytes(stack); }
    int64_t stride(int64_t width) const { return row_stride(stack, width); }

    // The program of some rows, which `alone` runs in memory of its own thread.
    Program rows(int64_t first, int64_t count, Team& alone) const {
        Program part{backend, stack, step, at, alone};
        Step& s = part.step;
        s.tokens = count;
        s.x = (const char*)step.x + first * stack.hidden * type_bytes(step.x_type);
        for (Angles& angles : s.angles) {
            angles.cos = (const char*)angles.cos + first * angles.half * bytes();
            angles.sin = (const char*)angles.sin + first * angles.half * bytes();
        }
        s.slots += first;
        s.delta += first * stack.hidden;
        s.squares += 2 * first;
        Activations& a = part.at;
        int64_t heads = stack.heads * stack.dim;
        a.residual += first * stack.hidden;
        a.qkv += first * (heads + 2 * stack.kv_heads * stack.dim);
        a.other += first * stack.hidden;
        a.operand += first * operand_stride(stack);
        a.query += first * heads * bytes();
        a.attended += first * attended_stride(stack);
        a.scales += first;
        Buffer& own = backend.inner[alone.thread];
        int64_t together = least(count, kRows), size = lay_out_inner(stack, together, nullptr, &a);
        lay_out_inner(stack, together, (char*)own.get(size), &a);
        return part;
    }

    // These rows' residuals and queries move to the first places; in order, none is overwritten
    // before it is read.
    void gather(const std::vector<int64_t>& wanted) const {
        int64_t width = stack.heads * stack.dim * bytes();
        team.split(1, 1, [&](int64_t, int64_t) {
            for (size_t i = 0; i < wanted.size(); i++) {
                int64_t row = wanted[i];
                std::memmove(at.residual + i * stack.hidden, at.residual + row * stack.hidden,
                             stack.hidden * 4);
                std::memmove(at.query + i * width, at.query + row * width, width);
            }
        });
    }

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
        bool at_once = behind && !behind->weight && norm.weight && !stack.layer_norm;
        at_once = at_once && stack.residual_scale == 1.0f;
        auto body = [&](int64_t row, void* out, int32_t type) {
            float* x = at.residual + row * stack.hidden;
            if (at_once) {
                return backend.isa->rms_norm(step.delta + row * stack.hidden, kFloat, x, kFloat,
                                             norm.weight, kFloat, 0.0f, stack.eps, stack.hidden,
                                             out, type);
            }
            if (behind) settled(row, *behind);
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

    Attention attention(const Layer& layer) const {
        return {at.query, at.attended, stack.heads * stack.dim, attended_stride(stack) / bytes(),
                stack.heads, stack.kv_heads, stack.dim, stack.type, stack.pool_type, layer.keys,
                layer.values, stack.head_stride, stack.block_size, stack.row, stack.scale,
                stack.softcap, layer.window, layer.slopes, layer.sinks};
    }
    // delta = what attention gives.
    void put_out(const Layer& layer) const {
        int64_t width = stack.heads * stack.dim, apart = attended_stride(stack);
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
    void add_other() const {
        team.split(step.tokens, kGrain, [&](int64_t first, int64_t last) {
            int64_t start = first * stack.hidden, size = (last - first) * stack.hidden;
            backend.isa->add_scaled(at.other + start, 1.0f, size, step.delta + start);
        });
    }
};

}  // namespace phalanx
