// Columns of a group rounded to whole numbers times a scale: step for step the arithmetic of
// src/moesaic/kernels/rounding.py, whose bits it has. Needs -ffp-contract=off.
#pragma once

#include "pack_columns.h"

namespace moesaic::MOESAIC_ISA {

struct Scales {
    float scale[strip_outputs], inverse[strip_outputs];
};

// To the nearest number of fp16, ties to even; what would become infinite is held at its largest.
inline float in_fp16(float x) {
    x = x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;
    const uint32_t bits = bits_of(x), sign = bits & 0x80000000u;
    const float magnitude = float_of(bits ^ sign);
    // Below normal numbers of fp16 a step is 2^-24, which is that of floats from a half on.
    const uint32_t small = bits_of((magnitude + 0.5f) - 0.5f) | sign;
    const uint32_t normal = (bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu;
    return x != x ? x : float_of(magnitude < 0x1p-14f ? small : normal);
}

// The bits of what `in_fp16` gave.
inline uint16_t half_of(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const float steps = float_of(magnitude < 0x38800000u ? magnitude : 0u) * 0x1p24f;
    const uint32_t small = static_cast<uint32_t>(static_cast<int32_t>(steps));
    const uint32_t normal = x != x ? 0x7e00u : (magnitude >> 13) - (112u << 10);
    return static_cast<uint16_t>(sign | (magnitude < 0x38800000u ? small : normal));
}

// The number of largest magnitude of each output, the first of equals; NaN where there is one.
inline void largest(const Columns *x, int64_t group, float *found) {
    float most[strip_outputs], unordered[strip_outputs] = {};
    for (int o = 0; o < strip_outputs; ++o) most[o] = -1.0f;
    for (int64_t i = 0; i < group; ++i)
        for (int o = 0; o < strip_outputs; ++o) {
            const float value = x[i][o], magnitude = float_of(bits_of(value) & 0x7fffffffu);
            const bool is_more = magnitude > most[o];
            most[o] = is_more ? magnitude : most[o];
            found[o] = is_more ? value : found[o];
            unordered[o] = value != value ? value : unordered[o];
        }
    for (int o = 0; o < strip_outputs; ++o) found[o] = unordered[o] != unordered[o] ? unordered[o] : found[o];
}

inline void set_scale(Scales &scales, int o, float scale) {
    scales.scale[o] = scale;
    scales.inverse[o] = scale == 0.0f ? 0.0f : 1.0f / scale;
}

inline Vec nearest(Vec x, Vec inverse, float low, float high) { return round(clamp(x * inverse, low, high)); }

// Squared errors of a group in four bits: the sums of inputs equal modulo 8, in order, then folded by halves.
inline void squared_error(const Columns *x, int64_t group, const Scales &scales, float *error) {
    for (int64_t o = 0; o < strip_outputs; o += Vec::lanes) {
        const Vec scale = load(scales.scale + o), inverse = load(scales.inverse + o);
        Vec sums[8];
        for (auto &each : sums) each = set(0.0f);
        for (int64_t i = 0; i < group; i += 8)
#pragma GCC unroll 8
            for (int part = 0; part < 8; ++part) {
                const Vec value = load(x[i + part] + o);
                const Vec off = nearest(value, inverse, -8.0f, 7.0f) * scale - value;
                sums[part] = sums[part] + off * off;
            }
        const Vec even = (sums[0] + sums[4]) + (sums[2] + sums[6]), odd = (sums[1] + sums[5]) + (sums[3] + sums[7]);
        store(error + o, even + odd);
    }
}

// The scale with the least squared error, among shares of the one that uses the whole range.
inline void best_of_shares(const Columns *x, int64_t group, Scales &best) {
    constexpr float shares[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.75f, 0.7f};
    float least[strip_outputs], whole[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) least[o] = __builtin_inff();
    for (int o = 0; o < strip_outputs; ++o) whole[o] = best.scale[o];
    for (const float share : shares) {
        Scales tried;
        float error[strip_outputs];
        for (int o = 0; o < strip_outputs; ++o) set_scale(tried, o, in_fp16(whole[o] * share));
        squared_error(x, group, tried, error);
        for (int o = 0; o < strip_outputs; ++o) {
            const bool is_less = error[o] < least[o];
            best.scale[o] = is_less ? tried.scale[o] : best.scale[o];
            best.inverse[o] = is_less ? tried.inverse[o] : best.inverse[o];
            least[o] = is_less ? error[o] : least[o];
        }
    }
}

// The least and the largest number of so many bits; of eight, as many to both sides.
struct Range {
    float low, high;
};
inline Range range_of(int bits) {
    const float end = static_cast<float>(1 << (bits - 1));
    return {bits == 8 ? 1.0f - end : -end, end - 1.0f};
}

inline void find_scales(const Columns *x, int64_t group, int bits, Scales &scales) {
    float most[strip_outputs];
    largest(x, group, most);
    for (int o = 0; o < strip_outputs; ++o) {
        const float magnitude = float_of(bits_of(most[o]) & 0x7fffffffu);
        // A little larger, so that rounding it to fp16 does not put the largest weight out of reach.
        const float over_all = most[o] == 0.0f ? 0.0f : magnitude / 127.0f * (1.0f + 0x1p-11f) + 0x1p-25f;
        set_scale(scales, o, in_fp16(bits == 8 ? over_all : most[o] / range_of(bits).low));
    }
    if (bits == 4) best_of_shares(x, group, scales);
}

// Whole numbers of one input, plus an offset; the offset where there is no number.
inline void whole_numbers(const float *x, const Scales &scales, Range range, int32_t offset, int32_t *out) {
    float values[strip_outputs];
    for (int64_t o = 0; o < strip_outputs; o += Vec::lanes)
        store(values + o, nearest(load(x + o), load(scales.inverse + o), range.low, range.high));
    for (int o = 0; o < strip_outputs; ++o)
        out[o] = (values[o] == values[o] ? static_cast<int32_t>(values[o]) : 0) + offset;
}

}  // namespace moesaic::MOESAIC_ISA
