#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phalanx {

namespace {
constexpr int kSpinsBeforeParking = 4000;  // some 50 microseconds: calls of one step are closer
}

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads) {
    for (int thread = 1; thread < size_; thread++) {
        workers_.emplace_back([this, thread] { serve(thread); });
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        round_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

// The counters that threads meet on (round_ and parked_, open_ and inside_) are sequentially
// consistent: of two threads that each write one and then read the other, one sees the other.
void Pool::call(Function function, void* body) {
    function_ = function;
    body_ = body;
    claimed_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    int64_t round = round_.load(std::memory_order_relaxed) + 1;
    open_.store(round);
    round_.store(round);
    if (parked_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    Team team(*this, 0);
    function(body, team);
    open_.store(-1);  // who has not come by now need not
    spin_until([this] { return inside_.load() == 0; });
}

void Pool::serve(int thread) {
    for (int64_t seen = 0;;) {
        for (int spins = 0; spins < kSpinsBeforeParking && round_.load() == seen; spins++) relax();
        if (round_.load() == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            parked_.fetch_add(1);
            wake_.wait(lock, [&] { return round_.load() != seen; });
            parked_.fetch_sub(1);
        }
        if (stop_) return;
        seen = round_.load();
        inside_.fetch_add(1);
        if (open_.load() == seen) {
            Team team(*this, thread);
            function_(body_, team);
        }
        inside_.fetch_sub(1);
    }
}

int64_t Pool::claim(uint64_t phase, int64_t chunks) {
    uint64_t now = claimed_.load(std::memory_order_acquire);
    while (now >> 32 == phase && (int64_t)(uint32_t)now < chunks) {
        if (claimed_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
            return (uint32_t)now;
        }
    }
    return -1;
}

void Pool::finish_chunk(uint64_t phase, int64_t chunks) {
    if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
    finished_.store(0, std::memory_order_relaxed);
    claimed_.store((phase + 1) << 32, std::memory_order_release);
}

void Pool::wait_beyond(uint64_t phase) {
    spin_until([&] { return claimed_.load(std::memory_order_acquire) >> 32 > phase; });
}

}  // namespace phalanx
