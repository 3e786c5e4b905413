// A strip's outputs, as many as one pass over its numbers sums: as integers of a group and as floats.
//
// Numbers of few bits are unsigned with an offset where they are multiplied (the instructions take them so), and the
// sums of a group start with minus the offset times the sum of the row's bytes.
#pragma once

#include "always_inline.h"
#include "fetch.h"
#include "packed.h"
#include "simd.h"

namespace moesaic::MOESAIC_ISA {

#if defined(__AVX512F__)

constexpr int row_tile = 6;  // rows whose sums fit the registers beside the weights
constexpr int64_t pass_outputs = 32;
struct Bytes {
    __m512i v[2];
};
struct Ints {
    __m512i v[2];
};

MOESAIC_INLINE Ints ints(int32_t x) { return {{_mm512_set1_epi32(x), _mm512_set1_epi32(x)}}; }
MOESAIC_INLINE Bytes bytes(const uint8_t *p) { return {{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)}}; }
MOESAIC_INLINE void store(uint8_t *p, const Bytes &x) {
    _mm512_storeu_si512(p, x.v[0]);
    _mm512_storeu_si512(p + 64, x.v[1]);
}
MOESAIC_INLINE Bytes low_halves(const Bytes &x) {
    const __m512i mask = _mm512_set1_epi8(15);
    return {{_mm512_and_si512(x.v[0], mask), _mm512_and_si512(x.v[1], mask)}};
}
MOESAIC_INLINE Bytes high_halves(const Bytes &x) {
    return low_halves({{_mm512_srli_epi16(x.v[0], 4), _mm512_srli_epi16(x.v[1], 4)}});
}
// Two bits of each byte, the `quarter`th from the lowest, in bits 4 and 5; the others of `low` below them.
template <int quarter>
MOESAIC_INLINE Bytes six_bits(const Bytes &low, const Bytes &upper) {
    const auto part = [&](int i) {
        const __m512i x = upper.v[i], mask = _mm512_set1_epi8(0x30);
        if constexpr (quarter < 2) return _mm512_and_si512(_mm512_slli_epi16(x, 4 - 2 * quarter), mask);
        else return _mm512_and_si512(_mm512_srli_epi16(x, 2 * quarter - 4), mask);
    };
    return {{_mm512_or_si512(low.v[0], part(0)), _mm512_or_si512(low.v[1], part(1))}};
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table16)));
    return {{_mm512_shuffle_epi8(table, x.v[0]), _mm512_shuffle_epi8(table, x.v[1])}};
}
MOESAIC_INLINE Bytes less(const Bytes &x, int8_t y) {
    const __m512i all = _mm512_set1_epi8(y);
    return {{_mm512_sub_epi8(x.v[0], all), _mm512_sub_epi8(x.v[1], all)}};
}
MOESAIC_INLINE Vec to_floats(const Ints &sums, int i) { return {_mm512_cvtepi32_ps(sums.v[i])}; }

#elif defined(__AVX2__)

constexpr int row_tile = 4;
constexpr int64_t pass_outputs = 16;  // two vectors: what four bytes of a row are loaded for (a load a product binds)
struct Bytes {
    __m256i v[2];
};
struct Ints {
    __m256i v[2];
};

MOESAIC_INLINE __m256i vector_at(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
MOESAIC_INLINE Ints ints(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
MOESAIC_INLINE Bytes bytes(const uint8_t *p) { return {{vector_at(p), vector_at(p + 32)}}; }
MOESAIC_INLINE void store(uint8_t *p, const Bytes &x) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i *>(p) + i, x.v[i]);
}
MOESAIC_INLINE Bytes low_halves(const Bytes &x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(x.v[0], mask), _mm256_and_si256(x.v[1], mask)}};
}
MOESAIC_INLINE Bytes high_halves(const Bytes &x) {
    return low_halves({{_mm256_srli_epi16(x.v[0], 4), _mm256_srli_epi16(x.v[1], 4)}});
}
template <int quarter>
MOESAIC_INLINE Bytes six_bits(const Bytes &low, const Bytes &upper) {
    const auto part = [&](int i) {
        const __m256i x = upper.v[i], mask = _mm256_set1_epi8(0x30);
        if constexpr (quarter < 2) return _mm256_and_si256(_mm256_slli_epi16(x, 4 - 2 * quarter), mask);
        else return _mm256_and_si256(_mm256_srli_epi16(x, 2 * quarter - 4), mask);
    };
    return {{_mm256_or_si256(low.v[0], part(0)), _mm256_or_si256(low.v[1], part(1))}};
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table16)));
    return {{_mm256_shuffle_epi8(table, x.v[0]), _mm256_shuffle_epi8(table, x.v[1])}};
}
MOESAIC_INLINE Vec to_floats(const Ints &sums, int i) { return {_mm256_cvtepi32_ps(sums.v[i])}; }

#else

constexpr int row_tile = 1;
constexpr int64_t pass_outputs = 32;
struct Bytes {
    uint8_t v[pass_outputs * 4];
};
struct Ints {
    int32_t v[pass_outputs];
};

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
MOESAIC_INLINE void store(uint8_t *p, const Bytes &x) { std::memcpy(p, x.v, sizeof x.v); }
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
template <int quarter>
MOESAIC_INLINE Bytes six_bits(const Bytes &low, const Bytes &upper) {
    Bytes y;
    for (unsigned i = 0; i < sizeof low.v; ++i)
        y.v[i] = static_cast<uint8_t>(low.v[i] | (upper.v[i] >> 2 * quarter & 3) << 4);
    return y;
}
MOESAIC_INLINE Bytes look_up(const uint8_t *table16, const Bytes &x) {
    Bytes y;
    for (unsigned i = 0; i < sizeof x.v; ++i) y.v[i] = table16[x.v[i]];
    return y;
}
MOESAIC_INLINE Vec to_floats(const Ints &sums, int i) {
    float values[Vec::lanes];
    for (int lane = 0; lane < Vec::lanes; ++lane) values[lane] = static_cast<float>(sums.v[i * Vec::lanes + lane]);
    return load(values);
}

#endif

// Whether numbers of eight bits are taken with their offset, too.
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
constexpr bool signed_has_offset = true;
#else
constexpr bool signed_has_offset = false;
#endif
constexpr int32_t offset_of(Format format) {
    switch (format) {
        case Format::int8: return signed_has_offset ? 128 : 0;
        case Format::int6: return 32;
        case Format::int4: return 8;
        case Format::uneven4: return uneven_offset;
        default: return 12;
    }
}

MOESAIC_INLINE int32_t four_bytes(const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return four;
}

// += weights [outputs][4] times four bytes of a row. Without an instruction for it, sums of two products must fit 16
// bits: weights of 8 bits are taken as magnitude and sign, whose products do.
template <bool Signed>
MOESAIC_INLINE void add_dot(Ints &sums, const Bytes &weights, const int8_t *x) {
#if defined(__AVX512VNNI__)
    const __m512i xs = _mm512_set1_epi32(four_bytes(x));
    for (int i = 0; i < 2; ++i) sums.v[i] = _mm512_dpbusd_epi32(sums.v[i], weights.v[i], xs);
#elif defined(__AVX512F__)
    const __m512i xs = _mm512_set1_epi32(four_bytes(x)), zero = _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) {
        __m512i w = weights.v[i], signed_xs = xs;
        if constexpr (Signed) {
            w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            signed_xs = _mm512_mask_sub_epi8(xs, _mm512_movepi8_mask(w), zero, xs);
            w = _mm512_abs_epi8(w);
        }
        const __m512i pairs = _mm512_maddubs_epi16(w, signed_xs);
        sums.v[i] = _mm512_add_epi32(sums.v[i], _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
#elif defined(__AVX2__)
    const __m256i xs = _mm256_set1_epi32(four_bytes(x));
    for (int i = 0; i < 2; ++i) {
        __m256i w = weights.v[i], signed_xs = xs;
        if constexpr (Signed) {
            w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            signed_xs = _mm256_sign_epi8(xs, w);
            w = _mm256_abs_epi8(w);
        }
        const __m256i pairs = _mm256_maddubs_epi16(w, signed_xs);
        sums.v[i] = _mm256_add_epi32(sums.v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#else
    for (int o = 0; o < pass_outputs; ++o)
        for (int i = 0; i < 4; ++i) sums.v[o] += weights.v[4 * o + i] * x[i];
#endif
}

// How many times a dot product of `add_dot` can be added up in 16 bits, half of the work, before sums must be widened:
// each is the sum of two products, at most 2 x 127 x the greatest number. 1: they are widened each time, or need not be.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t dots_in_halves(Format format) {
    switch (format) {
        case Format::int6:
        case Format::uneven4: return 2;
        case Format::int4: return 8;
        case Format::mxfp4: return 4;
        default: return 1;
    }
}
// A sum that stays in one register: left alone GCC makes all products before it adds any, which do not fit.
MOESAIC_INLINE __m256i kept(__m256i sum) {
#if defined(__GNUC__)
    asm("" : "+x"(sum));
#endif
    return sum;
}
MOESAIC_INLINE void begin_halves(Ints &halves, const Bytes &weights, const int8_t *x) {
    const __m256i xs = _mm256_set1_epi32(four_bytes(x));
    for (int i = 0; i < 2; ++i) halves.v[i] = kept(_mm256_maddubs_epi16(weights.v[i], xs));
}
MOESAIC_INLINE void add_halves(Ints &halves, const Bytes &weights, const int8_t *x) {
    const __m256i xs = _mm256_set1_epi32(four_bytes(x));
    for (int i = 0; i < 2; ++i)
        halves.v[i] = kept(_mm256_add_epi16(halves.v[i], _mm256_maddubs_epi16(weights.v[i], xs)));
}
MOESAIC_INLINE void add_widened(Ints &sums, const Ints &halves) {
    for (int i = 0; i < 2; ++i)
        sums.v[i] = kept(_mm256_add_epi32(sums.v[i], _mm256_madd_epi16(halves.v[i], _mm256_set1_epi16(1))));
}
#else
constexpr int64_t dots_in_halves(Format) { return 1; }
MOESAIC_INLINE void begin_halves(Ints &, const Bytes &, const int8_t *) {}
MOESAIC_INLINE void add_halves(Ints &, const Bytes &, const int8_t *) {}
MOESAIC_INLINE void add_widened(Ints &, const Ints &) {}
#endif

// Floats of a pass's outputs, in as many vectors as it takes.
constexpr int pass_vectors = pass_outputs / Vec::lanes;
struct Floats {
    Vec v[pass_vectors];
};
MOESAIC_INLINE Floats floats_at(const float *p) {
    Floats x;
    for (int i = 0; i < pass_vectors; ++i) x.v[i] = load(p + i * Vec::lanes);
    return x;
}
MOESAIC_INLINE void store(float *p, const Floats &x) {
    for (int i = 0; i < pass_vectors; ++i) store(p + i * Vec::lanes, x.v[i]);
}
MOESAIC_INLINE Floats zeros() {
    Floats x;
    for (auto &each : x.v) each = set(0.0f);
    return x;
}
MOESAIC_INLINE void add_scaled(Floats &total, const Ints &sums, const Floats &scales, float x) {
    for (int i = 0; i < pass_vectors; ++i) total.v[i] = fma(to_floats(sums, i), scales.v[i] * set(x), total.v[i]);
}

}  // namespace moesaic::MOESAIC_ISA
