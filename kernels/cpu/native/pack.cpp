#include "pack.h"

#include <algorithm>
#include <numeric>

#include "compact.h"

namespace phalanx {

Matrix* new_matrix(Backend& b, int64_t out, int64_t in, int32_t type) {
    int64_t per_word = 4 / type_bytes(type);
    auto* m = (Matrix*)b.arena.take(sizeof(Matrix));
    *m = Matrix();
    m->out = out;
    m->in = in;
    m->units = (in + per_word - 1) / per_word;
    m->panels = (out + kPanel - 1) / kPanel;
    m->type = type;
    m->data = (uint32_t*)b.arena.take(packed_bytes(*m), false);
    m->bias = (float*)b.arena.take(m->panels * kPanel * 4);
    if (type == kInt8) {
        m->scales = (float*)b.arena.take(m->panels * kPanel * 4);
        m->sums = (int32_t*)b.arena.take(m->panels * kPanel * 4);
    }
    return m;
}

namespace {
// Rows of panel p as levels [32, units * 4], with their scales and the sums that undo kUnsigned.
void quantize_panel(const Isa& isa, Matrix* m, const char* weight, int32_t type, int64_t p,
                    int8_t* levels) {
    int64_t padded = m->units * 4;
    for (int64_t i = 0; i < least(kPanel, m->out - p * kPanel); i++) {
        int64_t row = p * kPanel + i;
        int8_t* place = levels + i * padded;
        m->scales[row] = isa.quantize(weight + row * m->in * type_bytes(type), type, m->in, padded,
                                      0, (uint8_t*)place);
        int32_t sum = 0;
        for (int64_t k = 0; k < padded; k++) sum += place[k];
        m->sums[row] = kUnsigned * sum;
    }
}

void pack_plain(Backend& b, Team& team, Matrix* m, const char* weight, int32_t type) {
    team.split(m->panels, 4, [&](int64_t begin, int64_t end) {
        int64_t bytes = m->type == kInt8 ? m->units * 4 : m->in * type_bytes(type);
        auto* levels = (int8_t*)b.scratch[team.thread].get(kPanel * bytes);
        for (int64_t p = begin; p < end; p++) {
            const char* rows = weight + p * kPanel * bytes;
            if (m->type == kInt8) {
                quantize_panel(*b.isa, m, weight, type, p, levels);
                rows = (const char*)levels;
            }
            b.isa->pack_panel(rows, bytes, least(kPanel, m->out - p * kPanel), bytes, m->units,
                              m->data + p * m->units * kPanel);
        }
    });
}

int64_t exponent(uint16_t bits) { return bits >> 7 & 255; }
uint8_t mark(uint16_t bits) { return (uint8_t)((bits >> 8 & 128) | (bits & 127)); }

// How often each exponent comes.
void count_exponents(const uint16_t* numbers, int64_t size, int64_t* counts) {
    int64_t other[256] = {};  // two tables, as equal neighbours would wait for each other
    for (int64_t i = 0; i + 1 < size; i += 2) {
        counts[exponent(numbers[i])]++;
        other[exponent(numbers[i + 1])]++;
    }
    if (size % 2) counts[exponent(numbers[size - 1])]++;
    for (int64_t e = 0; e < 256; e++) counts[e] += other[e];
}

// The sixteen commonest exponents.
struct CompactCode {
    static constexpr uint8_t kNone = 16;
    CompactTable table = {};
    uint8_t codes[256];
    int64_t escapes = 0;  // of those counted

    explicit CompactCode(const int64_t* counts) {
        uint8_t order[256];
        std::iota(order, order + 256, 0);
        std::stable_sort(order, order + 256,
                         [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
        std::memset(codes, kNone, sizeof codes);
        for (int i = 0; i < 16; i++) {
            codes[order[i]] = (uint8_t)i;
            table.high[i] = order[i] >> 1;
            table.low[i] = (uint8_t)(order[i] << 7);
        }
        for (int i = 16; i < 256; i++) escapes += counts[order[i]];
    }
};

// A panel [units][32] of words into `data`; what has no code is appended to `escapes`.
void compact(const CompactCode& code, const uint32_t* words, int64_t units, uint8_t* data,
             std::vector<Escape>& escapes) {
    uint8_t bytes[kMarks];
    for (int64_t place = 0; place < kMarks; place++) bytes[place] = (uint8_t)byte_of(place);
    std::memset(data, 0, compact_bytes(units));
    for (int64_t unit = 0; unit < units; unit++) {
        uint8_t* pair = data + unit / 2 * kPairBytes;
        uint8_t *marks = pair + unit % 2 * kMarks, *codes = pair + 2 * kMarks;
        const auto* numbers = (const uint16_t*)(words + unit * kPanel);
        for (int64_t place = 0; place < kMarks; place++) {
            uint16_t bits = numbers[place];
            uint8_t own = code.codes[exponent(bits)];
            marks[bytes[place]] = mark(bits);
            if (own == CompactCode::kNone) {
                auto at = (uint16_t)(unit % 2 * kMarks + place);
                escapes.push_back({(int32_t)(unit / 2), at, bits});
            } else {
                codes[bytes[place]] |= (uint8_t)(own << unit % 2 * 4);
            }
        }
    }
}

// What is only padding has an exponent too: that of a number which needs no escape.
void pad(const CompactCode& code, uint32_t* words, int64_t present, int64_t in, int64_t units) {
    auto filler = (uint16_t)(code.table.high[0] << 8 | code.table.low[0]);
    auto* numbers = (uint16_t*)words;
    for (int64_t unit = 0; unit < units; unit++) {
        for (int64_t place = 0; place < kMarks; place++) {
            if (place / 2 >= present) numbers[unit * kMarks + place] = filler;
        }
    }
    if (in % 2 == 0) return;
    for (int64_t lane = 0; lane < kPanel; lane++) {
        numbers[(units - 1) * kMarks + 2 * lane + 1] = filler;  // multiplied by 0
    }
}

void pack_compact(Backend& b, Team& team, Matrix* m, const char* weight, const CompactCode& code,
                  std::vector<std::vector<Escape>>& escapes) {
    team.split(m->panels, 4, [&](int64_t begin, int64_t end) {
        auto* words = (uint32_t*)b.scratch[team.thread].get(m->units * kPanel * 4);
        for (int64_t p = begin; p < end; p++) {
            int64_t present = least(kPanel, m->out - p * kPanel);
            b.isa->pack_panel(weight + p * kPanel * m->in * 2, m->in * 2, present, m->in * 2,
                              m->units, words);
            pad(code, words, present, m->in, m->units);
            auto* data = (uint8_t*)m->data + p * compact_bytes(m->units);
            compact(code, words, m->units, data, escapes[p]);
        }
    });
}

// The panels' escapes one behind the other.
void keep_escapes(Backend& b, Matrix* m, const std::vector<std::vector<Escape>>& escapes) {
    int64_t total = 0;
    for (const auto& own : escapes) total += (int64_t)own.size() + 1;
    auto* place = (Escape*)b.arena.take(total * (int64_t)sizeof(Escape));
    auto* first = (int64_t*)b.arena.take((m->panels + 1) * 8);
    m->escapes = place;
    m->first_escape = first;
    for (int64_t p = 0; p < m->panels; p++) {
        first[p] = place - m->escapes;
        place = std::copy(escapes[p].begin(), escapes[p].end(), place);
        *place++ = {kNoPair, 0, 0};
    }
    first[m->panels] = total;
}

// Null where the weight is kept plain: it has too many exponents, or numbers that are not finite.
Matrix* try_compact(Backend& b, const char* weight, int64_t out, int64_t in) {
    constexpr int64_t kRare = 256;  // weights to one escape, at the least
    if (in == 0) return nullptr;
    int64_t counts[256] = {};
    std::mutex adding;
    b.pool.run([&](Team& team) {
        team.split(out, 64, [&](int64_t begin, int64_t end) {
            int64_t own[256] = {};
            count_exponents((const uint16_t*)weight + begin * in, (end - begin) * in, own);
            std::lock_guard<std::mutex> lock(adding);
            for (int e = 0; e < 256; e++) counts[e] += own[e];
        });
    });
    CompactCode code(counts);
    if (counts[255] || code.escapes * kRare > out * in) return nullptr;
    Matrix* m = new_matrix(b, out, in, kCompact);
    std::vector<std::vector<Escape>> escapes(m->panels);
    b.pool.run([&](Team& team) { pack_compact(b, team, m, weight, code, escapes); });
    m->table = new (b.arena.take(sizeof(CompactTable))) CompactTable(code.table);
    keep_escapes(b, m, escapes);
    return m;
}

uint16_t compact_number(const CompactPanel& panel, int64_t lane, int64_t k) {
    int64_t unit = k / 2, pair = unit / 2, place = 2 * lane + k % 2, half = unit % 2;
    for (const Escape* e = panel.escapes; e->pair <= pair && e->pair != kNoPair; e++) {
        if (e->pair == pair && e->place == half * kMarks + place) return e->bits;
    }
    const uint8_t* data = panel.data + pair * kPairBytes;
    int64_t at = byte_of(place), code = data[2 * kMarks + at] >> half * 4 & 15;
    uint8_t own = data[half * kMarks + at];
    uint8_t high = (own & 128) | panel.table->high[code];
    uint8_t low = (own & 127) | panel.table->low[code];
    return (uint16_t)(high << 8 | low);
}
}  // namespace

Matrix* pack(Backend& b, const void* weight, int32_t type, int64_t out, int64_t in,
             const float* bias, int32_t packed) {
    Matrix* m = packed == kCompact ? try_compact(b, (const char*)weight, out, in) : nullptr;
    if (!m) {
        m = new_matrix(b, out, in, packed == kCompact ? type : packed);
        b.pool.run([&](Team& team) { pack_plain(b, team, m, (const char*)weight, type); });
    }
    if (bias) std::memcpy(m->bias, bias, out * 4);
    return m;
}

int64_t panel_bytes(const Matrix& m) {
    return m.panels * (m.type == kCompact ? compact_bytes(m.units) : m.units * kPanel * 4);
}

int64_t packed_bytes(const Matrix& m) {
    int64_t escapes = m.first_escape ? m.first_escape[m.panels] * (int64_t)sizeof(Escape) : 0;
    return panel_bytes(m) + escapes;
}

void unpack_rows(const Matrix& m, const int64_t* ids, int64_t count, void* out) {
    int64_t per_word = m.type == kFloat ? 1 : 2, bytes = 4 / per_word;
    for (int64_t i = 0; i < count; i++) {
        int64_t p = ids[i] / kPanel, lane = ids[i] % kPanel;
        char* row = (char*)out + i * m.in * bytes;
        if (m.type == kCompact) {
            CompactPanel panel = compact_panel(m, p);
            for (int64_t k = 0; k < m.in; k++) ((uint16_t*)row)[k] = compact_number(panel, lane, k);
            continue;
        }
        const uint32_t* column = m.data + p * m.units * kPanel + lane;
        for (int64_t u = 0; u < m.units; u++) {
            int64_t first = u * per_word;
            std::memcpy(row + first * bytes, column + u * kPanel,
                        bytes * least(per_word, m.in - first));
        }
    }
}

}  // namespace phalanx
