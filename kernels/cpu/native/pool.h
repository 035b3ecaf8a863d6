// A team of threads that walks through the phases of one function together.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"

namespace phalanx {

// Tells the processor that this is a waiting loop.
void relax();

// Waits for `ready()`: spins for some microseconds, since that is how long a kernel takes, then
// gives the core away between looks, since on a busy machine the others may need it to finish.
template <class Ready>
void spin_until(Ready ready) {
    for (int64_t spins = 0; !ready(); spins++) {
        if (spins < 2000) relax(); else std::this_thread::yield();
    }
}

class Pool;

// One thread's place in a running function. Every thread makes the same calls of `split`, each
// of which is a phase. The work of a phase is cut into chunks that threads claim one by one, and
// a phase ends when all its chunks are done, whoever did them: a thread that the system has put
// aside holds up the others by one chunk at most, and skips the phases it missed.
class Team {
  public:
    Team(Pool& pool, int thread, bool alone = false)
        : thread(thread), pool_(pool), alone_(alone) {}
    const int thread;

    // This thread by itself, which meets nobody.
    Team alone() const { return Team(pool_, thread, true); }

    // body(begin, end) over [0, count), in chunks of at least `grain`, some for each thread.
    template <class Body>
    void split(int64_t count, int64_t grain, Body body, int64_t per_thread = 4);

  private:
    Pool& pool_;
    const bool alone_;
    uint64_t phase_ = 0;
};

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_; }

    // body(team) on the caller's thread and on those that come in time; returns when the caller
    // and all who came have returned. One caller at a time. Small work is not worth waking others.
    template <class Body>
    void run(Body body, bool is_small = false) {
        if (size_ == 1 || is_small) {
            alone_ = true;
            Team team(*this, 0);
            body(team);
            alone_ = false;
            return;
        }
        call(&invoke<Body>, &body);
    }

  private:
    friend class Team;
    using Function = void (*)(void* body, Team& team);
    template <class Body>
    static void invoke(void* body, Team& team) { (*(Body*)body)(team); }

    void call(Function function, void* body);
    void serve(int thread);
    // The next chunk of the phase, -1 when none is left; a phase that is over has none.
    int64_t claim(uint64_t phase, int64_t chunks);
    void finish_chunk(uint64_t phase, int64_t chunks);
    void wait_beyond(uint64_t phase);

    const int size_;
    bool alone_ = false;
    std::vector<std::thread> workers_;
    // each on its own cache line: they are written by one thread and watched by others
    alignas(64) std::atomic<int64_t> round_{0};     // counts calls; a change wakes the workers
    alignas(64) std::atomic<int64_t> open_{-1};     // the round that may be entered
    alignas(64) std::atomic<int> inside_{0};        // workers that have entered
    alignas(64) std::atomic<uint64_t> claimed_{0};  // phase << 32 | chunks claimed
    alignas(64) std::atomic<int64_t> finished_{0};  // chunks of the phase that are done
    alignas(64) Function function_ = nullptr;
    void* body_ = nullptr;
    std::atomic<bool> stop_{false};
    std::atomic<int> parked_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

template <class Body>
void Team::split(int64_t count, int64_t grain, Body body, int64_t per_thread) {
    if (count <= 0) return;
    if (alone_ || pool_.alone_) return body(int64_t(0), count);
    int64_t chunks = least((count + grain - 1) / grain, pool_.size() * per_thread);
    int64_t size = count / chunks, longer = count % chunks;  // the longer ones first
    for (int64_t i; (i = pool_.claim(phase_, chunks)) >= 0;) {
        int64_t begin = i * size + least(i, longer);
        body(begin, begin + size + (i < longer));
        pool_.finish_chunk(phase_, chunks);
    }
    pool_.wait_beyond(phase_++);
}

}  // namespace phalanx
