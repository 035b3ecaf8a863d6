// Products with weights of bfloat16 in 12 bits each (compact.h), which are the same numbers: what is
// read from memory, and so the time of a step of one sequence, is a quarter less. Included once per
// instruction set.
//
// A pair of units is expanded into what two rows of a panel would be: four bits choose one of the
// matrix's exponents, a byte has sign and fraction. Few rows multiply it where it stands in
// registers; for many, a chunk of the panel is expanded once into memory that stays in L1.

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
    auto add_unit = [&](const Pairs* w, int64_t u) {
        UNROLL for (int r = 0; r < R; r++) {
            auto value = spread(x[r * x_stride + u]);
            UNROLL for (int v = 0; v < kVectors; v++) s[r][v] = dot_pairs(s[r][v], w[v], value);
        }
    };
    const uint8_t* place = panel.data;
    for (int64_t pair = 0; pair < (units + 1) / 2; pair++, place += kPairBytes) {
        UNROLL for (int line = 0; line < kPairBytes; line += 64) {
            __builtin_prefetch(place + kAheadBytes + line);
        }
        Pairs w[2][kVectors];
        expand_pair(place, exponents, w);
        if (__builtin_expect(next->pair == pair, 0)) {
            Pairs mended[2 * kVectors];  // a copy, so that all others stay in registers
            UNROLL for (int v = 0; v < 2 * kVectors; v++) mended[v] = w[v / kVectors][v % kVectors];
            next = mend(next, pair, mended);
            UNROLL for (int v = 0; v < 2 * kVectors; v++) w[v / kVectors][v % kVectors] = mended[v];
        }
        add_unit(w[0], 2 * pair);
        if (2 * pair + 1 < units) add_unit(w[1], 2 * pair + 1);
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) store(sums + r * kPanel + v * kWidth, s[r][v]);
    }
}

// Units [begin, end) of a panel, `begin` even, as the rows of words that they are in plain panels.
static const Escape* expand(const CompactPanel& panel, int64_t begin, int64_t end,
                            const Escape* next, uint32_t* words) {
    const Exponents exponents(*panel.table);
    for (int64_t pair = begin / 2; pair < (end + 1) / 2; pair++, words += 2 * kPanel) {
        Pairs w[2][kVectors];
        expand_pair(panel.data + pair * kPairBytes, exponents, w);
        UNROLL for (int v = 0; v < 2 * kVectors; v++) {
            store_pairs(words + v * kWidth, w[v / kVectors][v % kVectors]);
        }
        next = mend(next, pair, words);
    }
    return next;
}

static constexpr int64_t kChunkUnits = 128;  // 16 KB of words
static constexpr int64_t kBlockRows = 192;
// Rows whose sums leave registers for the expansion.
static constexpr int kLoneRows = kMaxRows > 8 ? 8 : kMaxRows;

// sums [rows <= kBlockRows, 32]
static void compact_block(const CompactPanel& panel, const uint32_t* x, int64_t x_stride,
                          int64_t rows, int64_t units, float* sums) {
    alignas(64) uint32_t words[kChunkUnits * kPanel];
    const Escape* next = panel.escapes;
    for (int64_t begin = 0; begin < units; begin += kChunkUnits) {
        int64_t end = least(begin + kChunkUnits, units);
        next = expand(panel, begin, end, next, words);
        for (int64_t row = 0, step; row < rows; row += step) {
            step = next_rows(rows - row);
            Errand none{(const char*)words, 0};
            tile_of<PairWords>(step, x + row * x_stride + begin, x_stride, words, end - begin,
                               sums + row * kPanel, begin > 0, none);
        }
    }
}

template <class Out>
static void matmul_compact_typed(const Matrix& m, const uint32_t* x, int64_t x_stride,
                                 int64_t rows, Out* out, int64_t out_stride, int64_t begin,
                                 int64_t end) {
    alignas(64) float sums[kBlockRows * kPanel];
    for (int64_t p = begin; p < end; p++) {
        CompactPanel panel = compact_panel(m, p);
        int64_t first = p * kPanel, count = least(kPanel, m.out - first);
        for (int64_t row = 0, step; row < rows; row += step) {
            step = least(rows - row, kBlockRows);
            const uint32_t* own = x + row * x_stride;
            if (step <= kLoneRows) {
                with_rows<kLoneRows>(step, [&](auto known) {
                    constexpr int kRows = decltype(known)::count;
                    compact_tile<kRows>(own, x_stride, panel, m.units, sums);
                });
            } else {
                compact_block(panel, own, x_stride, step, m.units, sums);
            }
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
    while (panel.escapes->pair < begin / 2) panel.escapes++;
    alignas(64) uint32_t last[2 * kPanel];
    int64_t even = end - (end - begin) % 2;
    const Escape* next = expand(panel, begin, even, panel.escapes, words);
    if (even == end) return;
    expand(panel, even, end, next, last);
    std::memcpy(words + (even - begin) * kPanel, last, kPanel * 4);
}
