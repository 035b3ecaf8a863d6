// Vectors of 8 floats for AVX2 with FMA. See vector_avx512.h for what each name means.
static constexpr int kWidth = 8;
static constexpr int kMaxRows = 3;  // 3 rows x 4 vectors of accumulators, of 16 registers
using V = __m256;

INLINE V zero() { return _mm256_setzero_ps(); }
INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V divide(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V maximum(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V minimum(V a, V b) { return _mm256_min_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(V x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float largest(V x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE V nearest(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE V power_of_two(V n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
INLINE V keep_above(V value, V x, V limit) {
    return _mm256_and_ps(value, _mm256_cmp_ps(x, limit, _CMP_GE_OQ));
}
INLINE V load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE V load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE void store_levels(uint8_t* p, V x, int32_t zero_point) {
    __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero_point));
    n = _mm256_and_si256(n, _mm256_set1_epi32(255));
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
INLINE void store_halves(uint8_t* upper, uint8_t* lower, V x) {
    __m256i n = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    __m128i low = _mm_and_si128(words, _mm_set1_epi16(255)), high = _mm_srli_epi16(words, 8);
    _mm_storel_epi64((__m128i*)lower, _mm_packus_epi16(low, low));
    _mm_storel_epi64((__m128i*)upper, _mm_packus_epi16(high, high));
}
INLINE void store(bf16* p, V x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    up = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    __m128i low = _mm256_castsi256_si128(up), high = _mm256_extracti128_si256(up, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
INLINE void zip(const bf16* first, const bf16* second, uint32_t* out) {
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)first));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)second));
    _mm256_storeu_si256((__m256i*)out, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}

INLINE void zip(const int8_t* first, const int8_t* second, uint32_t* out) {
    __m256i low = _mm256_srli_epi32(_mm256_castps_si256(load(first)), 16);
    _mm256_storeu_si256((__m256i*)out, _mm256_or_si256(low, _mm256_castps_si256(load(second))));
}

using Pairs = __m256i;
struct Spread { V low, high; };
INLINE Pairs load_pairs(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store_pairs(uint32_t* p, Pairs x) { _mm256_storeu_si256((__m256i*)p, x); }
INLINE Spread spread(uint32_t pair) {
    return {set1(from_bits(pair << 16)), set1(from_bits(pair & 0xffff0000u))};
}
INLINE V dot_pairs(V acc, Pairs w, Spread x) {
    acc = fma(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), x.low, acc);
    __m256i high = _mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u));
    return fma(_mm256_castsi256_ps(high), x.high, acc);
}

// 32 bytes
using Bytes = __m256i;
INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Bytes load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
INLINE Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
INLINE Bytes lower_halves(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE Bytes upper_halves(Bytes x) { return lower_halves(_mm256_srli_epi16(x, 4)); }
INLINE void join(Bytes marks, Bytes high, Bytes low, Pairs& first, Pairs& second) {
    Bytes sign = _mm256_set1_epi8((char)0x80);
    high = _mm256_or_si256(_mm256_and_si256(sign, marks), high);
    low = _mm256_or_si256(_mm256_andnot_si256(sign, marks), low);
    first = _mm256_unpacklo_epi8(low, high);
    second = _mm256_unpackhi_epi8(low, high);
}

using I = __m256i;
INLINE I zero_int() { return _mm256_setzero_si256(); }
INLINE I load_int(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE I set1_int(int32_t x) { return _mm256_set1_epi32(x); }
INLINE I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
INLINE V to_float(I x) { return _mm256_cvtepi32_ps(x); }
#ifdef PHX_BYTE_DOT
INLINE I dot_bytes(I acc, I w, uint32_t x) {
    return _mm256_dpbusd_avx_epi32(acc, _mm256_set1_epi32((int)x), w);
}
INLINE I dot_signed(I acc, I w, uint32_t x) {
    return _mm256_dpbusd_avx_epi32(acc, w, _mm256_set1_epi32((int)x));
}
#else
INLINE I dot_bytes(I acc, I w, uint32_t x) {  // even and odd bytes apart: no sum saturates
    __m256i u = _mm256_set1_epi32((int)x), mask = _mm256_set1_epi16(0xff);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_and_si256(u, mask)));
    return _mm256_add_epi32(
        acc, _mm256_madd_epi16(_mm256_srai_epi16(w, 8), _mm256_srli_epi16(u, 8)));
}
INLINE I dot_signed(I acc, I w, uint32_t x) {
    __m256i s = _mm256_set1_epi32((int)x), mask = _mm256_set1_epi16(0xff);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_and_si256(w, mask)));
    return _mm256_add_epi32(
        acc, _mm256_madd_epi16(_mm256_srai_epi16(s, 8), _mm256_srli_epi16(w, 8)));
}
#endif

INLINE void transpose(const uint32_t* const* rows, long offset, uint32_t* out, long stride) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++) {
        a[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + offset));
    }
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m256i low = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        __m256i high = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
        _mm256_storeu_si256((__m256i*)(out + i * stride), low);
        _mm256_storeu_si256((__m256i*)(out + (i + 4) * stride), high);
    }
}
