// One backend: its threads, its instruction set, its memory.
#pragma once
#include "pool.h"

namespace phalanx {

// Memory that is given back all at once. Large pieces are on huge pages where the system has
// them: walking through weights with 4 KB pages costs a tenth of the bandwidth.
class Arena {
  public:
    ~Arena();
    void* take(int64_t bytes, bool zeroed = true);  // aligned to a cache line

    struct Mark {
        size_t chunks;
        char *next, *end;
    };
    Mark mark() const { return {chunks_.size(), next_, end_}; }
    void rewind(const Mark& mark);  // gives back what was taken since

  private:
    std::vector<void*> chunks_;
    char* next_ = nullptr;
    char* end_ = nullptr;
};

// A buffer that grows and is reused from call to call.
class Buffer {
  public:
    ~Buffer();
    void* get(int64_t bytes);  // aligned to a cache line; the old contents are lost when it grows

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

struct Backend {
    Backend(const Isa* isa, int threads) : isa(isa), pool(threads), scratch(pool.size()), inner(pool.size()) {}
    const Isa* isa;
    Pool pool;
    Arena arena;
    std::vector<Buffer> scratch, inner;  // one a thread
    Buffer rows, scales, winners;
    std::mutex busy;  // ranks that are threads of one process may share a backend
    std::vector<AttentionUnit> units;
};

// What a product multiplies: rows in the matrix's type, `stride` elements apart, bytes with scales.
struct Operand {
    const void* x;
    const float* scales;
    int64_t stride;
};

// A matrix product by the running team.
void multiply(Backend& backend, Team& team, const Matrix& matrix, const Operand& operand,
              int64_t rows, void* out, int64_t out_stride, int32_t out_type);

struct Winner {
    float value;  // NaN: some output of the row is not finite
    int64_t id;
};

// The largest output of every row of a product, the first of several, which is not written down.
// winners [threads, rows]: each thread's own; `merge` has the last word.
void find_best(Backend& backend, Team& team, const Matrix& matrix, const Operand& operand,
               int64_t rows, Winner* winners);
Winner merge(const Winner* winners, int64_t threads, int64_t rows, int64_t row);

// A key or value into an int8 pool: levels, then their scale.
inline void store_levels(const Isa& isa, const void* x, int32_t type, int64_t dim, int8_t* out) {
    float scale = isa.quantize(x, type, dim, dim, 0, (uint8_t*)out);
    std::memcpy(out + dim, &scale, kScaleBytes);
}

// One token's key or value into panels of blocks (panels.inl); `pool` is where its head begins.
inline void store_in_panels(const bf16* x, int64_t dim, bool is_key, uint16_t* pool,
                            int64_t block_size, int64_t slot) {
    int64_t offset = slot % block_size;
    uint16_t* block = pool + slot / block_size * block_size * dim;
    if (is_key) {
        uint16_t* words = block + 2 * offset;
        for (int64_t u = 0; u < dim / 2; u++) {
            std::memcpy(words + 2 * u * block_size, x + 2 * u, 4);
        }
        return;
    }
    uint16_t* halves = block + offset / 2 * dim * 2 + offset % 2;
    for (int64_t d = 0; d < dim; d++) halves[2 * d] = x[d].bits;
}

// The same into panels of bytes (byte_panels.inl); the scales stand behind a block's levels.
inline void store_in_byte_panels(const Isa& isa, const void* x, int32_t type, int64_t dim,
                                 bool is_key, uint8_t* pool, int64_t block_size, int64_t slot) {
    uint8_t levels[kMostDim];
    float scale = isa.quantize(x, type, dim, dim, is_key ? kUnsigned : 0, levels);
    int64_t offset = slot % block_size;
    uint8_t* block = pool + slot / block_size * block_size * (dim + kScaleBytes);
    if (is_key) {
        uint8_t* words = block + 4 * offset;
        for (int64_t u = 0; u < dim / 4; u++) {
            std::memcpy(words + 4 * u * block_size, levels + 4 * u, 4);
        }
    } else {
        uint8_t* quarters = block + offset / 4 * dim * 4 + offset % 4;
        for (int64_t d = 0; d < dim; d++) quarters[4 * d] = levels[d];
    }
    std::memcpy(block + block_size * dim + offset * kScaleBytes, &scale, kScaleBytes);
}

// Fills `units`; then the team calls `attend`.
void plan_units(const Attention& call, const Spans& spans, std::vector<AttentionUnit>& units);
void attend(Backend& backend, Team& team, const Attention& call, const Spans& spans,
            const std::vector<AttentionUnit>& units);

}  // namespace phalanx
