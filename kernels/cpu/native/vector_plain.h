// Vectors of 8 floats in plain C++, for any processor: the compiler makes of them what it can.
// See vector_avx512.h for what each name means.
static constexpr int kWidth = 8;
static constexpr int kMaxRows = 2;
struct V { float at[8]; };
struct I { int32_t at[8]; };

#define PHX_LANES for (int i = 0; i < 8; i++)
INLINE V set1(float x) { V r; PHX_LANES r.at[i] = x; return r; }
INLINE V zero() { return set1(0.0f); }
INLINE V load(const float* p) { V r; PHX_LANES r.at[i] = p[i]; return r; }
INLINE void store(float* p, V x) { PHX_LANES p[i] = x.at[i]; }
INLINE V add(V a, V b) { PHX_LANES a.at[i] += b.at[i]; return a; }
INLINE V sub(V a, V b) { PHX_LANES a.at[i] -= b.at[i]; return a; }
INLINE V mul(V a, V b) { PHX_LANES a.at[i] *= b.at[i]; return a; }
INLINE V divide(V a, V b) { PHX_LANES a.at[i] /= b.at[i]; return a; }
INLINE V maximum(V a, V b) { PHX_LANES a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i]; return a; }
INLINE V minimum(V a, V b) { PHX_LANES a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; return a; }
INLINE V fma(V a, V b, V c) { return add(mul(a, b), c); }
INLINE float sum(V x) {
    float a = (x.at[0] + x.at[4]) + (x.at[2] + x.at[6]);
    return a + ((x.at[1] + x.at[5]) + (x.at[3] + x.at[7]));
}
INLINE float largest(V x) {
    float best = x.at[0];
    PHX_LANES best = x.at[i] > best ? x.at[i] : best;
    return best;
}
INLINE V nearest(V x) { PHX_LANES x.at[i] = __builtin_nearbyintf(x.at[i]); return x; }
INLINE V power_of_two(V n) {
    PHX_LANES n.at[i] = from_bits((uint32_t)((int32_t)n.at[i] + 127) << 23);
    return n;
}
INLINE V keep_above(V value, V x, V limit) {
    PHX_LANES value.at[i] = x.at[i] >= limit.at[i] ? value.at[i] : 0.0f;
    return value;
}
INLINE V load(const bf16* p) { V r; PHX_LANES r.at[i] = widen(p[i]); return r; }
INLINE V load(const int8_t* p) { V r; PHX_LANES r.at[i] = p[i]; return r; }
INLINE void store_levels(uint8_t* p, V x, int32_t zero_point) {
    PHX_LANES p[i] = (uint8_t)((int32_t)__builtin_nearbyintf(x.at[i]) + zero_point);
}
INLINE void store_halves(uint8_t* upper, uint8_t* lower, V x) {
    PHX_LANES {
        auto n = (uint32_t)__builtin_nearbyintf(x.at[i]);
        upper[i] = (uint8_t)(n >> 8);
        lower[i] = (uint8_t)n;
    }
}
INLINE void store(bf16* p, V x) { PHX_LANES p[i] = narrow(x.at[i]); }
INLINE void zip(const bf16* first, const bf16* second, uint32_t* out) {
    PHX_LANES out[i] = first[i].bits | (uint32_t)second[i].bits << 16;
}
INLINE void zip(const int8_t* first, const int8_t* second, uint32_t* out) {
    PHX_LANES out[i] = narrow(first[i]).bits | (uint32_t)narrow(second[i]).bits << 16;
}

struct Pairs { uint32_t at[8]; };
struct Spread { float low, high; };
INLINE Pairs load_pairs(const uint32_t* p) { Pairs r; PHX_LANES r.at[i] = p[i]; return r; }
INLINE void store_pairs(uint32_t* p, Pairs x) { PHX_LANES p[i] = x.at[i]; }
INLINE Spread spread(uint32_t pair) {
    return {from_bits(pair << 16), from_bits(pair & 0xffff0000u)};
}
INLINE V dot_pairs(V acc, Pairs w, Spread x) {
    PHX_LANES {
        acc.at[i] += from_bits(w.at[i] << 16) * x.low;
        acc.at[i] += from_bits(w.at[i] & 0xffff0000u) * x.high;
    }
    return acc;
}

struct Bytes { uint8_t at[32]; };
#define PHX_BYTES for (int i = 0; i < 32; i++)
INLINE Bytes load_bytes(const uint8_t* p) { Bytes r; PHX_BYTES r.at[i] = p[i]; return r; }
INLINE Bytes load_table(const uint8_t* p) { Bytes r; PHX_BYTES r.at[i] = p[i % 16]; return r; }
INLINE Bytes look_up(Bytes table, Bytes codes) {
    PHX_BYTES codes.at[i] = table.at[codes.at[i]];
    return codes;
}
INLINE Bytes lower_halves(Bytes x) { PHX_BYTES x.at[i] &= 15; return x; }
INLINE Bytes upper_halves(Bytes x) { PHX_BYTES x.at[i] >>= 4; return x; }
INLINE void join(Bytes marks, Bytes high, Bytes low, Pairs& first, Pairs& second) {
    PHX_BYTES {
        high.at[i] |= marks.at[i] & 128;
        low.at[i] |= marks.at[i] & 127;
    }
    PHX_LANES {  // word i of `first` is in bytes 2 k of 16 l, of `second` eight bytes behind
        int at = i / 4 * 16 + i % 4 * 2;
        auto word = [&](int byte) { return low.at[byte] | (uint32_t)high.at[byte] << 8; };
        first.at[i] = word(at) | word(at + 1) << 16;
        second.at[i] = word(at + 8) | word(at + 9) << 16;
    }
}
#undef PHX_BYTES

INLINE I zero_int() { I r; PHX_LANES r.at[i] = 0; return r; }
INLINE I load_int(const uint32_t* p) { I r; PHX_LANES r.at[i] = (int32_t)p[i]; return r; }
INLINE I set1_int(int32_t x) { I r; PHX_LANES r.at[i] = x; return r; }
INLINE I subtract(I a, I b) { PHX_LANES a.at[i] -= b.at[i]; return a; }
INLINE V to_float(I x) { V r; PHX_LANES r.at[i] = (float)x.at[i]; return r; }
INLINE I dot_bytes(I acc, I w, uint32_t x) {
    PHX_LANES {
        for (int byte = 0; byte < 4; byte++) {
            int weight = (int8_t)((uint32_t)w.at[i] >> 8 * byte);
            acc.at[i] += weight * (int)(x >> 8 * byte & 255);
        }
    }
    return acc;
}
INLINE I dot_signed(I acc, I w, uint32_t x) {
    PHX_LANES {
        for (int byte = 0; byte < 4; byte++) {
            int weight = (int)((uint32_t)w.at[i] >> 8 * byte & 255);
            acc.at[i] += weight * (int8_t)(x >> 8 * byte);
        }
    }
    return acc;
}

INLINE void transpose(const uint32_t* const* rows, long offset, uint32_t* out, long stride) {
    for (int i = 0; i < 8; i++) {
        for (int lane = 0; lane < 8; lane++) out[i * stride + lane] = rows[lane][offset + i];
    }
}
#undef PHX_LANES
