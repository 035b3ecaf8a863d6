// The sum over the ranks of one node, through shared memory.
#pragma once
#include "backend.h"
#include "decoder.h"

namespace phalanx {

// Every rank copies its numbers into its slot, raises its counter and waits for the others'; then
// all add the slots in rank order, so that the sum is bit-equal everywhere. The slots are used in
// turn: when a rank writes a slot again, every other has come one call further, and so has read
// it. The counter of the last call is the rank's own counter in the segment.
class Reduction {
  public:
    explicit Reduction(const Segment* segment) : segment_(segment) {
        if (segment) call_ = counter(segment->rank).load(std::memory_order_relaxed);
    }

    bool is_needed() const { return segment_ && segment_->size > 1; }

    // Every thread of the team calls; data [size] is summed in place.
    void sum(const Isa& isa, float* data, int64_t size, Team& team);

    // 1 + the rank that did not come, 0 when all did.
    int64_t lost() const { return lost_.load(std::memory_order_relaxed); }

  private:
    std::atomic<int64_t>& counter(int64_t rank) const;
    void publish_and_wait(int64_t call);

    const Segment* segment_;
    std::atomic<int64_t> call_{0}, lost_{0};
};

}  // namespace phalanx
