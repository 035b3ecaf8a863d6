// Products with weights of bfloat16 in 12 bits each (compact.h), which are the same numbers: what is
// read from memory, and so the time of a step of one sequence, is a quarter less. Included once per
// instruction set.
//
// A pair of units is expanded into what two rows of a panel would be: four bits choose one of the
// matrix's exponents, a byte has sign and fraction. Few rows multiply it where it stands in
// registers; for many, a chunk of the panel is expanded once, while the one before is multiplied.

static constexpr int kParts = (int)(kMarks / sizeof(Bytes));  // of a unit

struct Exponents {
    Bytes high, low;
    explicit INLINE_MEMBER Exponents(const CompactTable& table)
        : high(load_table(table.high)), low(load_table(table.low)) {}
};

INLINE void expand_unit(const uint8_t* marks, const Bytes* codes, const Exponents& e, Pairs* w) {
    UNROLL for (int part = 0; part < kParts; part++) {
        join(load_bytes(marks + part * sizeof(Bytes)), look_up(e.high, codes[part]),
             look_up(e.low, codes[part]), w[part], w[part + kParts]);
    }
}
INLINE void expand_pair(const uint8_t* place, const Exponents& e, Pairs (*w)[kVectors]) {
    Bytes low[kParts], high[kParts];
    UNROLL for (int part = 0; part < kParts; part++) {
        Bytes both = load_bytes(place + 2 * kMarks + part * sizeof(Bytes));
        low[part] = lower_halves(both);
        high[part] = upper_halves(both);
    }
    expand_unit(place, low, e, w[0]);
    expand_unit(place + kMarks, high, e, w[1]);
}

// Weights whose exponent is not in the table, put in their places; returns the next pair's.
static __attribute__((noinline)) const Escape* mend(const Escape* next, int64_t pair, void* words) {
    for (; next->pair == pair; next++) {
        std::memcpy((char*)words + 2 * next->place, &next->bits, 2);
    }
    return next;
}

INLINE void ask_ahead(const uint8_t* place) {
    UNROLL for (int line = 0; line < kPairBytes; line += 64) {
        __builtin_prefetch(place + kAheadBytes + line);
    }
}

// s += word u of each row of x, times that row of a panel.
template <int R>
INLINE void add_unit(V (&s)[R][kVectors], const Pairs* w, const uint32_t* x, int64_t x_stride,
                     int64_t u) {
    UNROLL for (int r = 0; r < R; r++) {
        auto value = spread(x[r * x_stride + u]);
        UNROLL for (int v = 0; v < kVectors; v++) s[r][v] = dot_pairs(s[r][v], w[v], value);
    }
}
template <int R>
INLINE void put_sums(const V (&s)[R][kVectors], float* sums) {
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) store(sums + r * kPanel + v * kWidth, s[r][v]);
    }
}

// sums [R, 32] = x [R, units] times a panel.
template <int R>
static void compact_tile(const uint32_t* x, int64_t x_stride, const CompactPanel& panel,
                         int64_t units, float* sums) {
    const Exponents exponents(*panel.table);
    const Escape* next = panel.escapes;
    V s[R][kVectors];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) s[r][v] = zero();
    }
    const uint8_t* place = panel.data;
    for (int64_t pair = 0; pair < (units + 1) / 2; pair++, place += kPairBytes) {
        ask_ahead(place);
        Pairs w[2][kVectors];
        expand_pair(place, exponents, w);
        if (__builtin_expect(next->pair == pair, 0)) {
            Pairs mended[2 * kVectors];  // a copy, so that all others stay in registers
            UNROLL for (int v = 0; v < 2 * kVectors; v++) mended[v] = w[v / kVectors][v % kVectors];
            next = mend(next, pair, mended);
            UNROLL for (int v = 0; v < 2 * kVectors; v++) w[v / kVectors][v % kVectors] = mended[v];
        }
        add_unit<R>(s, w[0], x, x_stride, 2 * pair);
        if (2 * pair + 1 < units) add_unit<R>(s, w[1], x, x_stride, 2 * pair + 1);
    }
    put_sums<R>(s, sums);
}

// Units of a panel, from an even one on, on their way to what they are in a plain panel.
struct Expansion {
    CompactPanel panel;
    const Escape* next;  // from the first pair on
    int64_t pair, end;   // pairs that are still to do
    uint32_t* words;     // where the next stands

    Expansion(const CompactPanel& panel, const Escape* next, int64_t begin, int64_t end,
              uint32_t* words)
        : panel(panel), next(next), pair(begin / 2), end((end + 1) / 2), words(words) {}
    INLINE_MEMBER void step() {
        const uint8_t* place = panel.data + pair * kPairBytes;
        ask_ahead(place);
        Pairs w[2][kVectors];
        expand_pair(place, Exponents(*panel.table), w);
        UNROLL for (int v = 0; v < 2 * kVectors; v++) {
            store_pairs(words + v * kWidth, w[v / kVectors][v % kVectors]);
        }
        if (__builtin_expect(next->pair == pair, 0)) next = mend(next, pair, words);
        pair++;
        words += 2 * kPanel;
    }
    INLINE_MEMBER void finish() {
        while (pair < end) step();
    }
};

// As `tile`, while another chunk is expanded: a pair every so many units, in the time that the
// products leave.
template <int R>
static void busy_tile(const uint32_t* x, int64_t x_stride, const uint32_t* words, int64_t units,
                      float* sums, bool onto, Expansion& other, int64_t every) {
    V s[R][kVectors];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) {
            s[r][v] = onto ? load(sums + r * kPanel + v * kWidth) : zero();
        }
    }
    for (int64_t u = 0; u < units;) {
        for (int64_t stop = least(u + every, units); u < stop; u++) {
            Pairs w[kVectors];
            UNROLL for (int v = 0; v < kVectors; v++) {
                w[v] = load_pairs(words + u * kPanel + v * kWidth);
            }
            add_unit<R>(s, w, x, x_stride, u);
        }
        if (other.pair < other.end) other.step();
    }
    put_sums<R>(s, sums);
}

static constexpr int64_t kChunkUnits = 288;  // 36 KB of words
static constexpr int64_t kBlockRows = 192;
// Rows for which a panel is rather expanded again, in registers, by each of their tiles.
static constexpr int64_t kLoneRows = 2 * kMaxRows;

// The chunks of panels [begin, end), one after the other: one is multiplied while the next is
// expanded.
struct Chunks {
    const Matrix& m;
    int64_t end, panel, unit, size;  // of the next

    Chunks(const Matrix& m, int64_t begin, int64_t end) : m(m), end(end), panel(begin), unit(0) {
        int64_t count = (m.units + kChunkUnits - 1) / kChunkUnits;
        size = round_up((m.units + count - 1) / count, 2);
    }
    Expansion next(const Escape* behind, uint32_t* words) {
        CompactPanel own = compact_panel(m, least(panel, end - 1));
        if (panel == end) return {own, behind, 0, 0, words};
        int64_t from = unit, to = least(unit + size, m.units);
        unit = to == m.units ? 0 : to;
        panel += unit == 0;
        return {own, from ? behind : own.escapes, from, to, words};
    }
};

template <class Out>
static void matmul_compact_block(const Matrix& m, const uint32_t* x, int64_t x_stride,
                                 int64_t rows, Out* out, int64_t out_stride, int64_t begin,
                                 int64_t end) {
    alignas(64) float sums[kBlockRows * kPanel];
    alignas(64) uint32_t words[2][kChunkUnits * kPanel];
    int64_t every = 2 * ((rows + kMaxRows - 1) / kMaxRows), turn = 0;
    Chunks chunks(m, begin, end);
    Expansion coming = chunks.next(nullptr, words[turn]);
    coming.finish();
    for (int64_t p = begin; p < end; p++) {
        int64_t first = p * kPanel, count = least(kPanel, m.out - first);
        for (int64_t u = 0; u < m.units; u += chunks.size) {
            const uint32_t* here = words[turn];
            turn = 1 - turn;
            coming = chunks.next(coming.next, words[turn]);
            int64_t units = least(chunks.size, m.units - u);
            bool last = u + units == m.units;
            for (int64_t row = 0, step; row < rows; row += step) {
                step = next_rows(rows - row);
                float* own = sums + (last && u == 0 ? 0 : row * kPanel);
                with_rows(step, [&](auto known) {
                    busy_tile<decltype(known)::count>(x + row * x_stride + u, x_stride, here, units,
                                                      own, u > 0, coming, every);
                });
                for (int64_t r = 0; r < step && last; r++) {
                    Out* place = out + (row + r) * out_stride + first;
                    finish_row(own + r * kPanel, m.bias + first, count, place);
                }
            }
            coming.finish();
        }
    }
}

template <class Out>
static void matmul_compact_typed(const Matrix& m, const uint32_t* x, int64_t x_stride,
                                 int64_t rows, Out* out, int64_t out_stride, int64_t begin,
                                 int64_t end) {
    if (rows > kLoneRows) {
        for (int64_t row = 0; row < rows; row += kBlockRows) {
            matmul_compact_block(m, x + row * x_stride, x_stride, least(rows - row, kBlockRows),
                                 out + row * out_stride, out_stride, begin, end);
        }
        return;
    }
    alignas(64) float sums[kMaxRows * kPanel];
    for (int64_t p = begin; p < end; p++) {
        CompactPanel panel = compact_panel(m, p);
        int64_t first = p * kPanel, count = least(kPanel, m.out - first);
        for (int64_t row = 0, step; row < rows; row += step) {
            step = next_rows(rows - row);
            with_rows(step, [&](auto known) {
                constexpr int kRows = decltype(known)::count;
                compact_tile<kRows>(x + row * x_stride, x_stride, panel, m.units, sums);
            });
            for (int64_t r = 0; r < step; r++) {
                Out* place = out + (row + r) * out_stride + first;
                finish_row(sums + r * kPanel, m.bias + first, count, place);
            }
        }
    }
}

static void matmul_compact(const Matrix& m, const void* x_any, int64_t x_stride, int64_t rows,
                           void* out, int64_t out_stride, int32_t out_type, int64_t begin,
                           int64_t end) {
    const auto* x = (const uint32_t*)x_any;
    if (out_type == kFloat) {
        matmul_compact_typed(m, x, x_stride / 2, rows, (float*)out, out_stride, begin, end);
    } else {
        matmul_compact_typed(m, x, x_stride / 2, rows, (bf16*)out, out_stride, begin, end);
    }
}

// Units [begin, end) of panel p, `begin` even, into words [end - begin, 32].
static void expand_units(const Matrix& m, int64_t p, int64_t begin, int64_t end, uint32_t* words) {
    CompactPanel panel = compact_panel(m, p);
    const Escape* next = panel.escapes;
    while (next->pair < begin / 2) next++;
    int64_t whole = end - (end - begin) % 2;
    Expansion most(panel, next, begin, whole, words);
    most.finish();
    if (whole == end) return;
    alignas(64) uint32_t last[2 * kPanel];
    Expansion(panel, most.next, whole, end, last).finish();
    std::memcpy(words + (whole - begin) * kPanel, last, kPanel * 4);
}
