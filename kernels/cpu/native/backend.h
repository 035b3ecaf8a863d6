// One backend: its threads, its instruction set, its memory.
#pragma once
#include "pool.h"

namespace phalanx {

// Memory that is given back all at once. Large pieces are on huge pages where the system has
// them: walking through weights with 4 KB pages costs a tenth of the bandwidth.
class Arena {
  public:
    ~Arena();
    void* take(int64_t bytes);  // aligned to a cache line, zeroed

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
    Backend(const Isa* isa, int threads) : isa(isa), pool(threads), scratch(pool.size()) {}
    const Isa* isa;
    Pool pool;
    Arena arena;
    std::vector<Buffer> scratch;  // one a thread
    Buffer rows, ints;
    std::mutex busy;  // ranks that are threads of one process may share a backend
    std::vector<AttentionUnit> units;
};

// A matrix product by the running team. `x` rows are words of the matrix's type, x_stride in
// elements.
void multiply(Backend& backend, Team& team, const Matrix& matrix, const void* x, int64_t x_stride,
              int64_t rows, void* out, int64_t out_stride, int32_t out_type);

// Fills `units`; then the team calls `attend`.
void plan_units(const Attention& call, const Spans& spans, std::vector<AttentionUnit>& units);
void attend(Backend& backend, Team& team, const Attention& call, const Spans& spans);

inline int64_t type_bytes(int32_t type) { return type == kFloat ? 4 : 2; }

}  // namespace phalanx
