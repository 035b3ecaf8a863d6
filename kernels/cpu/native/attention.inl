// Attention over pages, read in place. Included once per instruction set.
//
// A unit is one kv head of one sequence and up to 48 query rows: some tokens, each with the query
// heads that share the kv head, so that a key is read once for all of them. The keys come in
// tiles of 64 absolute positions:
//
//   1. the tile's keys, wherever their pages are, are transposed into two panels of 32 keys;
//   2. scores = queries x panels, by the same loop as the linear layers ("outputs" are keys);
//   3. scale, softcap, ALiBi, mask; then online softmax (Milakov and Gimelshein 2018): the
//      running maximum moves, what was summed under the old one is scaled down;
//   4. values become panels of 32 dimensions, sums += weights x values, the same loop. Where all
//      is bfloat16, the weights are rounded to it, so that pairs of keys are multiplied at once.
//
// An int8 pool is read as it is: a level is a whole number that bfloat16 holds exactly, so the
// products are those of levels, and scales are multiplied into scores and weights.
//
// Each query row runs through tiles that begin at multiples of 64 and partitions that begin at
// multiples of 512, and within them through keys in order. A masked key adds an exact zero and a
// tile without visible keys changes nothing. So a row's bits depend neither on its batch mates
// nor on how its prompt was cut into chunks.

struct Row {  // a query row's place
    int64_t position, head;
};

// 0, 1, 2, ..., and what hides keys before or behind those that a row sees when it is added.
struct Ramps {
    float count[kKeys], hidden[3 * kKeys];
    constexpr Ramps() : count(), hidden() {
        for (int64_t j = 0; j < kKeys; j++) {
            count[j] = (float)j;
            hidden[j] = hidden[2 * kKeys + j] = -__builtin_inff();
        }
    }
};
static constexpr Ramps kRamps;

INLINE V hide(V x, const float* hidden) {  // whatever x is
    V added = load(hidden);
    return add(keep_above(x, added, zero()), added);
}

// Raw products -> scores [64] of the keys from `begin` on; masked ones are -infinity, whatever stood
// there. With an int8 pool the products are those of levels, and each key has a scale. Returns the
// largest.
static float bias_and_mask(const Attention& call, Row row, int64_t begin, const float* key_scales,
                           float* scores) {
    V scale = set1(call.scale), cap = set1(call.softcap), top = set1(-__builtin_inff());
    int64_t first = call.window ? row.position - call.window + 1 - begin : 0;
    int64_t seen = row.position - begin + 1;
    const float* before = kRamps.hidden + kKeys - most(least(first, kKeys), 0);
    const float* behind = kRamps.hidden + 2 * kKeys - most(least(seen, kKeys), 0);
    for (int64_t j = 0; j < kKeys; j += kWidth) {
        V x = mul(load(scores + j), scale);
        if (key_scales) x = mul(x, load(key_scales + j));
        if (call.softcap > 0.0f) x = mul(cap, hyperbolic_tangent(divide(x, cap)));
        if (call.slopes) {
            V distance = add(set1((float)(begin - row.position)), load(kRamps.count + j));
            x = add(x, mul(set1(call.slopes[row.head]), distance));
        }
        if (first > 0) x = hide(x, before + j);
        if (seen < kKeys) x = hide(x, behind + j);
        store(scores + j, x);
        top = maximum(top, x);
    }
    return largest(top);
}

INLINE void scale_row(float* sums, int64_t rows, int64_t slices, float factor) {
    V f = set1(factor);
    for (int64_t slice = 0; slice < slices; slice++) {
        for (int64_t i = 0; i < kPanel; i += kWidth) {
            float* p = sums + slice * rows * kPanel + i;
            store(p, mul(load(p), f));
        }
    }
}

INLINE float exponential(float x) {
    float lanes[kWidth];
    store(lanes, exponential(set1(x)));
    return lanes[0];
}

// The running maximum moves to `now` if that is larger; what was summed under the old one is scaled
// down.
INLINE void move_peak(float now, float* peak, float* weight, float* sums, int64_t rows,
                      int64_t slices) {
    if (!(now > *peak)) return;
    float factor = exponential(*peak - now);
    *peak = now;
    *weight *= factor;
    scale_row(sums, rows, slices, factor);
}

// Raw products of a tile that begins at `begin` -> scores, and each row's peak; row by row in several
// passes, so that the processor finds other rows to go on with while one waits for its maximum.
static void settle_scores(const Attention& call, const AttentionScratch& s, const Row* places,
                          int64_t rows, int64_t begin, const float* key_scales) {
    int64_t slices = (call.dim + kPanel - 1) / kPanel;
    float tops[kMostGroup];
    for (int64_t r = 0; r < rows; r++) {
        tops[r] = bias_and_mask(call, places[r], begin, key_scales, s.scores + r * kKeys);
    }
    for (int64_t r = 0; r < rows; r++) {
        move_peak(tops[r], s.peak + r, s.weight + r, s.part + r * kPanel, rows, slices);
    }
}

// Scores [64] become weights, as bfloat16 at the same place if `pairs`; returns their sum.
// `value_scales` (null = none) are multiplied into what the values are weighted by, not into the
// sum of weights.
static float soften(float* scores, bool pairs, const float* value_scales, float peak) {
    V total = zero(), shift = set1(peak);
    for (int64_t j = 0; j < kKeys; j += kWidth) {
        V p = exponential(sub(load(scores + j), shift));
        if (value_scales) {
            V scaled = mul(p, load(value_scales + j));
            if (pairs) store((bf16*)scores + j, scaled); else store(scores + j, scaled);
        } else if (pairs) {
            bf16* place = (bf16*)scores + j;
            store(place, p);
            p = load(place);  // what was rounded is what is counted
        } else {
            store(scores + j, p);
        }
        total = add(total, p);
    }
    return sum(total);
}

// The partition's state joins the total and is cleared.
static void close_partition(const AttentionScratch& s, int64_t rows, int64_t slices) {
    for (int64_t r = 0; r < rows; r++) {
        float *part = s.part + r * kPanel, *total = s.total + r * kPanel;
        float top = s.peak[r] > s.peak[rows + r] ? s.peak[r] : s.peak[rows + r];
        float new_scale = exponential(s.peak[r] - top);
        float old_scale = exponential(s.peak[rows + r] - top);
        for (int64_t slice = 0; slice < slices; slice++) {
            for (int64_t i = 0; i < kPanel; i += kWidth) {
                int64_t at = slice * rows * kPanel + i;
                V old = mul(load(total + at), set1(old_scale));
                store(total + at, add(old, mul(load(part + at), set1(new_scale))));
                store(part + at, zero());
            }
        }
        s.weight[rows + r] = s.weight[rows + r] * old_scale + s.weight[r] * new_scale;
        s.peak[rows + r] = top;
        s.peak[r] = -1e30f;
        s.weight[r] = 0.0f;
    }
}

template <class Words>
static void multiply_rows(int64_t rows, const void* x_any, int64_t x_stride, const void* panel_any,
                          int64_t units, float* out, int64_t out_stride, bool onto) {
    using Word = typename Words::Word;
    alignas(64) float sums[kMaxRows * kPanel];
    const Word *x = (const Word*)x_any, *panel = (const Word*)panel_any;
    for (int64_t row = 0, step; row < rows; row += step) {
        step = next_rows(rows - row);
        if (onto) {  // out_stride is the panel's width: the sums are updated where they stand
            const Word* from = x + row * x_stride;
            tile_of<Words>(step, from, x_stride, panel, units, out + row * kPanel, true,
                           Errand{(const char*)panel, 0});
            continue;
        }
        tile_of<Words>(step, x + row * x_stride, x_stride, panel, units, sums, false,
                       Errand{(const char*)panel, 0});
        for (int64_t r = 0; r < step; r++) {
            std::memcpy(out + (row + r) * out_stride, sums + r * kPanel, kPanel * 4);
        }
    }
}

// Sums += weights x values.
static void mix_values(const Attention& call, const Tile& tile, const Tile& next,
                       const AttentionScratch& s, int64_t rows) {
    int64_t slices = (call.dim + kPanel - 1) / kPanel, count = tile.count();
    bool pairs = in_pairs(call);
    if (pairs) {
        auto* pack = call.pool_type == kInt8 ? pack_value_pairs<int8_t> : pack_value_pairs<bf16>;
        pack(call, tile, next, (uint32_t*)s.values);
    } else {
        pack_values(call, tile, next, s.values);
    }
    for (int64_t slice = 0; slice < slices; slice++) {
        float* out = s.part + slice * rows * kPanel;
        if (pairs) {
            const float* panel = s.values + slice * kKeys / 2 * kPanel;
            int64_t units = (count + 1) / 2;
            multiply_rows<PairWords>(rows, s.scores, kKeys, panel, units, out, kPanel, true);
        } else {
            const float* panel = s.values + slice * kKeys * kPanel;
            multiply_rows<FloatWords>(rows, s.scores, kKeys, panel, count, out, kPanel, true);
        }
    }
}

static void attend_tile(const Attention& call, const Tile& tile, const Tile& next,
                        const AttentionScratch& s, const Row* places, int64_t rows) {
    int64_t units = key_units(call);
    bool scaled = call.pool_type == kInt8;
    if (scaled) read_scales(call, call.keys, tile, s.key_scales);
    if (scaled) read_scales(call, call.values, tile, s.value_scales);
    pack_keys(call, tile, next, s);
    for (int64_t half = 0; half * kPanel < tile.count(); half++) {
        const uint32_t* panel = s.keys + half * units * kPanel;
        float* out = s.scores + half * kPanel;
        if (in_pairs(call)) {
            multiply_rows<PairWords>(rows, s.query, units, panel, units, out, kKeys, false);
        } else {
            multiply_rows<FloatWords>(rows, s.query, units, panel, units, out, kKeys, false);
        }
    }
    settle_scores(call, s, places, rows, tile.begin, scaled ? s.key_scales : nullptr);
    for (int64_t r = 0; r < rows; r++) {
        s.weight[r] += soften(s.scores + r * kKeys, in_pairs(call),
                              scaled ? s.value_scales : nullptr, s.peak[r]);
    }
    mix_values(call, tile, next, s, rows);
}
