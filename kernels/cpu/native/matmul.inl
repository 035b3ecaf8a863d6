// Products with packed weights. Included once per instruction set.
//
// The unit of work is a tile: R rows of x times one panel of 32 outputs. Its sums stay in
// registers while the loop walks along the inputs; each step loads 32 words of weights (two
// cache lines, which the next tiles of the panel find in L1) and multiplies them with one word
// of each row of x, broadcast to all lanes:
//
//     for unit u of the inputs:      weights   w[u][0..31]            loaded once
//         for row r:                 sums      s[r][0..31] += x[r][u] * w[u][0..31]
//
// A lane is an output and its sum runs over the inputs in order, whatever R is: a row's result
// does not depend, to the last bit, on how many rows stand beside it or which thread computes
// them. At R = 1 the loop is bound by the weights' way from memory: one stream, read in order,
// with a prefetch far enough ahead to hide the latency. With several tiles of rows a panel is read
// several times, from memory only once: each tile asks for its share of the panel to come.

static constexpr int kVectors = (int)kPanel / kWidth;
static constexpr int64_t kAhead = kAheadBytes / 4;  // words

struct FloatWords {  // one float a word
    using Word = float;
    using Weight = V;
    using Sum = V;
    INLINE_METHOD Sum none() { return zero(); }
    INLINE_METHOD Sum resume(const float* p) { return load(p); }
    INLINE_METHOD Weight weight(const Word* p) { return load(p); }
    INLINE_METHOD V broadcast(Word x) { return set1(x); }
    INLINE_METHOD Sum add(Sum s, Weight w, V x) { return fma(w, x, s); }
};
struct PairWords {  // two bfloat16 a word, multiplied exactly, added in float32
    using Word = uint32_t;
    using Weight = Pairs;
    using Sum = V;
    INLINE_METHOD Sum none() { return zero(); }
    INLINE_METHOD Sum resume(const float* p) { return load(p); }
    INLINE_METHOD Weight weight(const Word* p) { return load_pairs(p); }
    INLINE_METHOD Spread broadcast(Word x) { return spread(x); }
    INLINE_METHOD Sum add(Sum s, Weight w, Spread x) { return dot_pairs(s, w, x); }
};
struct ByteWords {  // four int8 a word, added in int32
    using Word = uint32_t;
    using Weight = I;
    using Sum = I;
    INLINE_METHOD Sum none() { return zero_int(); }
    INLINE_METHOD Sum resume(const float*) { return zero_int(); }  // never asked for
    INLINE_METHOD Weight weight(const Word* p) { return load_int(p); }
    INLINE_METHOD Word broadcast(Word x) { return x; }
    INLINE_METHOD Sum add(Sum s, Weight w, Word x) { return dot_bytes(s, w, x); }
};

INLINE void keep(float* p, V sum) { store(p, sum); }
INLINE void keep(float* p, I sum) { std::memcpy(p, &sum, sizeof sum); }  // the integers' bits

// What a tile asks memory for beside the lines just ahead of it in its panel, one place a unit: from
// `place` on, `step` bytes apart.
struct Errand {
    const char* place;
    int64_t step;
};

// sums [R, 32] = x [R, units] times a panel; added to what is there when `onto`.
template <class Words, int R>
static void tile(const typename Words::Word* x, int64_t x_stride,
                 const typename Words::Word* panel, int64_t units, float* sums, bool onto,
                 Errand errand) {
    typename Words::Sum s[R][kVectors];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) {
            s[r][v] = onto ? Words::resume(sums + r * kPanel + v * kWidth) : Words::none();
        }
    }
    for (int64_t u = 0; u < units; u++) {
        const auto* row = panel + u * kPanel;
        __builtin_prefetch(row + kAhead);
        __builtin_prefetch(row + kAhead + 16);
        __builtin_prefetch(errand.place + u * errand.step, 0, 2);
        typename Words::Weight w[kVectors];
        UNROLL for (int v = 0; v < kVectors; v++) w[v] = Words::weight(row + v * kWidth);
        UNROLL for (int r = 0; r < R; r++) {
            auto value = Words::broadcast(x[r * x_stride + u]);
            UNROLL for (int v = 0; v < kVectors; v++) s[r][v] = Words::add(s[r][v], w[v], value);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < kVectors; v++) keep(sums + r * kPanel + v * kWidth, s[r][v]);
    }
}

// Calls body(a value whose type says `rows`, as its `count`), for 1 to R rows: what is kept in
// registers must be a number that the compiler knows.
template <int R>
struct Known {
    static constexpr int count = R;
};
template <int R = kMaxRows, class Body>
INLINE void with_rows(int64_t rows, Body body) {
    if constexpr (R > 0) {
        if (rows == R) return body(Known<R>());
        with_rows<R - 1>(rows, body);
    }
}

// Up to kMaxRows rows.
template <class Words>
static void tile_of(int64_t rows, const typename Words::Word* x, int64_t x_stride,
                    const typename Words::Word* panel, int64_t units, float* sums, bool onto,
                    Errand errand) {
    with_rows(rows, [&](auto known) {
        tile<Words, decltype(known)::count>(x, x_stride, panel, units, sums, onto, errand);
    });
}

// Rows of the next tile: the remaining rows in as few tiles as possible, of like size.
INLINE int64_t next_rows(int64_t remaining, int64_t most_rows = kMaxRows) {
    int64_t tiles = (remaining + most_rows - 1) / most_rows;
    return (remaining + tiles - 1) / tiles;
}

// While the rows of a panel are worked through, each of their tiles fetches its share of the panel
// behind it. A lone tile reads on and on: nothing but what is just ahead.
struct Fetching {
    const char* panel;
    int64_t units, tiles, index = 0;

    Fetching(const void* panel, int64_t units, int64_t rows)
        : panel((const char*)panel), units(units), tiles((rows + kMaxRows - 1) / kMaxRows) {}
    Errand next() {
        if (tiles == 1) return {panel, 0};
        int64_t step = (kPanel * 4 + tiles - 1) / tiles, done = index++ * units * step;
        return {panel + units * kPanel * 4 + done, step};
    }
};

static void pack_panel(const char* rows, int64_t row_bytes, int64_t count, int64_t bytes,
                       int64_t units, uint32_t* panel) {
    for (int64_t first = 0; first < kPanel; first += kWidth) {
        int64_t present = most(least(count - first, kWidth), 0), u = 0;
        const char* own[kWidth];
        for (int64_t i = 0; i < present; i++) own[i] = rows + (first + i) * row_bytes;
        if (present == kWidth) {
            for (; (u + kWidth) * 4 <= bytes; u += kWidth) {
                transpose((const uint32_t* const*)own, u, panel + u * kPanel + first, kPanel);
            }
        }
        for (; u < units; u++) {
            uint32_t* words = panel + u * kPanel + first;
            std::memset(words, 0, kWidth * 4);
            int64_t rest = least(bytes - u * 4, 4);
            for (int64_t i = 0; i < present; i++) std::memcpy(words + i, own[i] + u * 4, rest);
        }
    }
}

template <class Out>
static void finish_row(const float* sums, const float* bias, int64_t count, Out* out) {
    if (count == kPanel) {
        UNROLL for (int v = 0; v < kVectors; v++) {
            store(out + v * kWidth, add(load(sums + v * kWidth), load(bias + v * kWidth)));
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) put(out + i, sums[i] + bias[i]);
}

template <class Words, class Out>
static void matmul_typed(const Matrix& m, const void* x_any, int64_t x_stride, int64_t rows,
                         Out* out, int64_t out_stride, int64_t begin, int64_t end) {
    using Word = typename Words::Word;
    alignas(64) float sums[kMaxRows * kPanel];
    const Word* x = (const Word*)x_any;
    for (int64_t p = begin; p < end; p++) {
        const Word* panel = (const Word*)m.data + p * m.units * kPanel;
        int64_t first = p * kPanel, count = least(kPanel, m.out - first);
        Fetching fetching(panel, m.units, rows);
        for (int64_t row = 0, step; row < rows; row += step) {
            step = next_rows(rows - row);
            tile_of<Words>(step, x + row * x_stride, x_stride, panel, m.units, sums, false,
                           fetching.next());
            for (int64_t r = 0; r < step; r++) {
                Out* place = out + (row + r) * out_stride + first;
                finish_row(sums + r * kPanel, m.bias + first, count, place);
            }
        }
    }
}

static void matmul_float(const Matrix& m, const void* x, int64_t x_stride, int64_t rows, void* out,
                         int64_t out_stride, int32_t out_type, int64_t begin, int64_t end) {
    if (out_type == kFloat) {
        matmul_typed<FloatWords>(m, x, x_stride, rows, (float*)out, out_stride, begin, end);
    } else {
        matmul_typed<FloatWords>(m, x, x_stride, rows, (bf16*)out, out_stride, begin, end);
    }
}

static void matmul_bf16(const Matrix& m, const void* x, int64_t x_stride, int64_t rows, void* out,
                        int64_t out_stride, int32_t out_type, int64_t begin, int64_t end) {
    if (out_type == kFloat) {
        matmul_typed<PairWords>(m, x, x_stride / 2, rows, (float*)out, out_stride, begin, end);
    } else {
        matmul_typed<PairWords>(m, x, x_stride / 2, rows, (bf16*)out, out_stride, begin, end);
    }
}

// W8A8. x holds unsigned bytes q + 128; the 128s' share, 128 * sum of the weights, is known
// from packing and taken off again. All sums are exact integers below 2^31 for in < 2^16.
template <class Out>
static void matmul_int8_typed(const Matrix& m, const uint8_t* x, int64_t x_stride,
                              const float* x_scales, int64_t rows, Out* out, int64_t out_stride,
                              int64_t begin, int64_t end) {
    alignas(64) float sums[kMaxRows * kPanel];
    for (int64_t p = begin; p < end; p++) {
        const uint32_t* panel = m.data + p * m.units * kPanel;
        int64_t first = p * kPanel, count = least(kPanel, m.out - first);
        Fetching fetching(panel, m.units, rows);
        for (int64_t row = 0, step; row < rows; row += step) {
            step = next_rows(rows - row);
            const uint32_t* words = (const uint32_t*)(x + row * x_stride);
            tile_of<ByteWords>(step, words, x_stride / 4, panel, m.units, sums, false,
                               fetching.next());
            for (int64_t r = 0; r < step; r++) {
                float* s = sums + r * kPanel;
                V x_scale = set1(x_scales[row + r]);
                UNROLL for (int v = 0; v < kVectors; v++) {
                    const uint32_t* zeros = (const uint32_t*)m.sums + first + v * kWidth;
                    I sum = load_int((const uint32_t*)s + v * kWidth);
                    V exact = to_float(subtract(sum, load_int(zeros)));
                    V scale = mul(x_scale, load(m.scales + first + v * kWidth));
                    store(s + v * kWidth, mul(exact, scale));
                }
                finish_row(s, m.bias + first, count, out + (row + r) * out_stride + first);
            }
        }
    }
}

static void matmul_int8(const Matrix& m, const uint8_t* x, int64_t x_stride, const float* x_scales,
                        int64_t rows, void* out, int64_t out_stride, int32_t out_type,
                        int64_t begin, int64_t end) {
    if (out_type == kFloat) {
        matmul_int8_typed(m, x, x_stride, x_scales, rows, (float*)out, out_stride, begin, end);
    } else {
        matmul_int8_typed(m, x, x_stride, x_scales, rows, (bf16*)out, out_stride, begin, end);
    }
}
