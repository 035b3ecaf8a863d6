// Attention over an int8 pool whose blocks are panels (kBytePanels): products of bytes, read where
// they stand and summed exactly. Included once per instruction set.
//
//   a block of keys    [dim / 4][block_size]  words: four elements of one key, 128 added to each
//   a block of values  [block_size / 4][dim]  words: one element of four keys
//
// and behind either [block_size] floats, the scales.
//
// What the levels are multiplied with becomes a whole number of 16 bits and a scale for its row (of
// weights, the row's in this tile), a finer rounding than bfloat16's own. It is kept as two bytes, whose
// products are those of the upper one, times 256, and of the lower. Queries are signed, so their keys
// are not, and 128 times the queries' sum is taken off again; weights are never negative, so that
// values keep their signs.

// Accumulators are needed twice, so rows that go together are half as many as for pairs.
static constexpr int kByteRows = kMaxRows > 1 ? kMaxRows / 2 : 1;
static constexpr int kFewByteRows = kFewRows / 2;
static constexpr float kMostQuery = 127 * 256 + 127, kMostWeight = 65535;

struct ByteSites {  // keys [begin, end) of a sequence, and where each run of them stands
    int64_t begin, end;
    const uint32_t* keys[kRuns];
    const uint32_t* values[kRuns];
    const float* key_scales[kRuns];
    const float* value_scales[kRuns];

    ByteSites() : begin(0), end(0) {}
    ByteSites(const Pages& pages, int64_t begin, int64_t end) : begin(begin), end(end) {
        const Attention& call = pages.call;
        for (int64_t run = 0; run < kRuns; run++) {
            int64_t key = begin + run * kRun;
            if (key >= end) key = begin;  // any that is there
            int64_t block = pages.blocks[key / call.block_size], offset = key % call.block_size;
            int64_t at = pages.head * call.head_stride + block * call.block_size * call.row;
            int64_t levels = call.block_size * call.dim;
            const char *of_keys = (const char*)call.keys + at, *of_values = (const char*)call.values + at;
            keys[run] = (const uint32_t*)of_keys + offset;
            values[run] = (const uint32_t*)of_values + offset / 4 * call.dim;
            key_scales[run] = (const float*)(of_keys + levels) + offset;
            value_scales[run] = (const float*)(of_values + levels) + offset;
        }
    }
    INLINE_MEMBER int64_t count() const { return end - begin; }
};

// A query as whole numbers x / scale, their upper bytes at `out` and their lower ones, of [-128, 127],
// behind them; returns the scale, NaN where a number is not finite. `sums` gets 128 times the sums of
// either.
static float split_query(const float* x, int64_t size, int8_t* out, int32_t* sums) {
    V peaks = zero(), broken = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        V v = load(x + i);
        peaks = maximum(peaks, maximum(v, sub(zero(), v)));
        broken = fma(v, zero(), broken);
    }
    float peak = largest(peaks), flaw = sum(broken);
    bool usable = flaw == 0.0f && peak > 1e-30f;
    V inverse = set1(usable ? kMostQuery / peak : 0.0f), upper = zero(), lower = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        V whole = usable ? nearest(mul(load(x + i), inverse)) : zero();
        // half a step more, so that the lower byte is of its range
        V high = nearest(fma(whole, set1(1.0f / 256), set1(0.5f / 256)));
        V low = fma(high, set1(-256.0f), whole);
        store_levels((uint8_t*)out + i, high, 0);
        store_levels((uint8_t*)out + size + i, low, 0);
        upper = add(upper, high);
        lower = add(lower, low);
    }
    sums[0] = 128 * (int32_t)sum(upper);
    sums[1] = 128 * (int32_t)sum(lower);
    return peak / kMostQuery + flaw;
}

// Nothing here may look at keys that the row does not see: they depend on how a prompt was cut.
INLINE float largest_weight(const float* weights) {
    V top = zero();
    for (int64_t j = 0; j < kKeys; j += kWidth) top = maximum(load(weights + j), top);
    return largest(top);
}

// Weights [64] become whole numbers in two bytes each at the same place; returns their scale.
static float to_halves(float* weights, float top) {
    constexpr int kParts = (int)kKeys / kWidth;
    V inverse = set1(top > 1e-30f ? kMostWeight / top : 0.0f), whole[kParts];
    UNROLL for (int v = 0; v < kParts; v++) {
        whole[v] = minimum(mul(load(weights + v * kWidth), inverse), set1(kMostWeight));
    }
    auto* bytes = (uint8_t*)weights;
    UNROLL for (int v = 0; v < kParts; v++) {
        store_halves(bytes + v * kWidth, bytes + kKeys + v * kWidth, whole[v]);
    }
    return top / kMostWeight;
}

// Sums leave the registers all at once: what is done with them afterwards would take registers
// from the loop that they come from.
template <int R, int N>
INLINE void set_down(const I (&high)[R][N], const I (&low)[R][N], I (&sums)[2][R][N]) {
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) {
            sums[0][r][v] = high[r][v];
            sums[1][r][v] = low[r][v];
        }
    }
}

// scores [R, 64] of N vectors of keys, without the keys' scales.
template <int R, int N>
static void score_bytes(const Attention& call, const AttentionScratch& s, int64_t row,
                        const uint32_t* const* keys, const uint32_t* const* ahead, float* scores) {
    int64_t units = call.dim / 4;
    const uint32_t* query = s.query + row * 2 * units;
    I high[R][N], low[R][N];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) high[r][v] = low[r][v] = zero_int();
    }
    for (int64_t u = 0; u < units; u++) {
        I w[N];
        UNROLL for (int v = 0; v < N; v++) {
            int64_t at = u * call.block_size + v % kInRun * kWidth;
            w[v] = load_int(keys[v / kInRun] + at);
            __builtin_prefetch(ahead[v / kInRun] + at);
        }
        UNROLL for (int r = 0; r < R; r++) {
            uint32_t upper = query[2 * r * units + u], lower = query[(2 * r + 1) * units + u];
            UNROLL for (int v = 0; v < N; v++) {
                high[r][v] = dot_signed(high[r][v], w[v], upper);
                low[r][v] = dot_signed(low[r][v], w[v], lower);
            }
        }
    }
    I sums[2][R][N];
    set_down<R, N>(high, low, sums);
    ROLLED for (int r = 0; r < R; r++) {
        V scale = set1(s.row_scales[row + r]), step = set1(256.0f);
        I upper = set1_int(s.query_sums[2 * (row + r)]);
        I lower = set1_int(s.query_sums[2 * (row + r) + 1]);
        UNROLL for (int v = 0; v < N; v++) {
            V h = to_float(subtract(sums[0][r][v], upper));
            V l = to_float(subtract(sums[1][r][v], lower));
            store(scores + r * kKeys + v * kWidth, mul(fma(h, step, l), scale));
        }
    }
}

// sums += weights x values, for N vectors of dimensions from `first` on; `quads` of keys.
template <int R, int N>
static void mix_bytes(const Attention& call, const AttentionScratch& s, int64_t row,
                      const uint32_t* const* values, const uint32_t* const* ahead, int64_t first,
                      int64_t quads, float* sums, int64_t slice) {
    const auto* weights = (const uint32_t*)(s.scores + row * kKeys);
    I high[R][N], low[R][N];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < N; v++) high[r][v] = low[r][v] = zero_int();
    }
    for (int64_t quad = 0; quad < quads; quad++) {
        int64_t run = quad / (kRun / 4), at = quad % (kRun / 4) * call.dim + first;
        I w[N];
        UNROLL for (int v = 0; v < N; v++) {
            w[v] = load_int(values[run] + at + v * kWidth);
            __builtin_prefetch(ahead[run] + at + v * kWidth);
        }
        UNROLL for (int r = 0; r < R; r++) {
            uint32_t upper = weights[r * kKeys + quad], lower = weights[r * kKeys + kKeys / 4 + quad];
            UNROLL for (int v = 0; v < N; v++) {
                high[r][v] = dot_bytes(high[r][v], w[v], upper);
                low[r][v] = dot_bytes(low[r][v], w[v], lower);
            }
        }
    }
    I exact[2][R][N];
    set_down<R, N>(high, low, exact);
    ROLLED for (int r = 0; r < R; r++) {
        V scale = set1(s.weight_scales[row + r]), step = set1(256.0f);
        UNROLL for (int v = 0; v < N; v++) {
            float* place = sums + v / kVectors * slice + r * kPanel + v % kVectors * kWidth;
            V total = fma(to_float(exact[0][r][v]), step, to_float(exact[1][r][v]));
            store(place, fma(total, scale, load(place)));
        }
    }
}

static void score_byte_sites(const Attention& call, const ByteSites& here, const ByteSites& next,
                             const AttentionScratch& s, int64_t rows) {
    constexpr int kHalf = kRuns / 2;
    for (int64_t row = 0, step; row < rows; row += step) {
        step = next_rows(rows - row, kByteRows);
        const uint32_t* const* ahead = row ? here.keys : next.keys;
        float* out = s.scores + row * kKeys;
        if (step <= kFewByteRows) {
            with_rows<kFewByteRows>(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                score_bytes<kRows, 2 * kVectors>(call, s, row, here.keys, ahead, out);
            });
            continue;
        }
        for (int half = 0; half * kPanel < here.count(); half++) {
            with_rows<kByteRows>(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                score_bytes<kRows, kVectors>(call, s, row, here.keys + half * kHalf,
                                             ahead + half * kHalf, out + half * kPanel);
            });
        }
    }
}

static void mix_byte_sites(const Attention& call, const ByteSites& here, const ByteSites& next,
                           const AttentionScratch& s, int64_t rows) {
    int64_t slice = rows * kPanel, quads = (here.count() + 3) / 4;
    for (int64_t row = 0, step; row < rows; row += step) {
        step = next_rows(rows - row, kByteRows);
        const uint32_t* const* ahead = row ? here.values : next.values;
        for (int64_t first = 0, wide; first < call.dim; first += wide) {
            bool twice = step <= kFewByteRows && first + 2 * kPanel <= call.dim;
            wide = twice ? 2 * kPanel : kPanel;
            float* out = s.part + first / kPanel * slice + row * kPanel;
            if (twice) {
                with_rows<kFewByteRows>(step, [&](auto known) {
                    constexpr int kRows = decltype(known)::count;
                    mix_bytes<kRows, 2 * kVectors>(call, s, row, here.values, ahead, first, quads,
                                                   out, slice);
                });
                continue;
            }
            with_rows<kByteRows>(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                mix_bytes<kRows, kVectors>(call, s, row, here.values, ahead, first, quads, out,
                                           slice);
            });
        }
    }
}

// Scales of a tile's keys or values, 0 behind its end.
static void copy_scales(const float* const* from, int64_t count, float* scales) {
    for (int64_t run = 0; run < kRuns; run++) {
        std::memcpy(scales + run * kRun, from[run], kRun * 4);
    }
    for (int64_t j = count; j < kKeys; j++) scales[j] = 0.0f;
}

static void attend_tile(const Attention& call, const ByteSites& here, const ByteSites& next,
                        const AttentionScratch& s, const Row* places, int64_t rows) {
    const ByteSites& ahead = next.count() ? next : here;
    score_byte_sites(call, here, ahead, s, rows);
    copy_scales(here.key_scales, here.count(), s.key_scales);
    copy_scales(here.value_scales, here.count(), s.value_scales);
    float flaw_of_values = flaw(s.value_scales, kKeys);
    settle_scores(call, s, places, rows, here.begin, s.key_scales);
    float tops[kMostGroup];
    for (int64_t r = 0; r < rows; r++) {
        float* scores = s.scores + r * kKeys;
        s.weight[r] += soften(scores, false, s.value_scales, s.peak[r]);
        tops[r] = largest_weight(scores);
    }
    for (int64_t r = 0; r < rows; r++) {
        float scale = to_halves(s.scores + r * kKeys, tops[r]);
        s.weight_scales[r] = scale + flaw_of_values;
    }
    mix_byte_sites(call, here, ahead, s, rows);
}
