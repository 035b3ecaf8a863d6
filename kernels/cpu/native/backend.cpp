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

void* Arena::take(int64_t bytes, bool zeroed) {
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
    if (zeroed) std::memset(p, 0, bytes);
    return p;
}

void Arena::rewind(const Mark& mark) {
    for (size_t i = mark.chunks; i < chunks_.size(); i++) std::free(chunks_[i]);
    chunks_.resize(mark.chunks);
    next_ = mark.next;
    end_ = mark.end;
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

namespace {
void multiply_panels(const Isa& isa, const Matrix& matrix, const Operand& operand, int64_t rows,
                     void* out, int64_t out_stride, int32_t out_type, int64_t begin, int64_t end) {
    if (matrix.type == kInt8) {
        return isa.matmul_int8(matrix, (const uint8_t*)operand.x, operand.stride, operand.scales,
                               rows, out, out_stride, out_type, begin, end);
    }
    auto* matmul = matrix.type == kFloat     ? isa.matmul_float
                   : matrix.type == kCompact ? isa.matmul_compact
                                             : isa.matmul_bf16;
    matmul(matrix, operand.x, operand.stride, rows, out, out_stride, out_type, begin, end);
}
}  // namespace

void multiply(Backend& backend, Team& team, const Matrix& matrix, const Operand& operand,
              int64_t rows, void* out, int64_t out_stride, int32_t out_type) {
    if (rows == 0) return;
    constexpr int64_t kRows = 192;  // rows that stay in a core's cache while panels pass by
    int64_t in_bytes = operand.stride * type_bytes(matrix.type);
    int64_t out_bytes = out_stride * type_bytes(out_type);
    team.split(matrix.panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = 0; row < rows; row += kRows) {
            const float* scales = operand.scales ? operand.scales + row : nullptr;
            Operand part{(const char*)operand.x + row * in_bytes, scales, operand.stride};
            multiply_panels(*backend.isa, matrix, part, least(kRows, rows - row),
                            (char*)out + row * out_bytes, out_stride, out_type, begin, end);
        }
    });
}

void find_best(Backend& backend, Team& team, const Matrix& matrix, const Operand& operand,
               int64_t rows, Winner* winners) {
    constexpr int64_t kGroup = 4;  // panels whose outputs stay in the cache
    team.split(matrix.panels, 1, [&](int64_t begin, int64_t end) {
        constexpr int64_t kStride = kGroup * kPanel;
        auto* out = (float*)backend.scratch[team.thread].get(rows * kStride * 4);
        Winner* own = winners + team.thread * rows;
        for (int64_t p = begin; p < end; p += kGroup) {
            int64_t stop = least(p + kGroup, end), first = p * kPanel;
            int64_t count = least(stop * kPanel, matrix.out) - first;
            multiply_panels(*backend.isa, matrix, operand, rows, out - first, kStride, kFloat, p,
                            stop);
            for (int64_t row = 0; row < rows; row++) {
                const float* x = out + row * kStride;
                int64_t i = backend.isa->argmax(x, count);
                float flaw = backend.isa->flaw(x, count), value = x[i] + flaw;
                // a thread's chunks come in order, so that the first of equals stays
                if (value > own[row].value || flaw != flaw) own[row] = {value, first + i};
            }
        }
    });
}

Winner merge(const Winner* winners, int64_t threads, int64_t rows, int64_t row) {
    Winner best = winners[row];
    for (int64_t t = 1; t < threads && best.value == best.value; t++) {
        Winner other = winners[t * rows + row];
        bool equal = other.value == best.value && other.id < best.id;
        if (!(other.value <= best.value) || equal) best = other;
    }
    return best;
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

void attend(Backend& backend, Team& team, const Attention& call, const Spans& spans,
            const std::vector<AttentionUnit>& units) {
    team.split(units.size(), 1, [&](int64_t begin, int64_t end) {
        void* scratch = backend.scratch[team.thread].get(backend.isa->attention_scratch(call));
        for (int64_t i = begin; i < end; i++) {
            const AttentionUnit* unit = &units[i];
            backend.isa->attention(call, spans, *unit, i + 1 < end ? unit + 1 : nullptr, scratch);
        }
    }, 16);  // units differ much: a prompt's last tokens see all the others
}

}  // namespace phalanx
