#include "backend.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace phalanx {

namespace {
constexpr int64_t kLine = 64;
constexpr int64_t kHuge = 2 << 20;
constexpr int64_t kChunk = 32 << 20;

void* allocate(int64_t bytes) {
    int64_t alignment = bytes >= kHuge ? kHuge : kLine;
    int64_t size = round_up(most(bytes, 1), alignment);
    void* p = std::aligned_alloc(alignment, size);
    if (!p) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == kHuge) madvise(p, size, MADV_HUGEPAGE);
#endif
    return p;
}
}  // namespace

Arena::~Arena() {
    for (void* chunk : chunks_) std::free(chunk);
}

void* Arena::take(int64_t bytes) {
    bytes = round_up(most(bytes, 1), kLine);
    if (end_ - next_ < bytes) {
        // small models get small chunks, large ones few
        int64_t size = most(bytes, chunks_.size() < 8 ? 256 << 10 : kChunk);
        next_ = (char*)allocate(size);
        chunks_.push_back(next_);
        end_ = next_ + size;
    }
    void* p = next_;
    next_ += bytes;
    std::memset(p, 0, bytes);
    return p;
}

Buffer::~Buffer() { std::free(data_); }

void* Buffer::get(int64_t bytes) {
    if (bytes > size_ || !data_) {
        std::free(data_);
        data_ = nullptr;
        data_ = allocate(bytes + bytes / 4);
        size_ = bytes + bytes / 4;
    }
    return data_;
}

void multiply(Backend& backend, Team& team, const Matrix& matrix, const void* x, int64_t x_stride,
              int64_t rows, void* out, int64_t out_stride, int32_t out_type) {
    if (rows == 0) return;
    team.split(matrix.panels, 1, [&](int64_t begin, int64_t end) {
        auto* matmul = matrix.type == kFloat ? backend.isa->matmul_float : backend.isa->matmul_bf16;
        matmul(matrix, x, x_stride, rows, out, out_stride, out_type, begin, end);
    });
}

void plan_units(const Attention& call, const Spans& spans, std::vector<AttentionUnit>& units) {
    units.clear();
    if (call.kv_heads == 0) return;
    int64_t tokens = most(1, kQueryRows / (call.heads / call.kv_heads));
    for (int64_t span = 0; span < spans.count; span++) {
        for (int64_t head = 0; head < call.kv_heads; head++) {
            for (int64_t begin = 0; begin < spans.num_query[span]; begin += tokens) {
                int64_t end = least(begin + tokens, spans.num_query[span]);
                units.push_back({span, head, begin, end});
            }
        }
    }
}

void attend(Backend& backend, Team& team, const Attention& call, const Spans& spans) {
    team.split(backend.units.size(), 1, [&](int64_t begin, int64_t end) {
        void* scratch = backend.scratch[team.thread].get(backend.isa->attention_scratch(call));
        for (int64_t i = begin; i < end; i++) {
            const AttentionUnit* unit = &backend.units[i];
            backend.isa->attention(call, spans, *unit, i + 1 < end ? unit + 1 : nullptr, scratch);
        }
    }, 16);  // units differ much: a prompt's last tokens see all the others
}

}  // namespace phalanx
