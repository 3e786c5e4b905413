// Blocks of columns rounded to sixteen uneven values times a scale: step for step the arithmetic of
// src/moesaic/kernels/uneven.py, whose bits it has. Needs -ffp-contract=off.
#pragma once

#include "round_columns.h"
#include "uneven.h"

namespace moesaic::MOESAIC_ISA {

// Of one group of each output, signs at 16.
using UnevenBits = int32_t[strip_outputs];

inline int32_t between(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

inline float uneven_scale(int32_t exponent, int32_t bits) {
    const float lifted = float_of((static_cast<uint32_t>(8 * exponent + (bits & 15)) << 20) + uneven_lifted);
    return (bits & 16 ? -lifted : lifted) * uneven_unit;
}

// The code of the nearest value, counted from the least, or that value with its offset: a sum over all that lie below.
enum class Nearest { code, value };
template <Nearest nearest>
inline void find_nearest(const float *x, const float *halves, int8_t *found) {
    float at[strip_outputs];
    int32_t whole[strip_outputs];
    int8_t place[strip_outputs], sum[strip_outputs] = {};
    for (int64_t o = 0; o < strip_outputs; o += Vec::lanes)
        store(at + o, clamp(load(x + o) * load(halves + o) + set(2.0f * uneven_offset), 0.0f, 127.0f));
    for (int o = 0; o < strip_outputs; ++o) whole[o] = static_cast<int32_t>(at[o]);
    for (int o = 0; o < strip_outputs; ++o) place[o] = static_cast<int8_t>(whole[o]);
#pragma GCC unroll 15
    for (int k = 0; k < 15; ++k) {
        const int value = uneven_values[k ^ 8], next = uneven_values[(k + 1) ^ 8];
        const int8_t threshold = static_cast<int8_t>(value + next - 1);
        const int8_t gap = static_cast<int8_t>(nearest == Nearest::value ? next - value : 1);
        for (int o = 0; o < strip_outputs; ++o)
            sum[o] = static_cast<int8_t>(sum[o] + (place[o] > threshold ? gap : 0));
    }
    std::memcpy(found, sum, sizeof sum);
}

struct UnevenScales {
    float scale[strip_outputs], halves[strip_outputs];  // 2 / scale
};

inline void set_scales(UnevenScales &scales, const int32_t *exponents, const UnevenBits &bits) {
    for (int o = 0; o < strip_outputs; ++o) scales.scale[o] = uneven_scale(exponents[o], bits[o]);
    for (int o = 0; o < strip_outputs; ++o) scales.halves[o] = 2.0f / scales.scale[o];
}

inline void uneven_error(const Columns *x, const UnevenScales &scales, float *error) {
    Vec sums[8][strip_outputs / Vec::lanes];
    for (int64_t i = 0; i < uneven_group; ++i) {
        int8_t value[strip_outputs];
        find_nearest<Nearest::value>(x[i], scales.halves, value);
        float nearest[strip_outputs];
        for (int o = 0; o < strip_outputs; ++o) nearest[o] = static_cast<float>(value[o] - uneven_offset);
        for (int64_t v = 0; v < strip_outputs / Vec::lanes; ++v) {
            const int64_t o = v * Vec::lanes;
            const Vec off = load(nearest + o) * load(scales.scale + o) - load(x[i] + o);
            sums[i % 8][v] = i < 8 ? off * off : sums[i % 8][v] + off * off;
        }
    }
    for (int64_t v = 0; v < strip_outputs / Vec::lanes; ++v) {
        const Vec even = (sums[0][v] + sums[4][v]) + (sums[2][v] + sums[6][v]);
        const Vec odd = (sums[1][v] + sums[5][v]) + (sums[3][v] + sums[7][v]);
        store(error + v * Vec::lanes, even + odd);
    }
}

// The bits of the scale with the least squared error, among a few beside `nearest` and both signs.
inline void best_uneven_bits(const Columns *x, const int32_t *exponents, const UnevenBits &nearest, const float *most,
                             UnevenBits &best) {
    float least[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) least[o] = __builtin_inff();
    for (int other_sign = 0; other_sign < 2; ++other_sign)
        for (int step = -1; step <= 2; ++step) {
            UnevenBits tried;
            UnevenScales scales;
            float error[strip_outputs];
            for (int o = 0; o < strip_outputs; ++o) {
                const bool is_negative = (most[o] > 0.0f) != (other_sign != 0);
                tried[o] = between(nearest[o] + step, 0, 15) | (is_negative ? 16 : 0);
            }
            set_scales(scales, exponents, tried);
            uneven_error(x, scales, error);
            for (int o = 0; o < strip_outputs; ++o) {
                const bool is_less = error[o] < least[o];
                best[o] = is_less ? tried[o] : best[o];
                least[o] = is_less ? error[o] : least[o];
            }
        }
}

// Whether all of a block's numbers are finite; those of other blocks become 0.
inline void keep_finite(Columns *x, bool *is_finite) {
    float sums[strip_outputs] = {};
    for (int64_t i = 0; i < uneven_block; ++i)
        for (int o = 0; o < strip_outputs; ++o) sums[o] += x[i][o] * 0.0f;
    bool all = true;
    for (int o = 0; o < strip_outputs; ++o) all = (is_finite[o] = sums[o] == 0.0f) && all;
    if (all) return;
    for (int64_t i = 0; i < uneven_block; ++i)
        for (int o = 0; o < strip_outputs; ++o) x[i][o] = is_finite[o] ? x[i][o] : 0.0f;
}

// A block's words, and its codes [32][strip_outputs]. x: changed where it is not finite.
inline void round_uneven(Columns *x, uint16_t *words, int32_t (*codes)[strip_outputs]) {
    constexpr float margin = 1.25f;
    bool is_finite[strip_outputs];
    keep_finite(x, is_finite);
    float most[2][strip_outputs], whole[2][strip_outputs];
    int32_t exponents[strip_outputs];
    for (int group = 0; group < 2; ++group) {
        largest(x + group * uneven_group, uneven_group, most[group]);
        for (int o = 0; o < strip_outputs; ++o)
            whole[group][o] = float_of(bits_of(most[group][o]) & 0x7fffffffu) / static_cast<float>(uneven_offset);
    }
    for (int o = 0; o < strip_outputs; ++o) {
        const float larger = whole[0][o] > whole[1][o] ? whole[0][o] : whole[1][o];
        exponents[o] = between(static_cast<int32_t>(bits_of(larger * margin) >> 23) - 127 + 26, 0, 61);
    }
    UnevenBits best[2];
    for (int group = 0; group < 2; ++group) {
        UnevenBits nearest;
        for (int o = 0; o < strip_outputs; ++o) {
            const float down = float_of(static_cast<uint32_t>(127 + 27 - exponents[o]) << 23);
            const int32_t eighths = static_cast<int32_t>((bits_of(whole[group][o] * down) + (1u << 19)) >> 20);
            nearest[o] = between(eighths - (127 << 3), 0, 15);
        }
        const Columns *own = x + group * uneven_group;
        best_uneven_bits(own, exponents, nearest, most[group], best[group]);
        UnevenScales scales;
        set_scales(scales, exponents, best[group]);
        for (int64_t i = 0; i < uneven_group; ++i) {
            int32_t *code = codes[group * uneven_group + i];
            int8_t rank[strip_outputs];
            find_nearest<Nearest::code>(own[i], scales.halves, rank);
            for (int o = 0; o < strip_outputs; ++o) code[o] = rank[o] ^ 8;
        }
    }
    for (int o = 0; o < strip_outputs; ++o) {
        const int32_t word = exponents[o] << 10 | best[1][o] << 5 | best[0][o];
        words[o] = static_cast<uint16_t>(is_finite[o] ? static_cast<uint32_t>(word) : uneven_none);
    }
}

}  // namespace moesaic::MOESAIC_ISA
