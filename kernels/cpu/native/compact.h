// bfloat16 in 12 bits, without loss. The exponents of a trained matrix are few: sixteen of the 256 hold
// all but some ten thousandths of its weights. A weight is a sign and fraction of eight bits, its
// mark, and four bits that say which of the sixteen; the others, the escapes, are listed.
//
// A panel (Matrix) is cut into pairs of units, each two marks of 64 bytes, one for each unit, and 64
// codes, whose lower halves belong to the first unit and whose upper ones to the second. Within a
// unit of words w[32], two numbers each, byte 16 l + 8 v + 2 k + h is of word 16 v + 4 l + k and
// its number h: what an instruction that interleaves bytes puts side by side.
#pragma once
#include "common.h"

namespace phalanx {

constexpr int64_t kMarks = 64;           // numbers of a unit
constexpr int64_t kPairBytes = 3 * kMarks;

// What each code stands for: the exponent's upper seven bits, its last one at the head of a byte.
struct CompactTable {
    uint8_t high[16], low[16];
};

// A weight whose exponent has no code; a panel's stand in order, and behind them one with kNoPair.
struct Escape {
    int32_t pair;   // of units
    uint16_t place; // 64 unit + 2 word + number
    uint16_t bits;
};
constexpr int32_t kNoPair = INT32_MAX;

struct CompactPanel {
    const uint8_t* data;
    const CompactTable* table;
    const Escape* escapes;
};
INLINE int64_t compact_bytes(int64_t units) { return (units + 1) / 2 * kPairBytes; }
INLINE CompactPanel compact_panel(const Matrix& m, int64_t p) {
    return {(const uint8_t*)m.data + p * compact_bytes(m.units), m.table,
            m.escapes + m.first_escape[p]};
}

// The byte of a unit's marks, or codes, that belongs to number `place` of [0, 64).
INLINE int64_t byte_of(int64_t place) {
    int64_t word = place / 2;
    return word % 16 / 4 * 16 + word / 16 * 8 + word % 4 * 2 + place % 2;
}

}  // namespace phalanx
