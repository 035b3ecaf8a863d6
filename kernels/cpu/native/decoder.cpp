#include "decoder.h"

#include <algorithm>

#include "program.h"
#include "reduce.h"

namespace phalanx {

namespace {

constexpr int64_t kGroup = 128;  // rows that one thread takes through a layer together
constexpr int64_t kFewest = 96;  // a thread, for which it is worth reading all weights

// What a layer does row by row: all but attention itself.
enum Stretch { kBegin, kProject, kPlace, kOutput, kFeed };

// Behind the keys and values of the last layer only wanted rows are needed. They stand together
// then, from the first on and in order.
struct Wanted {
    std::vector<int64_t> rows;
    std::vector<int32_t> start, num_query, length, first;
    std::vector<AttentionUnit> units;
    Spans spans;

    Wanted(const Step& step, const Attention& shape) : rows(step.rows, step.rows + step.num_rows) {
        std::sort(rows.begin(), rows.end());
        const Spans& all = *step.spans;
        for (int64_t span = 0; span < all.count; span++) {
            int64_t begin = all.start[span];
            int64_t offset = all.length[span] - all.num_query[span] - begin;
            int64_t i = place(begin), end = place(begin + all.num_query[span]);
            for (int64_t from = i; i < end; from = i) {
                while (i < end && rows[i] - rows[from] == i - from) i++;
                start.push_back(from);
                num_query.push_back(i - from);
                length.push_back(offset + rows[i - 1] + 1);
                first.push_back(all.first[span]);
            }
        }
        spans = {(int64_t)start.size(), start.data(), num_query.data(), length.data(), first.data(),
                 all.blocks};
        plan_units(shape, spans, units);
    }
    Wanted(const Wanted&) = delete;
    int64_t count() const { return rows.size(); }
    int64_t place(int64_t row) const {  // where it stands, or the first behind it
        return std::lower_bound(rows.begin(), rows.end(), row) - rows.begin();
    }
};

// One thread's walk through a step. All threads of the team make the same calls.
class Walk {
  public:
    Walk(const Program& program, Reduction& reduction, const Wanted* wanted)
        : program_(program), stack_(program.stack), reduction_(reduction), wanted_(wanted) {}

    // Parts [first, last), as `run_stack` counts them.
    void run(int64_t first, int64_t last) {
        int64_t all = parts_of(stack_) * stack_.count;
        if (is_narrow(first)) program_.step.tokens = wanted_->count();
        if (first == 0) rowwise({kBegin, 0});
        for (int64_t index = first; index < least(last, all); index++) {
            part(index);
            if (reduction_.is_needed()) sum(index);
            if (reduction_.lost()) return;
        }
        flush();
        if (last > all) finish();
    }

  private:
    struct Work {
        Stretch stretch;
        int64_t layer;
    };

    // Whether none but wanted rows are left when a part begins.
    bool is_narrow(int64_t index) const {
        return wanted_ && index > parts_of(stack_) * (stack_.count - 1) + stack_.over_width;
    }

    void part(int64_t index) {
        int64_t parts = parts_of(stack_), layer = index / parts, place = index % parts;
        if (place == 0) rowwise({kProject, layer});
        if (place == stack_.over_width) {
            rowwise({kPlace, layer});
            flush();
            attention(layer, is_narrow(index + 1));
            rowwise({kOutput, layer});
        }
        if (place > stack_.over_width) rowwise({kFeed, layer});
    }

    void attention(int64_t layer, bool narrows) {
        if (narrows) {
            program_.gather(wanted_->rows);
            program_.step.tokens = wanted_->count();
        }
        if (!stack_.heads) return;
        const Spans& spans = narrows ? wanted_->spans : *program_.step.spans;
        const auto& units = narrows ? wanted_->units : program_.backend.units;
        attend(program_.backend, program_.team, program_.attention(stack_.layers[layer]), spans,
               units);
    }

    // Of many rows each thread takes some through all that comes before the next meeting; few are
    // not worth reading the weights for, so that the team shares out every operation.
    void rowwise(Work work) {
        bool few = program_.step.tokens < kFewest * program_.backend.pool.size();
        if (few) return run(program_, work);
        if (count_ == kMostWork) flush();
        work_[count_++] = work;
    }
    void flush() {
        int64_t tokens = program_.step.tokens, threads = program_.backend.pool.size();
        if (!count_) return;
        int64_t groups = round_up((tokens + kGroup - 1) / kGroup, threads);
        program_.team.split(groups, 1, [&](int64_t begin, int64_t end) {
            Team alone = program_.team.alone();
            for (int64_t group = begin; group < end; group++) {
                int64_t first = tokens * group / groups, stop = tokens * (group + 1) / groups;
                Program part = program_.rows(first, stop - first, alone);
                for (int i = 0; i < count_; i++) run(part, work_[i]);
            }
        }, groups);
        count_ = 0;
    }

    void run(const Program& program, Work work) const {
        const Layer& layer = stack_.layers[work.layer];
        const Norm* behind = work.layer ? &stack_.layers[work.layer - 1].behind_mlp : nullptr;
        switch (work.stretch) {
            case kBegin: return program.begin();
            case kProject:
                program.enter(behind, layer.input);
                return program.project(layer);
            case kPlace:
                if (stack_.heads) program.place_heads(layer);
                return;
            case kOutput:
                if (stack_.parallel) feed_beside(program, layer);
                program.put_out(layer);
                if (stack_.parallel) program.add_other();
                return;
            case kFeed:
                program.enter(&layer.behind_attention, layer.post);
                return program.feed_forward(layer, program.step.delta);
        }
    }

    // The second block of a parallel layer. What the projections multiplied is still there, unless
    // rows have moved or another call begins with the sums behind them.
    void feed_beside(const Program& program, const Layer& layer) const {
        const Norm& norm = layer.post.weight ? layer.post : layer.input;
        bool moved = wanted_ && &layer == stack_.layers + stack_.count - 1;
        if (layer.post.weight || stack_.over_width || moved) program.enter(nullptr, norm);
        program.feed_forward(layer, program.at.other);
    }

    // What ranks sum behind a part.
    void sum(int64_t index) {
        flush();
        const Step& step = program_.step;
        bool projected = stack_.over_width && index % parts_of(stack_) == 0;
        int64_t width = projected ? 2 : stack_.hidden;
        reduction_.sum(*program_.backend.isa, projected ? step.squares : step.delta,
                       step.tokens * width, program_.team);
    }

    void finish() const {
        const Norm& behind = stack_.layers[stack_.count - 1].behind_mlp;
        const Step& step = program_.step;
        int32_t type = stack_.final_norm.weight ? stack_.type : (int32_t)kFloat;
        program_.team.split(step.num_rows, kGrain, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                char* out = (char*)step.hidden + i * stack_.hidden * type_bytes(type);
                int64_t row = wanted_ ? wanted_->place(step.rows[i]) : step.rows[i];
                const float* x = program_.settled(row, behind);
                program_.normalize(stack_.final_norm, x, stack_.hidden, out, type);
            }
        });
    }

    static constexpr int kMostWork = 8;
    Program program_;
    const Stack& stack_;
    Reduction& reduction_;
    const Wanted* wanted_;
    Work work_[kMostWork];
    int count_ = 0;
};

}  // namespace

int64_t stack_bytes(const Stack& stack, int64_t tokens) {
    return lay_out(stack, tokens, nullptr, nullptr);
}

int64_t run_stack(Backend& backend, const Stack& stack, const Step& step, const Segment* segment,
                  int64_t first, int64_t last) {
    Activations at;
    lay_out(stack, step.tokens, step.memory, &at);
    Attention shape{};
    shape.heads = stack.heads;
    shape.kv_heads = stack.kv_heads;
    plan_units(shape, *step.spans, backend.units);
    std::unique_ptr<Wanted> wanted;
    if (step.num_rows < step.tokens) wanted = std::make_unique<Wanted>(step, shape);
    Reduction reduction(segment);
    backend.pool.run([&](Team& team) {
        Walk(Program{backend, stack, step, at, team}, reduction, wanted.get()).run(first, last);
    });
    return reduction.lost();
}

}  // namespace phalanx
