// Attention over a pool whose blocks are panels already (kPanels): nothing is packed, products read
// keys and values where they stand. Included once per instruction set.
//
//   a block of keys    [dim / 2][block_size]  words: two elements of one key
//   a block of values  [block_size / 2][dim]  words: one element of two keys
//
// Every sum runs in the order of attention.inl, so that the bits are those of a plain pool.

static constexpr int64_t kRun = 16;              // keys that surely stand in one block
static constexpr int kRuns = (int)(kKeys / kRun);
static constexpr int kInRun = (int)kRun / kWidth;  // vectors of keys
// Few rows leave registers for twice the panel: half as many broadcasts.
static constexpr int kFewRows = kWidth == 16 ? 6 : 0;

struct Sites {  // keys [begin, end) of a sequence, and where each run of them stands
    int64_t begin, end;
    const uint32_t* keys[kRuns];
    const uint32_t* values[kRuns];

    Sites() : begin(0), end(0) {}
    Sites(const Pages& pages, int64_t begin, int64_t end) : begin(begin), end(end) {
        const Attention& call = pages.call;
        for (int64_t run = 0; run < kRuns; run++) {
            int64_t key = begin + run * kRun;
            if (key >= end) key = begin;  // any that is there
            int64_t block = pages.blocks[key / call.block_size], offset = key % call.block_size;
            int64_t at = pages.head * call.head_stride + block * call.block_size * call.dim;
            keys[run] = (const uint32_t*)call.keys + at / 2 + offset;
            values[run] = (const uint32_t*)call.values + at / 2 + offset / 2 * call.dim;
        }
    }
    INLINE_MEMBER int64_t count() const { return end - begin; }
};

// scores [R, 64] of N vectors of keys; `ahead` is where the next tile's stand.
template <int R, int N>
static void score_rows(const Attention& call, const uint32_t* query, const uint32_t* const* keys,
                       const uint32_t* const* ahead, float* scores) {
    int64_t units = call.dim / 2;
    V s[R][N];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < N; v++) s[r][v] = zero();
    for (int64_t u = 0; u < units; u++) {
        int64_t row = u * call.block_size;
        Pairs w[N];
        UNROLL for (int v = 0; v < N; v++) {
            int64_t at = row + v % kInRun * kWidth;
            w[v] = load_pairs(keys[v / kInRun] + at);
            __builtin_prefetch(ahead[v / kInRun] + at);
        }
        UNROLL for (int r = 0; r < R; r++) {
            auto x = spread(query[r * units + u]);
            UNROLL for (int v = 0; v < N; v++) s[r][v] = dot_pairs(s[r][v], w[v], x);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) store(scores + r * kKeys + v * kWidth, s[r][v]);
    }
}

static void score_sites(const Attention& call, const Sites& here, const Sites& next,
                        const AttentionScratch& s, int64_t rows) {
    constexpr int kHalf = kRuns / 2;
    for (int64_t row = 0, step; row < rows; row += step) {
        step = next_rows(rows - row);
        const uint32_t* query = s.query + row * call.dim / 2;
        const uint32_t* const* ahead = row ? here.keys : next.keys;
        float* out = s.scores + row * kKeys;
        if (step <= kFewRows) {
            with_rows<kFewRows>(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                score_rows<kRows, 2 * kVectors>(call, query, here.keys, ahead, out);
            });
            continue;
        }
        for (int half = 0; half * kPanel < here.count(); half++) {
            with_rows(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                score_rows<kRows, kVectors>(call, query, here.keys + half * kHalf,
                                            ahead + half * kHalf, out + half * kPanel);
            });
        }
    }
}

// sums += weights x values, for N vectors of dimensions from `first` on; `pairs` of keys.
template <int R, int N>
static void mix_rows(const Attention& call, const uint32_t* weights, const uint32_t* const* values,
                     const uint32_t* const* ahead, int64_t first, int64_t pairs, float* sums,
                     int64_t slice) {
    V s[R][N];
    auto place = [&](int r, int v) {
        return sums + v / kVectors * slice + r * kPanel + v % kVectors * kWidth;
    };
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) s[r][v] = load(place(r, v));
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t run = pair / (kRun / 2), at = pair % (kRun / 2) * call.dim + first;
        Pairs w[N];
        UNROLL for (int v = 0; v < N; v++) {
            w[v] = load_pairs(values[run] + at + v * kWidth);
            __builtin_prefetch(ahead[run] + at + v * kWidth);
        }
        UNROLL for (int r = 0; r < R; r++) {
            auto x = spread(weights[r * kKeys + pair]);
            UNROLL for (int v = 0; v < N; v++) s[r][v] = dot_pairs(s[r][v], w[v], x);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) store(place(r, v), s[r][v]);
    }
}

static void mix_pairs(const Attention& call, const uint32_t* weights,
                      const uint32_t* const* values, const uint32_t* const* ahead, int64_t pairs,
                      float* part, int64_t rows) {
    int64_t slice = rows * kPanel;
    for (int64_t row = 0, step; row < rows; row += step) {
        step = next_rows(rows - row);
        const uint32_t* const* then = row ? values : ahead;
        const uint32_t* x = weights + row * kKeys;
        for (int64_t first = 0, wide; first < call.dim; first += wide) {
            bool twice = step <= kFewRows && first + 2 * kPanel <= call.dim;
            wide = twice ? 2 * kPanel : kPanel;
            float* out = part + first / kPanel * slice + row * kPanel;
            if (twice) {
                with_rows<kFewRows>(step, [&](auto known) {
                    constexpr int kRows = decltype(known)::count;
                    mix_rows<kRows, 2 * kVectors>(call, x, values, then, first, pairs, out, slice);
                });
                continue;
            }
            with_rows(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                mix_rows<kRows, kVectors>(call, x, values, then, first, pairs, out, slice);
            });
        }
    }
}

static void mix_sites(const Attention& call, const Sites& here, const Sites& next,
                      const AttentionScratch& s, int64_t rows) {
    int64_t pairs = here.count() / 2;
    const auto* weights = (const uint32_t*)s.scores;
    mix_pairs(call, weights, here.values, next.values, pairs, s.part, rows);
    if (here.count() % 2 == 0) return;
    // what stands beside the last key is of another time
    auto* last = (uint32_t*)s.values;
    int64_t at = pairs % (kRun / 2) * call.dim;
    const uint32_t* from = here.values[pairs / (kRun / 2)] + at;
    for (int64_t d = 0; d < call.dim; d++) last[d] = from[d] & 0xffff;
    const uint32_t* alone[kRuns] = {last, last, last, last};
    mix_pairs(call, weights + pairs, alone, alone, 1, s.part, rows);
}

static void attend_tile(const Attention& call, const Sites& here, const Sites& next,
                        const AttentionScratch& s, const Row* places, int64_t rows) {
    const Sites& ahead = next.count() ? next : here;
    score_sites(call, here, ahead, s, rows);
    settle_scores(call, s, places, rows, here.begin, nullptr);
    for (int64_t r = 0; r < rows; r++) {
        s.weight[r] += soften(s.scores + r * kKeys, true, nullptr, s.peak[r]);
    }
    mix_sites(call, here, ahead, s, rows);
}
