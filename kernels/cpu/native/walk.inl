// From a unit's queries to its outputs: the walk along the tiles of its keys, over any layout of a
// pool. Included once per instruction set.

// What a row's sums are multiplied by: 1 / all weights, the sink's among them.
static float output_factor(const Attention& call, int64_t head, float peak, float weight) {
    if (!call.sinks) return 1.0f / weight;
    float sink = call.sinks[head], top = sink > peak ? sink : peak;
    float scale = exponential(peak - top);
    return scale / (weight * scale + exponential(sink - top));
}

static void write_output(const Attention& call, const AttentionScratch& s, const Row* places,
                         int64_t rows, int64_t first_token, int64_t group) {
    for (int64_t r = 0; r < rows; r++) {
        float factor = output_factor(call, places[r].head, s.peak[rows + r], s.weight[rows + r]);
        int64_t at = (first_token + r / group) * call.output_stride + places[r].head * call.dim;
        for (int64_t d = 0; d < call.dim; d += kPanel) {
            float* sums = s.total + (d / kPanel * rows + r) * kPanel;
            for (int64_t i = 0; i < kPanel; i += kWidth) {
                store(sums + i, mul(load(sums + i), set1(factor)));
            }
            char* out = (char*)element(call.output, call.type, at + d);
            convert(sums, kFloat, least(kPanel, call.dim - d), out, call.type);
        }
    }
}

// Fills the queries, places and empty sums of a unit; returns its rows.
static int64_t begin_unit(const Attention& call, const Spans& spans, const AttentionUnit& unit,
                          const AttentionScratch& s, Row* places) {
    int64_t group = call.heads / call.kv_heads, rows = (unit.end - unit.begin) * group;
    int64_t units = key_units(call), padded = round_up(call.dim, kPanel);
    int64_t offset = spans.length[unit.span] - spans.num_query[unit.span];
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = unit.begin + r / group, head = unit.head * group + r % group;
        places[r] = {offset + token, head};
        int64_t at = (spans.start[unit.span] + token) * call.query_stride + head * call.dim;
        uint32_t* place = s.query + r * units;
        const char* query = element(call.query, call.type, at);
        s.peak[r] = s.peak[rows + r] = -1e30f;
        s.weight[r] = s.weight[rows + r] = 0.0f;
        if (call.pool_type == kBytePanels) {
            float wide[kMostDim];
            convert(query, call.type, call.dim, wide, kFloat);
            s.row_scales[r] = split_query(wide, call.dim, (int8_t*)place, s.query_sums + 2 * r);
            continue;
        }
        const uint32_t* words = as_words(query, call.type, in_pairs(call), call.dim, place);
        if (words != place) copy_words(words, units, place);
    }
    std::memset(s.part, 0, rows * padded * 4);
    std::memset(s.total, 0, rows * padded * 4);
    return rows;
}

// Tile by tile. `after` is the unit that this thread does next, or null.
template <class Place>
static void walk(const Attention& call, const Spans& spans, const AttentionUnit& unit,
                 const AttentionUnit* after, void* scratch) {
    AttentionScratch s;
    attention_layout(call, &s, (char*)scratch);
    Row places[kMostGroup];
    int64_t rows = begin_unit(call, spans, unit, s, places);
    int64_t slices = (call.dim + kPanel - 1) / kPanel;
    Pages pages{call, spans.blocks + spans.first[unit.span], unit.head};
    Reach reach(call, spans, unit);
    Place place = first_place<Place>(call, spans, unit);
    for (int64_t begin = reach.begin; begin < reach.end; begin += kKeys) {
        int64_t stop = begin + kKeys;
        Place next;
        if (stop < reach.end) {
            next = Place(pages, stop, least(stop + kKeys, reach.end));
        } else if (after) {
            next = first_place<Place>(call, spans, *after);
        }
        attend_tile(call, place, next, s, places, rows);
        if (stop % kPartition == 0 || stop >= reach.end) close_partition(s, rows, slices);
        place = next;
    }
    write_output(call, s, places, rows, spans.start[unit.span] + unit.begin,
                 call.heads / call.kv_heads);
}

static void attention(const Attention& call, const Spans& spans, const AttentionUnit& unit,
                      const AttentionUnit* after, void* scratch) {
    if (call.pool_type == kPanels) return walk<Sites>(call, spans, unit, after, scratch);
    if (call.pool_type == kBytePanels) return walk<ByteSites>(call, spans, unit, after, scratch);
    walk<Tile>(call, spans, unit, after, scratch);
}
