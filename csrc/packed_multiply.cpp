// Rows times packed weights (see packed.h), a strip of outputs at a time; rows are rounded to eight bits where weights
// are whole numbers.
//
// The bits of an output depend on its row and its weights alone: sums run along the inputs from the left, in whole
// numbers within a group and in fp32 over groups, however many rows share the call.
#include "packed_lanes.h"
#include "parallel.h"
#include "scratch.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

[[maybe_unused]] float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // from a bias of 15 to one of 127; exact, also below the normal numbers
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

Floats half_scales(const uint8_t *p) {
    Floats scales;
#if defined(__AVX512F__)
    for (int i = 0; i < vectors; ++i)
        scales.v[i] = {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p) + i))};
#else
    float values[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) {
        uint16_t half;
        std::memcpy(&half, p + 2 * o, 2);
        values[o] = half_to_float(half);
    }
    for (int i = 0; i < vectors; ++i) scales.v[i] = load(values + i * Vec::lanes);
#endif
    return scales;
}

// 2^(exponent - 127), halved: the codes stand for twice their value.
Floats exponent_scales(const uint8_t *p) {
    float values[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) {
        const uint32_t bits = p[o] >= 2 ? static_cast<uint32_t>(p[o] - 1) << 23 : 0x200000u << p[o];
        std::memcpy(&values[o], &bits, 4);
    }
    Floats scales;
    for (int i = 0; i < vectors; ++i) scales.v[i] = load(values + i * Vec::lanes);
    return scales;
}

// Twice the values of the 16 codes of e2m1, plus 12.
alignas(16) constexpr uint8_t doubled_e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Sums of R rows over `quads` times four inputs of eight bits.
template <int R>
MOESAIC_INLINE void eights(Ints (&sums)[R], const uint8_t *weights, const int8_t *x, int64_t stride, int64_t quads) {
    for (int64_t quad = 0; quad < quads; ++quad) {
        const Bytes w = bytes(weights + quad * 4 * strip_outputs);
        for (int r = 0; r < R; ++r) add_dot<true>(sums[r], w, x + r * stride + 4 * quad);
    }
}

// The same of four bits, which `decode` makes unsigned bytes.
template <int R, class Decode>
MOESAIC_INLINE void fours(Ints (&sums)[R], const uint8_t *weights, const int8_t *x, int64_t stride, int64_t pairs,
                  const Decode &decode) {
    for (int64_t pair = 0; pair < pairs; ++pair, x += 8) {
        const Bytes both = bytes(weights + pair * 4 * strip_outputs);
        const Bytes low = decode(low_halves(both)), high = decode(high_halves(both));
        for (int r = 0; r < R; ++r) add_dot<false>(sums[r], low, x + r * stride);
        for (int r = 0; r < R; ++r) add_dot<false>(sums[r], high, x + r * stride + 4);
    }
}

template <int R, Format F, int64_t group>
void strip_of_ints(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
                   Floats (&result)[R]) {
    constexpr int offset = F == Format::int8 ? (signed_has_offset ? 128 : 0) : F == Format::int4 ? 8 : 12;
    const int64_t stride = shape.padded_inputs(), groups = stride / group;
    const int64_t per_block = shape.block() / group;  // groups
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zeros();
    const int8_t *x = static_cast<const int8_t *>(rows.values) + row0 * stride;
    const float *row_scales = rows.scales + row0 * groups;
    const int32_t *row_sums = rows.sums + row0 * groups;
    for (int64_t g = 0; g < groups; ++g, x += group) {
        const int64_t within = g % per_block;
        const uint8_t *block = strip + (g / per_block) * shape.block_bytes();
        Ints sums[R];
        for (int r = 0; r < R; ++r) sums[r] = ints(-offset * row_sums[r * groups + g]);
        Floats scales;
        if constexpr (F == Format::int8) {
            scales = half_scales(block);
            eights<R>(sums, block + 64, x, stride, group / 4);
        } else if constexpr (F == Format::int4) {
            scales = half_scales(block);
            fours<R>(sums, block + 64, x, stride, group / 8, [](const Bytes &b) { return b; });
        } else {
            scales = exponent_scales(block + within * strip_outputs);
            fours<R>(sums, block + 64 + within * 16 * strip_outputs, x, stride, group / 8,
                     [](const Bytes &b) { return look_up(doubled_e2m1, b); });
        }
        for (int r = 0; r < R; ++r) add_scaled(total[r], sums[r], scales, row_scales[r * groups + g]);
    }
    for (int r = 0; r < R; ++r) result[r] = total[r];
}

template <int R, Format F>
void strip_of_groups(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
                     Floats (&result)[R]) {
    switch (shape.group) {
        case 32: return strip_of_ints<R, F, 32>(strip, shape, rows, row0, result);
        case 64: return strip_of_ints<R, F, 64>(strip, shape, rows, row0, result);
        default: return strip_of_ints<R, F, 128>(strip, shape, rows, row0, result);
    }
}

template <int R>
void strip_of_floats(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
                     Floats (&result)[R]) {
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zeros();
    const int64_t stride = shape.padded_inputs();
    const float *x = static_cast<const float *>(rows.values) + row0 * stride;
    for (int64_t k = 0; k < stride; ++k) {
        const float *w = reinterpret_cast<const float *>(strip) + k * strip_outputs;
        for (int i = 0; i < vectors; ++i) {
            const Vec each = load(w + i * Vec::lanes);
            for (int r = 0; r < R; ++r) total[r].v[i] = fma(each, set(x[r * stride + k]), total[r].v[i]);
        }
    }
    for (int r = 0; r < R; ++r) result[r] = total[r];
}

template <int R>
void strip_of_bf16(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
                   Floats (&result)[R]) {
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zeros();
    const int64_t stride = shape.padded_inputs();
    const bf16 *x = static_cast<const bf16 *>(rows.values) + row0 * stride;
    for (int64_t k = 0; k < stride; k += 2) {
        const uint8_t *pairs = strip + k * 2 * strip_outputs;
#if defined(__AVX512BF16__)
        for (int i = 0; i < vectors; ++i) {
            const __m512i w = _mm512_loadu_si512(pairs + 64 * i);
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, x + r * stride + k, 4);
                total[r].v[i].v = _mm512_dpbf16_ps(total[r].v[i].v, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
            }
        }
#else
        float even[strip_outputs], odd[strip_outputs];
        for (int o = 0; o < strip_outputs; ++o) {
            uint32_t both;
            std::memcpy(&both, pairs + 4 * o, 4);
            const uint32_t low = both << 16, high = both & 0xffff0000u;
            std::memcpy(&even[o], &low, 4);
            std::memcpy(&odd[o], &high, 4);
        }
        for (int r = 0; r < R; ++r) {
            const Vec first = set(to_float(x[r * stride + k])), second = set(to_float(x[r * stride + k + 1]));
            for (int i = 0; i < vectors; ++i) {
                total[r].v[i] = fma(load(even + i * Vec::lanes), first, total[r].v[i]);
                total[r].v[i] = fma(load(odd + i * Vec::lanes), second, total[r].v[i]);
            }
        }
#endif
    }
    for (int r = 0; r < R; ++r) result[r] = total[r];
}

// e4m3 has the exponent of a half float less 8: exact, also below the normal numbers.
MOESAIC_INLINE Floats e4m3_over_256(const uint8_t *p) {
    Floats w;
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x80)), 8);
    const __m512i half = _mm512_or_si512(sign, _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)), 7));
    w.v[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(half))};
    w.v[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
#else
    float values[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o)
        values[o] = half_to_float(static_cast<uint16_t>((p[o] & 0x80) << 8 | (p[o] & 0x7f) << 7));
    for (int i = 0; i < vectors; ++i) w.v[i] = load(values + i * Vec::lanes);
#endif
    return w;
}

template <int R>
void strip_of_fp8(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
                  Floats (&result)[R]) {
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zeros();
    const int64_t stride = shape.padded_inputs();
    const float *x = static_cast<const float *>(rows.values) + row0 * stride;
    for (int64_t b = 0; b < shape.blocks(); ++b, strip += shape.block_bytes(), x += shape.block()) {
        Floats sums[R];
        for (int r = 0; r < R; ++r) sums[r] = zeros();
        for (int64_t k = 0; k < shape.block(); ++k) {
            const Floats w = e4m3_over_256(strip + 64 + k * strip_outputs);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < vectors; ++i) sums[r].v[i] = fma(w.v[i], set(x[r * stride + k]), sums[r].v[i]);
        }
        float scales[2];
        std::memcpy(scales, strip, sizeof scales);
        for (int i = 0; i < vectors; ++i) {
            const Vec scale = set(256.0f * scales[2 * i / vectors]);
            for (int r = 0; r < R; ++r) total[r].v[i] = fma(sums[r].v[i], scale, total[r].v[i]);
        }
    }
    for (int r = 0; r < R; ++r) result[r] = total[r];
}

template <int R>
void strip_of(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, int64_t row0,
              Floats (&total)[R]) {
    switch (shape.format) {
        case Format::f32: return strip_of_floats<R>(strip, shape, rows, row0, total);
        case Format::b16: return strip_of_bf16<R>(strip, shape, rows, row0, total);
        case Format::fp8: return strip_of_fp8<R>(strip, shape, rows, row0, total);
        case Format::int8: return strip_of_groups<R, Format::int8>(strip, shape, rows, row0, total);
        case Format::int4: return strip_of_groups<R, Format::int4>(strip, shape, rows, row0, total);
        case Format::mxfp4: return strip_of_ints<R, Format::mxfp4, 32>(strip, shape, rows, row0, total);
    }
}

// Vectors from the `first` on to a row of outputs, of which `left` are left.
template <int count>
inline void put_lanes(const Floats &total, int first, float *y, int64_t left) {
    for (int i = 0; i < count; ++i, y += Vec::lanes, left -= Vec::lanes) {
        if (left >= Vec::lanes) store(y, total.v[first + i]);
        else if (left > 0) store(y, total.v[first + i], left);
    }
}

template <int R>
void strip_to(const uint8_t *strip, int64_t index, const PackedShape &shape, const PackedRows &rows, int64_t row0,
              float *y) {
    Floats total[R];
    strip_of<R>(strip, shape, rows, row0, total);
    for (int r = 0; r < R; ++r) {
        float *row = y + (row0 + r) * shape.outputs;
        if (shape.paired) {
            constexpr int64_t half = strip_outputs / 2;
            const int64_t inner = shape.outputs / 2, at = index * half;
            put_lanes<vectors / 2>(total[r], 0, row + at, inner - at);
            put_lanes<vectors / 2>(total[r], vectors / 2, row + inner + at, inner - at);
        } else {
            put_lanes<vectors>(total[r], 0, row + index * strip_outputs, shape.outputs - index * strip_outputs);
        }
    }
}

template <int R>
void remaining_rows(const uint8_t *strip, int64_t index, const PackedShape &shape, const PackedRows &rows,
                    int64_t row0, float *y) {
    if constexpr (R > 0) {
        if (rows.rows - row0 == R) strip_to<R>(strip, index, shape, rows, row0, y);
        else remaining_rows<R - 1>(strip, index, shape, rows, row0, y);
    }
}

void strip_of_rows(const uint8_t *strip, int64_t index, const PackedShape &shape, const PackedRows &rows, float *y) {
    int64_t row = 0;
    for (; row + row_tile <= rows.rows; row += row_tile) strip_to<row_tile>(strip, index, shape, rows, row, y);
    remaining_rows<row_tile - 1>(strip, index, shape, rows, row, y);
}

// A group of a row as bytes: x = scale * byte, rounded to the nearest, ties to even. Where a number is not finite the
// scale is not a number, and so is every output.
void round_group(const float *x, int64_t size, int64_t group, int8_t *values, float *scale, int32_t *sum_of_values) {
    Vec largest = set(0.0f), poison = set(0.0f);  // what is not a number is lost in a maximum, and not in a sum
    const auto look = [&](Vec v) {
        largest = max(largest, max(v, set(0.0f) - v));
        poison = fma(v, set(0.0f), poison);
    };
    along(size, [&](int64_t i) { look(load(x + i)); }, [&](int64_t i, int64_t n) { look(load(x + i, n)); });
    float lanes[Vec::lanes], most = 0.0f;
    store(lanes, largest);
    for (float each : lanes) most = each > most ? each : most;
    *scale = most / 127.0f + sum(poison);
    const Vec inverse = set(most > 0.0f ? 127.0f / most : 0.0f);
    *sum_of_values = 0;
    const auto put_bytes = [&](int64_t i, Vec scaled, int64_t n) {
#if defined(__AVX512F__)
        const __mmask16 there = first(n) & _mm512_cmp_ps_mask(scaled.v, scaled.v, _CMP_ORD_Q);
        const __m512i whole = _mm512_maskz_cvtps_epi32(there, clamp(scaled, -127.0f, 127.0f).v);
        _mm512_mask_cvtepi32_storeu_epi8(values + i, first(n), whole);
        *sum_of_values += _mm512_reduce_add_epi32(whole);
#else
        store(lanes, clamp(round(scaled), -127.0f, 127.0f));
        for (int64_t lane = 0; lane < n; ++lane) {
            const int32_t whole = lanes[lane] == lanes[lane] ? static_cast<int32_t>(lanes[lane]) : 0;
            values[i + lane] = static_cast<int8_t>(whole);
            *sum_of_values += whole;
        }
#endif
    };
    along(
        size, [&](int64_t i) { put_bytes(i, load(x + i) * inverse, Vec::lanes); },
        [&](int64_t i, int64_t n) { put_bytes(i, load(x + i, n) * inverse, n); });
    for (int64_t i = size; i < group; ++i) values[i] = 0;
}

// One row as the format wants it, zeros behind it.
void prepare_row(const float *x, const PackedShape &shape, const PackedRows &rows, int64_t row) {
    const int64_t stride = shape.padded_inputs(), group = shape.row_group();
    if (group == 0) {
        for (int64_t i = 0; i < stride; ++i) {
            const float each = i < shape.inputs ? x[i] : 0.0f;
            if (shape.format == Format::b16) put(static_cast<bf16 *>(rows.values) + row * stride + i, each);
            else static_cast<float *>(rows.values)[row * stride + i] = each;
        }
        return;
    }
    const int64_t groups = stride / group;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t left = shape.inputs - g * group;
        round_group(x + g * group, left < 0 ? 0 : left < group ? left : group, group,
                    static_cast<int8_t *>(rows.values) + row * stride + g * group, rows.scales + row * groups + g,
                    rows.sums + row * groups + g);
    }
}

// The part of prepared rows that begins with `row`.
PackedRows rows_from(const PackedRows &rows, int64_t row, int64_t count, const PackedShape &shape) {
    const int64_t stride = shape.padded_inputs(), groups = shape.row_group() ? stride / shape.row_group() : 0;
    const int64_t bytes = stride * (groups ? 1 : shape.format == Format::b16 ? 2 : 4);
    return {count, static_cast<uint8_t *>(rows.values) + row * bytes, rows.scales + row * groups,
            rows.sums + row * groups};
}

constexpr int values_slot = 9, scales_slot = 10, sums_slot = 11, busy_slot = 12;

PackedRows rows_in_scratch(int64_t count, const PackedShape &shape) {
    const int64_t stride = shape.padded_inputs(), groups = shape.row_group() ? stride / shape.row_group() : 0;
    return {count, scratch(values_slot, count * stride * 4), static_cast<float *>(scratch(scales_slot, count * groups * 4)),
            static_cast<int32_t *>(scratch(sums_slot, count * groups * 4))};
}

// As much of a strip's weights as one thread takes at a time: long enough to be read in one go, short enough that no
// thread is left with much when the others are done.
constexpr int64_t chunk_bytes = 1 << 16;

}  // namespace

void packed_linear(const float *x, const uint8_t *weights, float *y, const PackedShape &shape, const int64_t *offsets,
                   int64_t num_experts, int threads) {
    const int64_t strips = shape.strips(), strip_bytes = shape.strip_bytes();
    const PackedRows rows = rows_in_scratch(offsets[num_experts], shape);
    parallel_for(rows.rows, 4, threads_for(rows.rows * shape.inputs, 1 << 14, threads),
                 [&](int64_t row) { prepare_row(x + row * shape.inputs, shape, rows, row); });
    // Experts without rows are passed over here, not by the threads.
    int64_t *busy = static_cast<int64_t *>(scratch(busy_slot, num_experts * 8)), num_busy = 0;
    for (int64_t e = 0; e < num_experts; ++e)
        if (offsets[e + 1] > offsets[e]) busy[num_busy++] = e;
    const int64_t work = num_busy * shape.bytes() + rows.rows * strips * shape.padded_inputs();
    const int64_t chunk = strip_bytes < chunk_bytes ? chunk_bytes / (strip_bytes + 1) + 1 : 1;
    parallel_for(num_busy * strips, chunk, threads_for(work, 1 << 15, threads), [&](int64_t item) {
        const int64_t expert = busy[item / strips], strip = item % strips, row = offsets[expert];
        strip_of_rows(weights + expert * shape.bytes() + strip * strip_bytes, strip, shape,
                      rows_from(rows, row, offsets[expert + 1] - row, shape), y + row * shape.outputs);
    });
}

}  // namespace moesaic::MOESAIC_ISA
