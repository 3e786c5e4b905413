// What a strip's bytes stand for: scales as floats, and numbers of four bits and of e4m3 in forms that multiply.
#pragma once

#include "packed_lanes.h"

namespace moesaic::MOESAIC_ISA {

#if !defined(__AVX2__)
// Bits of a small floating-point format, its exponent moved to a float's place; `rebias` is exact, also below the
// normal numbers.
MOESAIC_INLINE float rebiased(uint32_t magnitude, uint32_t sign, float rebias) {
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= rebias;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}
#endif

// The fp16 numbers of a pass.
MOESAIC_INLINE Floats half_scales(const uint8_t *p) {
    Floats scales;
#if defined(__AVX512F__)
    for (int i = 0; i < pass_vectors; ++i)
        scales.v[i] = {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + i))};
#elif defined(__AVX2__)
    for (int i = 0; i < pass_vectors; ++i)
        scales.v[i] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + i))};
#else
    float values[pass_outputs];
    for (int o = 0; o < pass_outputs; ++o) {
        uint16_t half;
        std::memcpy(&half, p + 2 * o, 2);
        values[o] = rebiased(static_cast<uint32_t>(half & 0x7fff) << 13, static_cast<uint32_t>(half & 0x8000) << 16,
                             0x1p112f);
    }
    scales = floats_at(values);
#endif
    return scales;
}

// 2^(exponent - 127); 255, which is no number, is infinite, and nothing finite comes of it.
MOESAIC_INLINE Floats exponent_scales(const uint8_t *p) {
    constexpr int32_t least = 0x400000;  // 2^-127
    Floats scales;
#if defined(__AVX512F__)
    for (int i = 0; i < pass_vectors; ++i) {
        const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + i));
        const __m512i bits = _mm512_max_epi32(_mm512_slli_epi32(e, 23), _mm512_set1_epi32(least));
        scales.v[i] = {_mm512_castsi512_ps(bits)};
    }
#elif defined(__AVX2__)
    for (int i = 0; i < pass_vectors; ++i) {
        const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * i)));
        const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(least));
        scales.v[i] = {_mm256_castsi256_ps(bits)};
    }
#else
    float values[pass_outputs];
    for (int o = 0; o < pass_outputs; ++o) {
        const int32_t bits = p[o] ? static_cast<int32_t>(p[o]) << 23 : least;
        std::memcpy(&values[o], &bits, 4);
    }
    scales = floats_at(values);
#endif
    return scales;
}

#if defined(__AVX2__)
// The bytes of a bf16 that a code of e4m3 is: the upper by the code's upper half, the lower is its lower half, moved.
// Where the exponent is 0 the lower half tells both.
alignas(16) constexpr uint8_t e4m3_upper[16] = {0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                                0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
alignas(16) constexpr uint8_t e4m3_small_lower[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60};
alignas(16) constexpr uint8_t e4m3_small_upper[16] = {0xc4, 0xff, 0xff, 0xff};  // less 0x3c
constexpr int8_t e4m3_exponent = static_cast<int8_t>(0x87);                     // its bits, halves swapped
#else
// bf16 of the codes of e4m3 below the normal numbers; of all others exponent and mantissa move together.
constexpr int e4m3_below_normal[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
constexpr int e4m3_to_bf16 = 0x3c00;
#endif

#if defined(__AVX512F__)
// Which of 64 codes are below the normal numbers: their halves cannot be told apart.
MOESAIC_INLINE __mmask64 small_e4m3(__m512i x) { return _mm512_testn_epi8_mask(x, _mm512_set1_epi8(e4m3_exponent)); }

template <bool some_small>
MOESAIC_INLINE void bf16_of_e4m3(__m512i x, __mmask64 small, uint8_t *pairs) {
    const auto table = [](const uint8_t *of) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(of)));
    };
    const __m512i half = _mm512_set1_epi8(15);
    __m512i lower = _mm512_andnot_si512(half, x);
    __m512i upper = _mm512_shuffle_epi8(table(e4m3_upper), _mm512_and_si512(x, half));
    if constexpr (some_small) {
        const __m512i mantissa = _mm512_and_si512(_mm512_srli_epi16(x, 4), half);
        lower = _mm512_mask_shuffle_epi8(lower, small, table(e4m3_small_lower), mantissa);
        upper = _mm512_add_epi8(upper, _mm512_maskz_shuffle_epi8(small, table(e4m3_small_upper), mantissa));
    }
    _mm512_storeu_si512(pairs, _mm512_unpacklo_epi8(lower, upper));
    _mm512_storeu_si512(pairs + 64, _mm512_unpackhi_epi8(lower, upper));
}
#endif

// 128 codes of e4m3, as packed.h lays out four inputs of a strip, as bf16 [2][32][2]. None of them is no number. Of
// weights about one in ten thousand is small, so that the branch is seldom taken.
MOESAIC_INLINE void bf16_of_e4m3(const uint8_t *codes, uint8_t *pairs) {
#if defined(__AVX512F__)
    const __m512i x = _mm512_loadu_si512(codes), y = _mm512_loadu_si512(codes + 64);
    const __mmask64 small_x = small_e4m3(x), small_y = small_e4m3(y);
    if (__builtin_expect(_kortestz_mask64_u8(small_x, small_y), 1)) {
        bf16_of_e4m3<false>(x, 0, pairs);
        bf16_of_e4m3<false>(y, 0, pairs + 128);
    } else {
        bf16_of_e4m3<true>(x, small_x, pairs);
        bf16_of_e4m3<true>(y, small_y, pairs + 128);
    }
#elif defined(__AVX2__)
    const auto table = [](const uint8_t *of) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(of)));
    };
    const __m256i half = _mm256_set1_epi8(15), exponent = _mm256_set1_epi8(e4m3_exponent);
    for (int i = 0; i < 4; ++i) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes) + i);
        const __m256i mantissa = _mm256_and_si256(_mm256_srli_epi16(x, 4), half);
        const __m256i small = _mm256_cmpeq_epi8(_mm256_and_si256(x, exponent), _mm256_setzero_si256());
        const __m256i lower = _mm256_blendv_epi8(_mm256_andnot_si256(half, x),
                                                 _mm256_shuffle_epi8(table(e4m3_small_lower), mantissa), small);
        const __m256i less = _mm256_and_si256(small, _mm256_shuffle_epi8(table(e4m3_small_upper), mantissa));
        const __m256i upper = _mm256_add_epi8(_mm256_shuffle_epi8(table(e4m3_upper), _mm256_and_si256(x, half)), less);
        __m256i *to = reinterpret_cast<__m256i *>(pairs) + i / 2 * 4 + i % 2;
        _mm256_storeu_si256(to, _mm256_unpacklo_epi8(lower, upper));
        _mm256_storeu_si256(to + 2, _mm256_unpackhi_epi8(lower, upper));
    }
#else
    for (int of_sixteen = 0; of_sixteen < 8; ++of_sixteen)
        for (int side = 0; side < 2; ++side)
            for (int i = 0; i < 8; ++i) {
                const uint8_t code = static_cast<uint8_t>(*codes << 4 | *codes >> 4), magnitude = code & 0x7f;
                const int moved = magnitude < 8 ? e4m3_below_normal[magnitude] : (magnitude << 4) + e4m3_to_bf16;
                const uint16_t bits = static_cast<uint16_t>(moved | (code & 0x80) << 8);
                std::memcpy(pairs + of_sixteen / 4 * 128 + side * 64 + of_sixteen % 4 * 16 + 2 * i, &bits, 2);
                ++codes;
            }
#endif
}

// The numbers of a block of fp8, without its scales, as a strip of bf16 has them [64][32][2].
MOESAIC_INLINE void bf16_of_block(const uint8_t *block, uint8_t *pairs) {
    fetch_ahead(block, 4 * strip_outputs);
    const uint8_t *codes = block + 4 * strip_outputs;
    for (int i = 0; i < 32; ++i) {
        fetch_ahead(codes + i * 4 * strip_outputs, 4 * strip_outputs);
        bf16_of_e4m3(codes + i * 4 * strip_outputs, pairs + i * 8 * strip_outputs);
    }
}

// Twice the values of the 16 codes of e2m1, plus 12; the scales of rows are halved for it.
alignas(16) constexpr uint8_t doubled_e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Scales of a strip's words, lifted (see uneven.h); odd: of the second group.
MOESAIC_INLINE Floats uneven_scales(const uint8_t *p, bool odd) {
    Floats scales;
#if defined(__AVX512F__)
    const __m128i shift = _mm_cvtsi32_si128(odd ? 5 : 0);
    for (int i = 0; i < pass_vectors; ++i) {
        const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + i));
        const __m512i own = _mm512_srl_epi32(word, shift);
        const __m512i exponent = _mm512_and_si512(_mm512_slli_epi32(word, 13), _mm512_set1_epi32(63 << 23));
        const __m512i four = _mm512_and_si512(_mm512_slli_epi32(own, 20), _mm512_set1_epi32(15 << 20));
        const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(own, 4), 31);
        const __m512i lifted = _mm512_add_epi32(exponent, _mm512_set1_epi32(static_cast<int32_t>(uneven_lifted)));
        scales.v[i] = {_mm512_castsi512_ps(_mm512_or_si512(_mm512_add_epi32(lifted, four), sign))};
    }
#elif defined(__AVX2__)
    const __m128i shift = _mm_cvtsi32_si128(odd ? 5 : 0);
    for (int i = 0; i < pass_vectors; ++i) {
        const __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + i));
        const __m256i own = _mm256_srl_epi32(word, shift);
        const __m256i exponent = _mm256_and_si256(_mm256_slli_epi32(word, 13), _mm256_set1_epi32(63 << 23));
        const __m256i four = _mm256_and_si256(_mm256_slli_epi32(own, 20), _mm256_set1_epi32(15 << 20));
        const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(own, 4), 31);
        const __m256i lifted = _mm256_add_epi32(exponent, _mm256_set1_epi32(static_cast<int32_t>(uneven_lifted)));
        scales.v[i] = {_mm256_castsi256_ps(_mm256_or_si256(_mm256_add_epi32(lifted, four), sign))};
    }
#else
    float values[pass_outputs];
    for (int o = 0; o < pass_outputs; ++o) {
        uint16_t word;
        std::memcpy(&word, p + 2 * o, 2);
        const uint32_t own = odd ? word >> 5u : word, magnitude = static_cast<uint32_t>(word >> 10) << 23;
        const uint32_t bits = (magnitude + uneven_lifted + ((own & 15u) << 20)) | (own >> 4 & 1u) << 31;
        std::memcpy(&values[o], &bits, 4);
    }
    scales = floats_at(values);
#endif
    return scales;
}

// Where group g of a strip lies, its scales and its numbers. Wide: numbers of fewer bits made bytes, 32 scales as
// floats before each group.
template <Format F, int64_t group, bool wide>
struct Groups {
    static constexpr Format format = F;
    static constexpr int64_t size = group;
    static constexpr bool eight_bits = wide || F == Format::int8;
    static constexpr bool is_signed = F == Format::int8;
    static constexpr int64_t bits = eight_bits ? 8 : F == Format::int6 ? 6 : 4;
    static constexpr int64_t number_bytes = group * strip_outputs * bits / 8;
    static constexpr int64_t wide_bytes = (4 + group) * strip_outputs;
    static constexpr int64_t block_groups = !wide && (F == Format::mxfp4 || F == Format::uneven4) ? 2 : 1;
    static constexpr int64_t head_bytes = wide ? 4 * strip_outputs : 64;
    static constexpr int64_t block_bytes = head_bytes + block_groups * number_bytes;
    static constexpr bool in_memory = !wide;

    static MOESAIC_INLINE const uint8_t *numbers(const uint8_t *strip, int64_t g) {
        return strip + g / block_groups * block_bytes + head_bytes + g % block_groups * number_bytes;
    }
    static constexpr int64_t bytes_of(int64_t groups) { return groups * block_bytes / block_groups; }
    static MOESAIC_INLINE Floats scales(const uint8_t *strip, int64_t g, int64_t first_output) {
        const uint8_t *head = strip + g / block_groups * block_bytes;
        if constexpr (wide) return floats_at(reinterpret_cast<const float *>(head) + first_output);
        else if constexpr (F == Format::mxfp4) return exponent_scales(head + g % 2 * strip_outputs + first_output);
        else if constexpr (F == Format::uneven4) return uneven_scales(head + 2 * first_output, g % 2);
        else return half_scales(head + 2 * first_output);
    }
    // Eight inputs of a pass's outputs, in two quads, where numbers have fewer than eight bits; odd: whether `pair` is.
    template <bool odd>
    static MOESAIC_INLINE void quads(const uint8_t *numbers, int64_t pair, Bytes &first, Bytes &second) {
        const Bytes both = bytes(numbers + pair * 4 * strip_outputs);
        first = low_halves(both), second = high_halves(both);
        if constexpr (F == Format::mxfp4) first = look_up(doubled_e2m1, first), second = look_up(doubled_e2m1, second);
        if constexpr (F == Format::uneven4)
            first = look_up(uneven_values, first), second = look_up(uneven_values, second);
        if constexpr (F == Format::int6) {
            const Bytes upper = bytes(numbers + (group / 8 + pair / 2) * 4 * strip_outputs);
            first = six_bits<2 * odd>(first, upper), second = six_bits<2 * odd + 1>(second, upper);
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
