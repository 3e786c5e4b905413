// The 32 outputs of a strip, as integer and as float sums of one row.
//
// Numbers of few bits are unsigned with an offset where they are multiplied (the instruction takes them so), and the
// sums of a group begin with minus the offset times the sum of the row. signed_has_offset: whether that is so for eight
// bits, too.
#pragma once

#include "packed.h"
#include "simd.h"

// Sums stay in registers only where everything that touches them is inlined.
#if defined(__GNUC__)
#define MOESAIC_INLINE inline __attribute__((always_inline))
#else
#define MOESAIC_INLINE inline
#endif

namespace moesaic::MOESAIC_ISA {

#if defined(__AVX512VNNI__)

constexpr int row_tile = 6;  // rows whose sums fit the registers beside the weights
struct Bytes {
    __m512i v[2];
};
struct Ints {
    __m512i v[2];
};
constexpr bool signed_has_offset = true;

MOESAIC_INLINE Ints ints(int32_t x) { return {{_mm512_set1_epi32(x), _mm512_set1_epi32(x)}}; }
MOESAIC_INLINE Bytes bytes(const uint8_t *p) { return {{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)}}; }
MOESAIC_INLINE Bytes low_halves(const Bytes &x) {
    const __m512i mask = _mm512_set1_epi8(15);
    return {{_mm512_and_si512(x.v[0], mask), _mm512_and_si512(x.v[1], mask)}};
}
MOESAIC_INLINE Bytes high_halves(const Bytes &x) {
    return low_halves({{_mm512_srli_epi16(x.v[0], 4), _mm512_srli_epi16(x.v[1], 4)}});
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table16)));
    return {{_mm512_shuffle_epi8(table, x.v[0]), _mm512_shuffle_epi8(table, x.v[1])}};
}
// += weights [32][4] times four bytes of a row.
template <bool Signed>
MOESAIC_INLINE void add_dot(Ints &sums, const Bytes &weights, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m512i xs = _mm512_set1_epi32(four);
    sums.v[0] = _mm512_dpbusd_epi32(sums.v[0], weights.v[0], xs);
    sums.v[1] = _mm512_dpbusd_epi32(sums.v[1], weights.v[1], xs);
}
MOESAIC_INLINE Vec to_floats(const Ints &sums, int i) { return {_mm512_cvtepi32_ps(sums.v[i])}; }

#elif defined(__AVX2__)

constexpr int row_tile = 1;
struct Bytes {
    __m256i v[4];
};
struct Ints {
    __m256i v[4];
};
constexpr bool signed_has_offset = false;

MOESAIC_INLINE Ints ints(int32_t x) {
    const __m256i v = _mm256_set1_epi32(x);
    return {{v, v, v, v}};
}
MOESAIC_INLINE Bytes bytes(const uint8_t *p) {
    Bytes x;
    for (int i = 0; i < 4; ++i) x.v[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + i);
    return x;
}
MOESAIC_INLINE Bytes low_halves(const Bytes &x) {
    Bytes y;
    for (int i = 0; i < 4; ++i) y.v[i] = _mm256_and_si256(x.v[i], _mm256_set1_epi8(15));
    return y;
}
MOESAIC_INLINE Bytes high_halves(const Bytes &x) {
    Bytes y;
    for (int i = 0; i < 4; ++i) y.v[i] = _mm256_srli_epi16(x.v[i], 4);
    return low_halves(y);
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table16)));
    Bytes y;
    for (int i = 0; i < 4; ++i) y.v[i] = _mm256_shuffle_epi8(table, x.v[i]);
    return y;
}
// Sums of two products must fit 16 bits: weights of 8 bits are taken as magnitude and sign, whose products do.
template <bool Signed>
MOESAIC_INLINE void add_dot(Ints &sums, const Bytes &weights, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i xs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 4; ++i) {
        __m256i pairs;
        if constexpr (Signed) {
            const __m256i w = _mm256_xor_si256(weights.v[i], _mm256_set1_epi8(-128));
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xs, w));
        } else {
            pairs = _mm256_maddubs_epi16(weights.v[i], xs);
        }
        sums.v[i] = _mm256_add_epi32(sums.v[i], _mm256_madd_epi16(pairs, ones));
    }
}

#else

constexpr int row_tile = 1;
struct Bytes {
    uint8_t v[strip_outputs * 4];
};
struct Ints {
    int32_t v[strip_outputs];
};
constexpr bool signed_has_offset = true;

MOESAIC_INLINE Ints ints(int32_t x) {
    Ints y;
    for (auto &each : y.v) each = x;
    return y;
}
MOESAIC_INLINE Bytes bytes(const uint8_t *p) {
    Bytes x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
}
MOESAIC_INLINE Bytes low_halves(const Bytes &x) {
    Bytes y;
    for (unsigned i = 0; i < sizeof x.v; ++i) y.v[i] = x.v[i] & 15;
    return y;
}
MOESAIC_INLINE Bytes high_halves(const Bytes &x) {
    Bytes y;
    for (unsigned i = 0; i < sizeof x.v; ++i) y.v[i] = x.v[i] >> 4;
    return y;
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    Bytes y;
    for (unsigned i = 0; i < sizeof x.v; ++i) y.v[i] = table16[x.v[i]];
    return y;
}
template <bool Signed>
MOESAIC_INLINE void add_dot(Ints &sums, const Bytes &weights, const int8_t *x) {
    for (int o = 0; o < strip_outputs; ++o)
        for (int i = 0; i < 4; ++i) sums.v[o] += weights.v[4 * o + i] * x[i];
}

#endif

#if !defined(__AVX512VNNI__)
MOESAIC_INLINE Vec to_floats(const Ints &sums, int i) {
    int32_t whole[strip_outputs];
    std::memcpy(whole, sums.v, sizeof whole);
    float values[Vec::lanes];
    for (int lane = 0; lane < Vec::lanes; ++lane) values[lane] = static_cast<float>(whole[i * Vec::lanes + lane]);
    return load(values);
}
#endif

// Floats of 32 outputs, in as many vectors as it takes.
constexpr int vectors = strip_outputs / Vec::lanes;
struct Floats {
    Vec v[vectors];
};
MOESAIC_INLINE Floats zeros() {
    Floats x;
    for (auto &each : x.v) each = set(0.0f);
    return x;
}
MOESAIC_INLINE void add_scaled(Floats &total, const Ints &sums, const Floats &scales, float x) {
    for (int i = 0; i < vectors; ++i) total.v[i] = fma(to_floats(sums, i), scales.v[i] * set(x), total.v[i]);
}

}  // namespace moesaic::MOESAIC_ISA
