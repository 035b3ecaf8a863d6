#include "reduce.h"

#include <chrono>

namespace phalanx {

namespace {
constexpr int64_t kLine = 64;
constexpr int64_t kGrain = 4096;  // numbers

double now() {
    auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(time).count();
}
}  // namespace

std::atomic<int64_t>& Reduction::counter(int64_t rank) const {
    static_assert(sizeof(std::atomic<int64_t>) == 8, "a counter is eight bytes");
    return *reinterpret_cast<std::atomic<int64_t>*>(segment_->base + rank * kLine);
}

void Reduction::publish_and_wait(int64_t call) {
    counter(segment_->rank).store(call, std::memory_order_release);
    for (int64_t other = 0; other < segment_->size; other++) {
        double deadline = 0.0;
        for (int64_t spins = 1; counter(other).load(std::memory_order_acquire) < call; spins++) {
            if (spins < 2000) {
                relax();
                continue;
            }
            std::this_thread::yield();
            if (spins % 1024) continue;  // the clock only tells a dead peer from a slow one
            if (deadline == 0.0) deadline = now() + segment_->patience;
            if (now() > deadline) {
                lost_.store(1 + other, std::memory_order_relaxed);
                return;
            }
        }
    }
}

void Reduction::sum(const Isa& isa, float* data, int64_t size, Team& team) {
    if (!is_needed()) return;
    const Segment& s = *segment_;
    int64_t most = s.slot_bytes / 4;
    for (int64_t start = 0; start < size; start += most) {
        int64_t count = least(most, size - start);
        float* piece = data + start;
        // a thread that is late reads a later call here, but then it finds no chunk to do
        int64_t call = call_.load(std::memory_order_relaxed) + 1;
        char* slots = s.base + s.size * kLine + (call & 1) * s.size * s.slot_bytes;
        team.split(count, kGrain, [&](int64_t first, int64_t last) {
            std::memcpy((float*)(slots + s.rank * s.slot_bytes) + first, piece + first,
                        (last - first) * 4);
        });
        team.split(1, 1, [&](int64_t, int64_t) { publish_and_wait(call); });
        team.split(count, kGrain, [&](int64_t first, int64_t last) {
            const float* views[kMostRanks];
            for (int64_t rank = 0; rank < s.size; rank++) {
                views[rank] = (const float*)(slots + rank * s.slot_bytes) + first;
            }
            if (!lost()) isa.add_parts(views, s.size, last - first, piece + first);
        });
        team.split(1, 1, [&](int64_t, int64_t) { call_.store(call, std::memory_order_relaxed); });
    }
}

}  // namespace phalanx
