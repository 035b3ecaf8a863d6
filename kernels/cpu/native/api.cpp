// The C interface, called by ctypes: pointers and numbers only. Functions that return a pointer
// return null on failure; the caller has checked shapes and types.
#include <new>

#include "backend.h"
#include "decoder.h"
#include "dispatch.h"
#include "pack.h"
#include "stored.h"

using namespace phalanx;

#define PHX_EXPORT extern "C" __attribute__((visibility("default")))

using Turn = std::lock_guard<std::mutex>;

constexpr int64_t kWorthSharing = 64 << 10;  // bytes that one thread reads in some microseconds

// body(row) for each row of `size` numbers.
template <class Body>
static void for_rows(Backend* b, int64_t rows, int64_t size, Body body) {
    int64_t grain = most(1, kWorthSharing / 4 / most(size, 1));
    b->pool.run([&](Team& team) {
        team.split(rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) body(row);
        });
    }, rows <= grain);
}

// Counts changes of what crosses this interface: functions, structures, layouts of memory. Python's
// side has the same number (library.py).
PHX_EXPORT int32_t phx_interface() { return 5; }

PHX_EXPORT Backend* phx_open(const char* isa_name, int threads) {
    const Isa* isa = find_isa(isa_name);
    return isa ? new (std::nothrow) Backend(isa, threads) : nullptr;
}

PHX_EXPORT void phx_close(Backend* backend) { delete backend; }

PHX_EXPORT const char* phx_isa(Backend* backend) { return backend->isa->name; }

// See pack.h.
PHX_EXPORT Matrix* phx_pack(Backend* b, const void* weight, int32_t type, int64_t out, int64_t in,
                            const float* bias, int32_t packed) {
    Turn turn(b->busy);
    return pack(*b, weight, type, out, in, bias, packed);
}

PHX_EXPORT int64_t phx_packed_bytes(const Matrix* m) { return packed_bytes(*m); }

// See stored.h. These two need no backend: whatever it does meanwhile goes on.
PHX_EXPORT void phx_describe(Stored* stored) { describe(*stored); }
PHX_EXPORT uint64_t phx_digest(const void* data, int64_t bytes) { return digest(data, bytes); }

PHX_EXPORT int32_t phx_read(Backend* b, int32_t file, Part* parts, int64_t count) {
    Turn turn(b->busy);
    return read_parts(*b, file, parts, count);
}

PHX_EXPORT int32_t phx_restore(Backend* b, int32_t file, Stored* stored, int64_t count) {
    Turn turn(b->busy);
    return restore(*b, file, stored, count);
}

// An embedding table that is also the output head is kept once.
PHX_EXPORT void phx_unpack_rows(const Matrix* m, const int64_t* ids, int64_t count, void* out) {
    unpack_rows(*m, ids, count, out);
}

// bfloat16 rows of odd length end in half a word: copied, with a zero behind them.
static void even_rows(const void* x, int64_t rows, int64_t in, char* copy) {
    for (int64_t row = 0; row < rows; row++) {
        std::memcpy(copy + row * (in + 1) * 2, (const char*)x + row * in * 2, in * 2);
        std::memset(copy + (row * (in + 1) + in) * 2, 0, 2);
    }
}

// Calls body(team, operand) with x [rows, in] as the matrix multiplies it. An int8 matrix takes x
// of either type, any other its own.
template <class Body>
static void with_operand(Backend* b, const Matrix* m, const void* x, int32_t x_type, int64_t rows,
                         Body body) {
    Operand operand{x, nullptr, m->in};
    bool in_bytes = m->type == kInt8;
    if (in_bytes) {
        operand = {b->rows.get(rows * m->units * 4), (float*)b->scales.get(rows * 4), m->units * 4};
    } else if (m->type != kFloat && m->in % 2) {
        operand = {b->rows.get(rows * (m->in + 1) * 2), nullptr, m->in + 1};
        even_rows(x, rows, m->in, (char*)operand.x);
    }
    bool is_small = m->panels * m->units * kPanel * 4 < kWorthSharing;
    b->pool.run([&](Team& team) {
        if (in_bytes) {
            team.split(rows, 4, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; row++) {
                    const char* from = (const char*)x + row * m->in * type_bytes(x_type);
                    auto* place = (uint8_t*)operand.x + row * operand.stride;
                    ((float*)operand.scales)[row] = b->isa->quantize(
                        from, x_type, m->in, operand.stride, kUnsigned, place);
                }
            });
        }
        body(team, operand);
    }, is_small);
}

// out [rows, matrix.out] = x [rows, in] @ weight.T + bias, both contiguous.
PHX_EXPORT void phx_matmul(Backend* b, const Matrix* m, const void* x, int32_t x_type,
                           int64_t rows, void* out, int32_t out_type) {
    Turn turn(b->busy);
    with_operand(b, m, x, x_type, rows, [&](Team& team, const Operand& operand) {
        multiply(*b, team, *m, operand, rows, out, m->out, out_type);
    });
}

// The first largest output of every row: values [rows], NaN where one is not finite; ids [rows].
PHX_EXPORT void phx_best(Backend* b, const Matrix* m, const void* x, int32_t x_type, int64_t rows,
                         float* values, int64_t* ids) {
    Turn turn(b->busy);
    int64_t threads = b->pool.size();
    auto* winners = (Winner*)b->winners.get(threads * rows * sizeof(Winner));
    for (int64_t i = 0; i < threads * rows; i++) winners[i] = {-INFINITY, m->out};
    with_operand(b, m, x, x_type, rows, [&](Team& team, const Operand& operand) {
        find_best(*b, team, *m, operand, rows, winners);
    });
    for (int64_t row = 0; row < rows; row++) {
        Winner best = merge(winners, threads, rows, row);
        values[row] = best.value;
        ids[row] = best.id;
    }
}

PHX_EXPORT void phx_rms_norm(Backend* b, const void* delta, void* residual, const void* weight,
                             int32_t type, float offset, float eps, int64_t rows, int64_t size,
                             void* out) {
    Turn turn(b->busy);
    for_rows(b, rows, size, [&](int64_t row) {
        int64_t at = row * size * type_bytes(type);
        const void* added = delta ? (const char*)delta + at : nullptr;
        b->isa->rms_norm(added, type, (char*)residual + at, type, weight, type, offset, eps,
                         size, (char*)out + at, type);
    });
}

// out [rows, size] = activation(x [rows, size]), or, when `gated`, of the first half of each row of
// x [rows, 2 * size], times the second.
PHX_EXPORT void phx_activate(Backend* b, const void* x, int32_t gated, int32_t activation,
                             int32_t type, int64_t rows, int64_t size, void* out) {
    Turn turn(b->busy);
    int64_t bytes = size * type_bytes(type);
    for_rows(b, rows, size, [&](int64_t row) {
        const char* gate = (const char*)x + row * (gated ? 2 : 1) * bytes;
        b->isa->activate(gate, gated ? gate + bytes : nullptr, activation, type, size,
                         (char*)out + row * bytes, type);
    });
}

// heads [rows, count, dim], `stride` elements between rows -> out, contiguous.
PHX_EXPORT void phx_rope(Backend* b, const void* heads, int64_t stride, const void* cos,
                         const void* sin, int32_t type, int64_t rows, int64_t count, int64_t half,
                         int64_t dim, void* out) {
    Turn turn(b->busy);
    int64_t bytes = type_bytes(type);
    for_rows(b, rows * count, dim, [&](int64_t i) {
        int64_t row = i / count, angle = row * half * bytes;
        const char* in = (const char*)heads + (row * stride + i % count * dim) * bytes;
        b->isa->rope(in, type, (const char*)cos + angle, (const char*)sin + angle, type, half,
                     dim, (char*)out + i * dim * bytes, type);
    });
}

// keys (is_key) or values [rows, kv_heads, dim], `stride` elements between rows, into the pool's
// slots; of an int8 pool, with their scales.
PHX_EXPORT void phx_store(Backend* b, const void* source, int64_t stride, int32_t type, void* pool,
                          int32_t pool_type, int64_t head_stride, int64_t block_size,
                          int32_t is_key, const int64_t* slots, int64_t rows, int64_t kv_heads,
                          int64_t dim) {
    Turn turn(b->busy);
    auto* word = (bf16*)b->rows.get(dim * 2);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t head = 0; head < kv_heads; head++) {
            const char* in = (const char*)source + (row * stride + head * dim) * type_bytes(type);
            if (pool_type == kInt8) {
                int64_t at = head * head_stride + slots[row] * (dim + kScaleBytes);
                store_levels(*b->isa, in, type, dim, (int8_t*)pool + at);
                continue;
            }
            if (pool_type == kBytePanels) {
                auto* own = (uint8_t*)pool + head * head_stride;
                store_in_byte_panels(*b->isa, in, type, dim, is_key, own, block_size, slots[row]);
                continue;
            }
            if (pool_type == kPanels) {
                b->isa->convert(in, type, dim, word, kBf16);
                auto* own = (uint16_t*)pool + head * head_stride;
                store_in_panels(word, dim, is_key, own, block_size, slots[row]);
                continue;
            }
            int64_t at = head * head_stride + slots[row] * dim;
            char* out = (char*)pool + at * type_bytes(pool_type);
            b->isa->convert(in, type, dim, out, pool_type);
        }
    }
}

PHX_EXPORT void phx_attention(Backend* b, const Attention* call, const Spans* spans) {
    Turn turn(b->busy);
    plan_units(*call, *spans, b->units);
    b->pool.run([&](Team& team) { attend(*b, team, *call, *spans, b->units); });
}

// out[row] = the first largest of x [rows, size].
PHX_EXPORT void phx_argmax(Backend* b, const float* x, int64_t rows, int64_t size, int64_t* out) {
    Turn turn(b->busy);
    for_rows(b, rows, size, [&](int64_t row) {
        out[row] = b->isa->argmax(x + row * size, size);
    });
}


// Bytes that a step of so many tokens needs at step->memory.
PHX_EXPORT int64_t phx_stack_bytes(const Stack* stack, int64_t tokens) {
    return stack_bytes(*stack, tokens);
}

// See decoder.h. segment may be null.
PHX_EXPORT int64_t phx_run_stack(Backend* b, const Stack* stack, const Step* step,
                                 const Segment* segment, int64_t first, int64_t last) {
    Turn turn(b->busy);
    return run_stack(*b, *stack, *step, segment, first, last);
}
