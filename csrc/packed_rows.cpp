// Rows as packed weights want them: bytes with a scale for every group where weights are whole numbers.
#include "packed_lanes.h"
#include "packed_multiply.h"
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// A group of a row as bytes: x = scale * byte, rounded to the nearest, ties to even; returns their sum. Where a number
// is not finite the scale is not a number, and so is every output.
int32_t round_group(const float *x, int64_t size, int64_t group, int8_t *values, float *scale) {
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
    int32_t total = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i totals = _mm256_setzero_si256();
#endif
    const auto put_bytes = [&](int64_t i, Vec scaled, int64_t n) {
#if defined(__AVX512F__)
        const __mmask16 there = first(n) & _mm512_cmp_ps_mask(scaled.v, scaled.v, _CMP_ORD_Q);
        const __m512i whole = _mm512_maskz_cvtps_epi32(there, clamp(scaled, -127.0f, 127.0f).v);
        _mm512_mask_cvtepi32_storeu_epi8(values + i, first(n), whole);
        total += _mm512_reduce_add_epi32(whole);
#elif defined(__AVX2__)
        const __m256i there = _mm256_castps_si256(_mm256_cmp_ps(scaled.v, scaled.v, _CMP_ORD_Q));
        const __m256i whole = _mm256_and_si256(there, _mm256_cvtps_epi32(clamp(scaled, -127.0f, 127.0f).v));
        totals = _mm256_add_epi32(totals, whole);
        const __m128i of_16_bits = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        const int64_t eight = _mm_cvtsi128_si64(_mm_packs_epi16(of_16_bits, of_16_bits));
        std::memcpy(values + i, &eight, static_cast<size_t>(n));
#else
        store(lanes, clamp(round(scaled), -127.0f, 127.0f));
        for (int64_t lane = 0; lane < n; ++lane) {
            const int32_t whole = lanes[lane] == lanes[lane] ? static_cast<int32_t>(lanes[lane]) : 0;
            values[i + lane] = static_cast<int8_t>(whole);
            total += whole;
        }
#endif
    };
    along(
        size, [&](int64_t i) { put_bytes(i, load(x + i) * inverse, Vec::lanes); },
        [&](int64_t i, int64_t n) { put_bytes(i, load(x + i, n) * inverse, n); });
#if defined(__AVX2__) && !defined(__AVX512F__)
    alignas(32) int32_t of_lanes[Vec::lanes];
    _mm256_store_si256(reinterpret_cast<__m256i *>(of_lanes), totals);
    for (int32_t each : of_lanes) total += each;
#endif
    for (int64_t i = size; i < group; ++i) values[i] = 0;
    return total;
}

template <class T>
void convert(const float *x, int64_t size, int64_t padded, T *y) {
    along(
        size, [=](int64_t i) { store(y + i, load(x + i)); },
        [=](int64_t i, int64_t n) { store(y + i, load(x + i, n), n); });
    for (int64_t i = size; i < padded; ++i) put(y + i, 0.0f);
}

}  // namespace

void prepare_inputs(const float *x, int64_t first, int64_t end, const PackedShape &shape, const PackedRows &rows,
                    int64_t row) {
    const int64_t stride = shape.row_stride(), group = shape.row_group();
    const int64_t padded_end = end == shape.inputs ? shape.row_inputs() : end, at = row * stride + first;
    const int64_t size = end - first, padded = padded_end - first;
    if (shape.format == Format::f32) return convert(x, size, padded, static_cast<float *>(rows.values) + at);
    if (group == 0) return convert(x, size, padded, static_cast<bf16 *>(rows.values) + at);
    int8_t *values = static_cast<int8_t *>(rows.values) + at;
    for (int64_t i = first; i < padded_end; i += group, x += group, values += group) {
        const int64_t left = end - i, of_row = i / group * rows.groups_apart + row;
        const int32_t total =
            round_group(x, left < 0 ? 0 : left < group ? left : group, group, values, rows.scales + of_row);
        rows.starts[of_row] = -offset_of(shape.format) * total;
        if (shape.format == Format::mxfp4) rows.scales[of_row] *= 0.5f;  // what the kernels look up is twice the codes
        if (shape.format == Format::uneven4) rows.scales[of_row] *= uneven_unit;
    }
}

void prepare_rows(const float *x, int64_t x_stride, const PackedShape &shape, const PackedRows &rows, int threads) {
    parallel_for(rows.rows, 4, threads_for(rows.rows * shape.inputs, 1 << 14, threads),
                 [&](int64_t row) { prepare_inputs(x + row * x_stride, 0, shape.inputs, shape, rows, row); });
}

}  // namespace moesaic::MOESAIC_ISA
