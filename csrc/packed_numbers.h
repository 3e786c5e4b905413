// What a strip's bytes stand for: scales as floats, and numbers of four bits and of e4m3 in forms that multiply.
#pragma once

#include "packed_lanes.h"

namespace moesaic::MOESAIC_ISA {

#if !defined(__AVX512F__)
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
#if defined(__AVX2__) && !defined(__AVX512F__)
MOESAIC_INLINE __m256 rebiased(__m256i magnitude, __m256i sign, float rebias) {
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(rebias));
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}
#endif

// The fp16 numbers of a pass.
MOESAIC_INLINE Floats half_scales(const uint8_t *p) {
    Floats scales;
#if defined(__AVX512F__)
    for (int i = 0; i < pass_vectors; ++i)
        scales.v[i] = {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + i))};
#elif defined(__AVX2__)
    const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x7fff)), 13);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(half, _mm256_set1_epi32(0x8000)), 16);
    scales.v[0] = {rebiased(magnitude, sign, 0x1p112f)};
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

// 2^(exponent - 127), halved: the codes stand for twice their value.
MOESAIC_INLINE Floats exponent_scales(const uint8_t *p) {
    Floats scales;
#if defined(__AVX512F__)
    for (int i = 0; i < pass_vectors; ++i) {
        const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p) + i));
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
        const __m512i bits = _mm512_mask_sllv_epi32(normal, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)),
                                                    _mm512_set1_epi32(0x200000), e);
        scales.v[i] = {_mm512_castsi512_ps(bits)};
    }
#else
    float values[pass_outputs];
    for (int o = 0; o < pass_outputs; ++o) {
        const uint32_t bits = p[o] >= 2 ? static_cast<uint32_t>(p[o] - 1) << 23 : 0x200000u << p[o];
        std::memcpy(&values[o], &bits, 4);
    }
    scales = floats_at(values);
#endif
    return scales;
}

// 32 numbers of e4m3 over 256, in order: their exponent is that of a half float less 8.
MOESAIC_INLINE void e4m3_over_256(const uint8_t *p, Vec (&w)[strip_outputs / Vec::lanes]) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    w[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(half))};
    w[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
#elif defined(__AVX2__)
    for (int i = 0; i < 4; ++i) {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * i)));
        const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x7f)), 20);
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x80)), 24);
        w[i] = {rebiased(magnitude, sign, 0x1p112f)};
    }
#else
    float values[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o)
        values[o] = rebiased(static_cast<uint32_t>(p[o] & 0x7f) << 20, static_cast<uint32_t>(p[o] & 0x80) << 24,
                             0x1p112f);
    for (int i = 0; i < strip_outputs / Vec::lanes; ++i) w[i] = load(values + i * Vec::lanes);
#endif
}

// Twice the values of the 16 codes of e2m1, plus 12.
alignas(16) constexpr uint8_t doubled_e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

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
    static constexpr int64_t block_groups = !wide && F == Format::mxfp4 ? 2 : 1;
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
        else return half_scales(head + 2 * first_output);
    }
    // Eight inputs of a pass's outputs, in two quads, where numbers have fewer than eight bits; odd: whether `pair` is.
    template <bool odd>
    static MOESAIC_INLINE void quads(const uint8_t *numbers, int64_t pair, Bytes &first, Bytes &second) {
        const Bytes both = bytes(numbers + pair * 4 * strip_outputs);
        first = low_halves(both), second = high_halves(both);
        if constexpr (F == Format::mxfp4) first = look_up(doubled_e2m1, first), second = look_up(doubled_e2m1, second);
        if constexpr (F == Format::int6) {
            const Bytes upper = bytes(numbers + (group / 8 + pair / 2) * 4 * strip_outputs);
            first = six_bits<2 * odd>(first, upper), second = six_bits<2 * odd + 1>(second, upper);
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
