#include "stored.h"

#include <cerrno>
#include <unistd.h>

#include "compact.h"
#include "pack.h"

namespace phalanx {

namespace {
constexpr int64_t kPiece = 1 << 20;  // read and digested at a time: it stays in a core's cache
constexpr int64_t kLanes = 8;

uint64_t stir(uint64_t lane, uint64_t word) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    lane = (lane ^ word) * kOdd;
    return lane << 29 | lane >> 35;
}

// Words by turns into lanes, which do not wait for each other. Whatever word is changed changes the
// result, as each step can be undone.
uint64_t digest_piece(const char* data, int64_t bytes) {
    uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
    int64_t at = 0;
    for (; at + kLanes * 8 <= bytes; at += kLanes * 8) {
        uint64_t words[kLanes];
        std::memcpy(words, data + at, sizeof words);
        for (int64_t i = 0; i < kLanes; i++) lanes[i] = stir(lanes[i], words[i]);
    }
    uint64_t result = bytes;
    for (uint64_t lane : lanes) result = stir(result, lane);
    for (; at < bytes; at++) result = stir(result, (uint8_t)data[at]);
    return result;
}

bool read_piece(int file, char* data, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        int64_t count = pread(file, data, bytes, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        data += count, offset += count, bytes -= count;
    }
    return true;
}

int64_t pieces(const Part& part) { return (part.bytes + kPiece - 1) / kPiece; }
}  // namespace

uint64_t digest(const void* data, int64_t bytes) {
    uint64_t result = 0;
    for (int64_t at = 0; at < bytes; at += kPiece) {
        result = stir(result, digest_piece((const char*)data + at, least(kPiece, bytes - at)));
    }
    return result;
}

void describe(Stored& stored) {
    const Matrix& m = *stored.matrix;
    stored.out = m.out, stored.in = m.in, stored.type = m.type;
    int64_t rows = m.panels * kPanel * 4, scales = m.type == kInt8 ? rows : 0;
    const void* arrays[] = {m.data, m.bias, m.scales, m.sums, m.table, m.escapes, m.first_escape};
    int64_t bytes[kArrays] = {panel_bytes(m), rows, scales, scales};
    if (m.type == kCompact) {
        bytes[4] = sizeof(CompactTable);
        bytes[5] = m.first_escape[m.panels] * (int64_t)sizeof(Escape);
        bytes[6] = (m.panels + 1) * 8;
    }
    for (int i = 0; i < kArrays; i++) stored.parts[i] = {(void*)arrays[i], bytes[i], 0, 0};
}

bool read_parts(Backend& b, int file, Part* parts, int64_t count) {
    struct Place {
        int64_t part, offset;
    };
    std::vector<Place> places;
    for (int64_t i = 0; i < count; i++) {
        for (int64_t p = 0; p < pieces(parts[i]); p++) places.push_back({i, p * kPiece});
    }
    std::vector<uint64_t> digests(places.size());
    std::atomic<bool> whole{true};
    b.pool.run([&](Team& team) {
        team.split(places.size(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end && whole; i++) {
                const Part& part = parts[places[i].part];
                int64_t at = places[i].offset, bytes = least(kPiece, part.bytes - at);
                char* data = (char*)part.data + at;
                if (!read_piece(file, data, bytes, part.offset + at)) whole = false;
                digests[i] = digest_piece(data, bytes);
            }
        });
    });
    size_t next = 0;
    for (int64_t i = 0; i < count; i++) {
        uint64_t result = 0;
        for (int64_t p = 0; p < pieces(parts[i]); p++) result = stir(result, digests[next++]);
        if (result != parts[i].digest) whole = false;
    }
    return whole;
}

// A matrix with room for what is in the file. Its escapes are as many as that has.
static Matrix* blank(Backend& b, const Stored& stored) {
    Matrix* m = new_matrix(b, stored.out, stored.in, stored.type);
    if (m->type == kCompact) {
        m->table = (CompactTable*)b.arena.take(sizeof(CompactTable));
        int64_t escapes = stored.parts[5].bytes / (int64_t)sizeof(Escape);
        m->escapes = (Escape*)b.arena.take(escapes * (int64_t)sizeof(Escape));
        auto* first = (int64_t*)b.arena.take((m->panels + 1) * 8);
        first[m->panels] = escapes;
        m->first_escape = first;
    }
    return m;
}

bool restore(Backend& b, int file, Stored* stored, int64_t count) {
    Arena::Mark mark = b.arena.mark();
    std::vector<Part> parts;
    bool fits = true;
    for (int64_t i = 0; i < count; i++) {
        Stored made;
        made.matrix = blank(b, stored[i]);
        describe(made);
        for (int p = 0; p < kArrays; p++) {
            const Part& found = stored[i].parts[p];
            fits &= found.bytes == made.parts[p].bytes;
            parts.push_back({made.parts[p].data, made.parts[p].bytes, found.offset, found.digest});
        }
        stored[i].matrix = made.matrix;
    }
    if (fits && read_parts(b, file, parts.data(), parts.size())) return true;
    b.arena.rewind(mark);
    return false;
}

}  // namespace phalanx
