// From pages to panels: where keys and values stand, and the layouts that products read. Included
// once per instruction set.

struct AttentionScratch {
    uint32_t* query;   // [rows, units] words
    uint32_t* keys;    // [2, units, 32] words
    float* values;     // [slices, 64, 32]
    float* scores;     // [rows, 64]
    float* part;       // [slices, rows, 32] sums of the current partition
    float* total;      // [slices, rows, 32] sums of all before it
    float* peak;       // [rows] maximum of the current partition, then of all before it [rows]
    float* weight;     // [rows] sum of weights, the same two
    uint32_t* row;     // [64, units] keys, padded or widened
    float* key_scales;    // [64], of an int8 pool
    float* value_scales;  // [64]
    // of a pool of byte panels, whose queries and weights are bytes too:
    float* row_scales;     // [rows] of the queries
    int32_t* query_sums;   // [rows, 2] of the queries' bytes, 128 times
    float* weight_scales;  // [rows] of the tile's weights
};

// Words of a query or key: pairs where both are bfloat16, or as exact in it as bytes are; else
// floats. Two bytes for each number, where they are multiplied as such, are as many words as pairs.
INLINE bool in_pairs(const Attention& call) {
    return call.type == kBf16 && call.pool_type != kFloat;
}
INLINE int64_t key_units(const Attention& call) {
    return in_pairs(call) ? (call.dim + 1) / 2 : call.dim;
}

static int64_t attention_layout(const Attention& call, AttentionScratch* s, char* base) {
    int64_t units = key_units(call), padded = round_up(call.dim, kPanel), used = 0;
    int64_t rows = most(kQueryRows, call.heads / most(call.kv_heads, 1));
    auto take = [&](int64_t words) {
        char* p = base + used;
        used += round_up(words * 4, 64);
        return p;
    };
    AttentionScratch r;
    r.query = (uint32_t*)take(rows * units);
    r.keys = (uint32_t*)take(kKeys * units);
    r.values = (float*)take(kKeys * padded);
    r.scores = (float*)take(rows * kKeys);
    r.part = (float*)take(rows * padded);
    r.total = (float*)take(rows * padded);
    r.peak = (float*)take(2 * rows);
    r.weight = (float*)take(2 * rows);
    r.row = (uint32_t*)take(kKeys * units);
    r.key_scales = (float*)take(kKeys);
    r.value_scales = (float*)take(kKeys);
    r.row_scales = (float*)take(rows);
    r.query_sums = (int32_t*)take(2 * rows);
    r.weight_scales = (float*)take(rows);
    if (s) *s = r;
    return used;
}
static int64_t attention_scratch(const Attention& call) {
    return attention_layout(call, nullptr, nullptr);
}

INLINE void copy_words(const uint32_t* from, int64_t count, uint32_t* to) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store((float*)to + i, load((const float*)from + i));
    for (; i < count; i++) to[i] = from[i];
}

// One key or query as words; `spare` is used where they do not stand so in memory.
static const uint32_t* as_words(const void* p, int32_t type, bool pairs, int64_t dim,
                                uint32_t* spare) {
    if (type == kInt8) {
        if (pairs && dim % 2) spare[dim / 2] = 0;
        if (pairs) widen_levels((const int8_t*)p, dim, (bf16*)spare);
        else widen_levels((const int8_t*)p, dim, (float*)spare);
        return spare;
    }
    if (pairs && dim % 2 == 0) return (const uint32_t*)p;
    if (pairs) {
        spare[dim / 2] = 0;
        std::memcpy(spare, p, dim * 2);
        return spare;
    }
    if (type == kFloat) return (const uint32_t*)p;
    convert(p, kBf16, dim, spare, kFloat);
    return spare;
}

struct Pages {  // where the tokens of a sequence stand in one head's pool
    const Attention& call;
    const int32_t* blocks;
    int64_t head;
};

struct Tile {  // keys [begin, end), and the first element of each in the pool
    int64_t begin, end;
    int64_t at[kKeys];

    Tile() : begin(0), end(0) {}
    Tile(const Pages& pages, int64_t begin, int64_t end) : begin(begin), end(end) {
        const Attention& call = pages.call;
        int64_t block = begin / call.block_size, offset = begin % call.block_size;
        for (int64_t j = 0; j < end - begin; block++, offset = 0) {
            int64_t first = pages.blocks[block] * call.block_size;
            int64_t base = pages.head * call.head_stride + (first + offset) * call.row;
            int64_t stop = least(end - begin, j + call.block_size - offset);
            for (; j < stop; j++, base += call.row) at[j] = base;
        }
    }
    INLINE_MEMBER int64_t count() const { return end - begin; }
};

// The keys that a unit's queries see, from a tile's begin on.
struct Reach {
    int64_t begin, end;

    Reach(const Attention& call, const Spans& spans, const AttentionUnit& unit) {
        int64_t offset = spans.length[unit.span] - spans.num_query[unit.span];
        int64_t hidden = call.window ? most(offset + unit.begin - call.window + 1, 0) : 0;
        begin = hidden / kKeys * kKeys;
        end = offset + unit.end;
    }
};

// The first keys of a unit, as a Tile or as sites.
template <class Place>
static Place first_place(const Attention& call, const Spans& spans, const AttentionUnit& unit) {
    Reach reach(call, spans, unit);
    Pages pages{call, spans.blocks + spans.first[unit.span], unit.head};
    return Place(pages, reach.begin, least(reach.begin + kKeys, reach.end));
}

INLINE const char* element(const void* base, int32_t type, int64_t index) {
    return (const char*)base + index * type_bytes(type);
}

// The scales of a tile's keys or values, 0 behind its end.
static void read_scales(const Attention& call, const void* base, const Tile& tile, float* scales) {
    for (int64_t j = 0; j < kKeys; j++) {
        scales[j] = 0.0f;
        if (j < tile.count()) std::memcpy(scales + j, (const char*)base + tile.at[j] + call.dim, 4);
    }
}

// Pages lie all over memory, where no prefetcher finds them: while a row is packed, the row at
// its place in the next tile is asked for.
INLINE void ask_for(const Attention& call, const void* base, const Tile& next, int64_t j) {
    if (j >= next.count()) return;
    const char* row = element(base, call.pool_type, next.at[j]);
    int64_t bytes = call.row * type_bytes(call.pool_type);
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line);
}

// Keys [begin, end) of a tile -> panels [2][units][32]; keys from `end` on are left as they are,
// since their scores are masked.
static void pack_keys(const Attention& call, const Tile& tile, const Tile& next,
                      const AttentionScratch& s) {
    int64_t units = key_units(call), count = tile.count();
    bool pairs = in_pairs(call), is_bf16 = call.pool_type == kBf16;
    bool in_place = pairs ? is_bf16 && call.dim % 2 == 0 : call.pool_type == kFloat;
    const uint32_t* rows[kKeys];
    for (int64_t j = 0; j < round_up(count, kWidth); j++) {
        const char* key = element(call.keys, call.pool_type, tile.at[least(j, count - 1)]);
        rows[j] = in_place ? (const uint32_t*)key
                           : as_words(key, call.pool_type, pairs, call.dim, s.row + j * units);
    }
    for (int64_t j = 0; j < round_up(count, kWidth); j += kWidth) {
        for (int64_t i = j; i < j + kWidth; i++) ask_for(call, call.keys, next, i);
        uint32_t* panel = s.keys + (j / kPanel) * units * kPanel + j % kPanel;
        int64_t u = 0;
        for (; u + kWidth <= units; u += kWidth) transpose(rows + j, u, panel + u * kPanel, kPanel);
        for (; u < units; u++) {
            for (int lane = 0; lane < kWidth; lane++) panel[u * kPanel + lane] = rows[j + lane][u];
        }
    }
}

INLINE uint32_t bf16_bits(bf16 x) { return x.bits; }
INLINE uint32_t bf16_bits(int8_t x) { return narrow((float)x).bits; }

// Values [begin, end) of a tile -> panels of pairs of keys, [slices][64 / 2][32].
template <class T>
static void pack_value_pairs(const Attention& call, const Tile& tile, const Tile& next,
                             uint32_t* out) {
    const T* base = (const T*)call.values;
    const T none[kPanel] = {};
    for (int64_t j = 0; j < tile.count(); j += 2) {
        ask_for(call, call.values, next, j);
        ask_for(call, call.values, next, j + 1);
        const T* first = base + tile.at[j];
        bool paired = j + 1 < tile.count();
        const T* second = paired ? base + tile.at[j + 1] : nullptr;
        for (int64_t d = 0; d < call.dim; d += kPanel) {
            uint32_t* place = out + (d / kPanel * kKeys + j) / 2 * kPanel;
            if (d + kPanel <= call.dim) {
                for (int64_t i = 0; i < kPanel; i += kWidth) {
                    zip(first + d + i, paired ? second + d + i : none, place + i);
                }
                continue;
            }
            for (int64_t i = 0; i < kPanel; i++) {
                bool inside = d + i < call.dim;
                uint32_t low = inside ? bf16_bits(first[d + i]) : 0;
                uint32_t high = inside && paired ? bf16_bits(second[d + i]) : 0;
                place[i] = low | high << 16;
            }
        }
    }
}

// Values [begin, end) of a tile -> float panels [slices][64][32].
static void pack_values(const Attention& call, const Tile& tile, const Tile& next, float* out) {
    for (int64_t j = 0; j < tile.count(); j++) {
        ask_for(call, call.values, next, j);
        const char* row = element(call.values, call.pool_type, tile.at[j]);
        for (int64_t d = 0; d < call.dim; d += kPanel) {
            int64_t count = least(kPanel, call.dim - d);
            float* place = out + (d / kPanel * kKeys + j) * kPanel;
            const char* from = element(row, call.pool_type, d);
            if (call.pool_type == kInt8) widen_levels((const int8_t*)from, count, place);
            else convert(from, call.pool_type, count, place, kFloat);
            for (int64_t i = count; i < kPanel; i++) place[i] = 0.0f;
        }
    }
}
