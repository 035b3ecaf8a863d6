// Vectors of 16 floats. `Pairs` holds 16 pairs of bfloat16 and `Spread` one pair in every lane;
// dot_pairs adds both products of a pair to the lane. Included by isa_avx512*.cpp.
static constexpr int kWidth = 16;
static constexpr int kMaxRows = 12;  // 12 rows x 2 vectors of accumulators, of 32 registers
using V = __m512;

INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V divide(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V maximum(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V minimum(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(V x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(V x) { return _mm512_reduce_max_ps(x); }
INLINE V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE V power_of_two(V n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
// value where x >= limit, else 0
INLINE V keep_above(V value, V x, V limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), value);
}
INLINE V load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE V load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// p[i] = round(x[i]) + zero_point, as a byte
INLINE void store_levels(uint8_t* p, V x, int32_t zero_point) {
    __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero_point));
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(n));
}
// Whole numbers of [0, 65535] as their upper and lower bytes.
INLINE void store_halves(uint8_t* upper, uint8_t* lower, V x) {
    __m512i n = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)lower, _mm512_cvtepi32_epi8(n));
    _mm_storeu_si128((__m128i*)upper, _mm512_cvtepi32_epi8(_mm512_srli_epi32(n, 8)));
}
// out[i] = the pair (first[i], second[i])
INLINE void zip(const bf16* first, const bf16* second, uint32_t* out) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
    _mm512_storeu_si512(out, _mm512_or_epi32(low, _mm512_slli_epi32(high, 16)));
}

// the same of bytes, whose numbers bfloat16 holds exactly
INLINE void zip(const int8_t* first, const int8_t* second, uint32_t* out) {
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(load(first)), 16);
    _mm512_storeu_si512(out, _mm512_or_epi32(low, _mm512_castps_si512(load(second))));
}

#ifdef PHX_BF16_DOT
using Pairs = __m512bh;
using Spread = __m512bh;
INLINE void store(bf16* p, V x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}
INLINE Pairs load_pairs(const uint32_t* p) { return (Pairs)_mm512_loadu_si512(p); }
INLINE void store_pairs(uint32_t* p, Pairs x) { _mm512_storeu_si512(p, (__m512i)x); }
INLINE Spread spread(uint32_t pair) { return (Spread)_mm512_set1_epi32((int)pair); }
INLINE V dot_pairs(V acc, Pairs w, Spread x) { return _mm512_dpbf16_ps(acc, w, x); }
#else
using Pairs = __m512i;
struct Spread { V low, high; };
INLINE void store(bf16* p, V x) {  // round to nearest even; a NaN keeps a set mantissa bit
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
INLINE Pairs load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE void store_pairs(uint32_t* p, Pairs x) { _mm512_storeu_si512(p, x); }
INLINE Spread spread(uint32_t pair) {
    return {set1(from_bits(pair << 16)), set1(from_bits(pair & 0xffff0000u))};
}
INLINE V dot_pairs(V acc, Pairs w, Spread x) {
    acc = fma(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), x.low, acc);
    __m512i high = _mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u));
    return fma(_mm512_castsi512_ps(high), x.high, acc);
}
#endif

// 64 bytes; tables of 16 bytes are looked up by codes of [0, 15].
using Bytes = __m512i;
INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Bytes load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
INLINE Bytes look_up(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
INLINE Bytes lower_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Bytes upper_halves(Bytes x) { return lower_halves(_mm512_srli_epi16(x, 4)); }
// Numbers of a sign and seven bits of fraction in `marks`, and what the exponent adds to their upper
// and lower bytes; `second` holds every other four words.
INLINE void join(Bytes marks, Bytes high, Bytes low, Pairs& first, Pairs& second) {
    Bytes sign = _mm512_set1_epi8((char)0x80);
    high = _mm512_ternarylogic_epi32(sign, marks, high, 0xea);  // sign & marks | high
    low = _mm512_ternarylogic_epi32(sign, marks, low, 0xae);    // ~sign & marks | low
    first = (Pairs)_mm512_unpacklo_epi8(low, high);
    second = (Pairs)_mm512_unpackhi_epi8(low, high);
}

// Four bytes a lane: unsigned activations times signed weights, summed into 32 bits.
using I = __m512i;
INLINE I zero_int() { return _mm512_setzero_si512(); }
INLINE I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
INLINE V to_float(I x) { return _mm512_cvtepi32_ps(x); }
#ifdef PHX_BF16_DOT  // every processor with the one has the other
INLINE I dot_bytes(I acc, I w, uint32_t x) {
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32((int)x), w);
}
INLINE I dot_signed(I acc, I w, uint32_t x) {  // unsigned weights, signed activations
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32((int)x));
}
#else
INLINE I dot_bytes(I acc, I w, uint32_t x) {  // even and odd bytes apart: no sum saturates
    __m512i u = _mm512_set1_epi32((int)x), mask = _mm512_set1_epi16(0xff);
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, _mm512_and_si512(u, mask)));
    return _mm512_add_epi32(
        acc, _mm512_madd_epi16(_mm512_srai_epi16(w, 8), _mm512_srli_epi16(u, 8)));
}
INLINE I dot_signed(I acc, I w, uint32_t x) {
    __m512i s = _mm512_set1_epi32((int)x), mask = _mm512_set1_epi16(0xff);
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, _mm512_and_si512(w, mask)));
    return _mm512_add_epi32(
        acc, _mm512_madd_epi16(_mm512_srai_epi16(s, 8), _mm512_srli_epi16(w, 8)));
}
#endif

// Rows become columns: out[i][lane] = rows[lane][i] for a square of 16 x 16 words.
INLINE void transpose(const uint32_t* const* rows, long offset, uint32_t* out, long stride) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + offset);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        int low = i;  // word columns i and i + 8
        _mm512_storeu_si512(out + low * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(out + (low + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}
