// Products by AMX tiles, on the same packed weights. Included with `Tiles`, which is either the
// processor's tile registers or their imitation in plain C++.
//
// A block is up to 32 rows of x times one panel of 32 outputs: 2 x 2 tiles of 16 x 16 sums. A
// step takes 16 words of the inputs: two tiles of x (16 rows x 16 words), two of the panel (16
// words x 16 outputs; a panel's rows are two tiles wide) and four products. Each row of a tile is
// computed by itself, so here as well a row's bits do not depend on the rows beside it.

constexpr int64_t kTile = 16;

// The last words of the inputs, where they are fewer than a tile: padded with zeros.
struct Remainder {
    alignas(64) uint32_t x[2 * kTile * kTile];
    alignas(64) uint32_t panel[kTile * kPanel];

    Remainder(const uint32_t* from_x, int64_t x_stride, int64_t rows, const uint32_t* from_panel,
              int64_t units) {
        std::memset(x, 0, sizeof x);
        std::memset(panel, 0, sizeof panel);
        for (int64_t r = 0; r < rows; r++) {
            std::memcpy(x + r * kTile, from_x + r * x_stride, units * 4);
        }
        std::memcpy(panel, from_panel, units * kPanel * 4);
    }
};

// sums [rows <= 32, 32] of 32-bit words: floats, or integers for bytes; added to what is there when
// `onto`.
template <class Tiles>
static void tile_block(Tiles& tiles, const uint32_t* x, int64_t x_stride, int64_t rows,
                       const uint32_t* panel, int64_t units, uint32_t* sums, bool onto = false) {
    onto ? tiles.resume(sums) : tiles.clear();
    int64_t u = 0;
    for (; u + kTile <= units; u += kTile) tiles.step(x + u, x_stride, panel + u * kPanel);
    if (u < units) {
        Remainder rest(x + u, x_stride, rows, panel + u * kPanel, units - u);
        tiles.step(rest.x, kTile, rest.panel);
    }
    tiles.store(sums);
}

// Calls finish(row, sums [32], first output) for every row and panel.
template <class Tiles, class Finish>
static void tile_product(const Matrix& m, const void* x_any, int64_t x_stride, int64_t rows,
                         int64_t begin, int64_t end, Finish finish) {
    alignas(64) uint32_t sums[2 * kTile * kPanel];
    const uint32_t* x = (const uint32_t*)x_any;
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
        int64_t count = least(2 * kTile, rows - row);
        Tiles tiles(count);
        for (int64_t p = begin; p < end; p++) {
            const uint32_t* panel = m.data + p * m.units * kPanel;
            tile_block(tiles, x + row * x_stride, x_stride, count, panel, m.units, sums);
            for (int64_t r = 0; r < count; r++) finish(row + r, sums + r * kPanel, p * kPanel);
        }
    }
}

template <class Out, class Value>
static void put_row(const Matrix& m, int64_t first, Value value, Out* out) {
    int64_t count = least(kPanel, m.out - first);
    for (int64_t i = 0; i < count; i++) put(out + first + i, value(i) + m.bias[first + i]);
}

// A `finish` for sums that are floats.
static auto into_rows(const Matrix& m, void* out, int64_t out_stride, int32_t out_type) {
    return [&m, out, out_stride, out_type](int64_t row, const uint32_t* sums, int64_t first) {
        auto value = [&](int64_t i) { return from_bits(sums[i]); };
        if (out_type == kFloat) {
            put_row(m, first, value, (float*)out + row * out_stride);
        } else {
            put_row(m, first, value, (bf16*)out + row * out_stride);
        }
    };
}

// As `tile_product` with a compact matrix, a chunk of a panel being expanded at a time.
template <class Tiles, class Finish>
static void compact_product(const Isa& vectors, const Matrix& m, const uint32_t* x,
                            int64_t x_stride, int64_t rows, int64_t begin, int64_t end,
                            Finish finish) {
    constexpr int64_t kChunk = 256, kRows = 192;
    alignas(64) uint32_t sums[kRows * kPanel], words[kChunk * kPanel];
    for (int64_t p = begin; p < end; p++) {
        for (int64_t row = 0; row < rows; row += kRows) {
            int64_t count = least(kRows, rows - row);
            for (int64_t u = 0; u < m.units; u += kChunk) {
                int64_t units = least(kChunk, m.units - u);
                vectors.expand_units(m, p, u, u + units, words);
                for (int64_t r = 0; r < count; r += 2 * kTile) {
                    int64_t block = least(2 * kTile, count - r);
                    Tiles tiles(block);
                    tile_block(tiles, x + (row + r) * x_stride + u, x_stride, block, words, units,
                               sums + r * kPanel, u > 0);
                }
            }
            for (int64_t r = 0; r < count; r++) finish(row + r, sums + r * kPanel, p * kPanel);
        }
    }
}

template <class Floats, const Isa* (*vectors)()>
static void matmul_compact_tiles(const Matrix& m, const void* x_any, int64_t x_stride, int64_t rows,
                                 void* out, int64_t out_stride, int32_t out_type, int64_t begin,
                                 int64_t end) {
    auto finish = into_rows(m, out, out_stride, out_type);
    const auto* x = (const uint32_t*)x_any;
    compact_product<Floats>(*vectors(), m, x, x_stride / 2, rows, begin, end, finish);
}

template <class Floats>
static void matmul_tiles(const Matrix& m, const void* x, int64_t x_stride, int64_t rows, void* out,
                         int64_t out_stride, int32_t out_type, int64_t begin, int64_t end) {
    auto finish = into_rows(m, out, out_stride, out_type);
    tile_product<Floats>(m, x, x_stride / 2, rows, begin, end, finish);
}

template <class Bytes>
static void matmul_int8_tiles(const Matrix& m, const uint8_t* x, int64_t x_stride,
                              const float* x_scales, int64_t rows, void* out, int64_t out_stride,
                              int32_t out_type, int64_t begin, int64_t end) {
    auto finish = [&](int64_t row, const uint32_t* sums, int64_t first) {
        auto value = [&](int64_t i) {
            int32_t exact = (int32_t)sums[i] - m.sums[first + i];
            return (float)exact * (x_scales[row] * m.scales[first + i]);
        };
        if (out_type == kFloat) {
            put_row(m, first, value, (float*)out + row * out_stride);
        } else {
            put_row(m, first, value, (bf16*)out + row * out_stride);
        }
    };
    tile_product<Bytes>(m, x, x_stride / 4, rows, begin, end, finish);
}
