// A strip of fp32, bf16 or e4m3 weights times rows, on vectors (but for fp32 on tiles where there are any). Many rows
// take it in pieces that stay in the first cache, where e4m3 is made bf16 once for all of them.
#include "packed_multiply.h"
#include "packed_numbers.h"
#include "packed_tiles.h"
#include "tiles_of_rows.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int strip_vectors = strip_outputs / Vec::lanes;
constexpr int together = strip_vectors < 2 ? strip_vectors : 2;  // vectors of outputs whose sums are held at once
constexpr int64_t piece = 128;                                   // inputs; what e4m3 has a scale for
// Rows whose sums of all outputs the registers hold, where they do not hold those of a tile (AVX2).
constexpr int most_streamed_rows = strip_vectors == 2 * together ? 2 : 0;

// Sums of R rows for `width` vectors of outputs, from where they are kept or zero.
template <int R, int width = together>
struct Sums {
    Vec v[R][width];

    MOESAIC_INLINE void begin(const float *from) {
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < width; ++i)
                v[r][i] = from ? load(from + r * strip_outputs + i * Vec::lanes) : set(0.0f);
    }
    MOESAIC_INLINE void add(const Vec (&w)[width], int r, Vec x) {
        for (int i = 0; i < width; ++i) v[r][i] = fma(w[i], x, v[r][i]);
    }
    MOESAIC_INLINE void keep(float *to) const {
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < width; ++i) store(to + r * strip_outputs + i * Vec::lanes, v[r][i]);
    }
};

// reads_memory: not for later rows and outputs, which find the strip in the cache.
template <int R>
MOESAIC_INLINE void add_floats(Sums<R> &sums, const float *w, int64_t inputs, const float *x, int64_t stride,
                               bool reads_memory) {
    for (int64_t k = 0; k < inputs; ++k, w += strip_outputs) {
        if (reads_memory) fetch_ahead(reinterpret_cast<const uint8_t *>(w), 4 * strip_outputs);
        Vec ws[together];
        for (int i = 0; i < together; ++i) ws[i] = load(w + i * Vec::lanes);
        for (int r = 0; r < R; ++r) sums.add(ws, r, set(x[r * stride + k]));
    }
}

void floats_times_rows(const float *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    const int64_t inputs = shape.inputs, stride = shape.row_stride();
    const int64_t step = rows.rows > row_tile || together < strip_vectors ? piece : inputs;
    for (int64_t k = 0; k < inputs; k += step)
        over_tiles(rows.rows, [&](int64_t row, auto count) {
            const float *x = static_cast<const float *>(rows.values) + row * stride + k;
            for (int64_t first = 0; first < strip_outputs; first += together * Vec::lanes) {
                float *kept = sums + row * strip_outputs + first;
                Sums<decltype(count)::value> total;
                total.begin(k ? kept : nullptr);
                add_floats(total, strip + k * strip_outputs + first, inputs - k < step ? inputs - k : step, x, stride,
                           row == 0 && first == 0);
                total.keep(kept);
            }
        });
}

#if !defined(MOESAIC_HAS_TILES)
#if !defined(__AVX512BF16__)
// Pairs of bf16 as floats: the first of each, and the second.
MOESAIC_INLINE void split_pairs(const uint8_t *pairs, Vec &even, Vec &odd) {
#if defined(__AVX512F__)
    const __m512i both = _mm512_loadu_si512(pairs);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
#elif defined(__AVX2__)
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pairs));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
#else
    float low[Vec::lanes], high[Vec::lanes];
    for (int o = 0; o < Vec::lanes; ++o) {
        bf16 two[2];
        std::memcpy(two, pairs + 4 * o, 4);
        low[o] = to_float(two[0]);
        high[o] = to_float(two[1]);
    }
    even = load(low);
    odd = load(high);
#endif
}
#endif

template <int R, int width>
MOESAIC_INLINE void add_bf16(Sums<R, width> &sums, const uint8_t *pairs, int64_t inputs, const bf16 *x,
                             int64_t stride, bool reads_memory) {
    for (int64_t k = 0; k < inputs; k += 2, pairs += 4 * strip_outputs) {
        if (reads_memory) fetch_ahead(pairs, 4 * strip_outputs);
#if defined(__AVX512BF16__)
        for (int i = 0; i < width; ++i) {
            const __m512bh w = (__m512bh)_mm512_loadu_si512(pairs + 64 * i);
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, x + r * stride + k, 4);
                sums.v[r][i].v = _mm512_dpbf16_ps(sums.v[r][i].v, w, (__m512bh)_mm512_set1_epi32(two));
            }
        }
#else
        Vec even[width], odd[width];
        for (int i = 0; i < width; ++i) split_pairs(pairs + 4 * i * Vec::lanes, even[i], odd[i]);
        for (int r = 0; r < R; ++r) {
            sums.add(even, r, set(to_float(x[r * stride + k])));
            sums.add(odd, r, set(to_float(x[r * stride + k + 1])));
        }
#endif
    }
}

// All of a strip's outputs at once, so that weights stream.
template <int R>
void stream_bf16(const uint8_t *strip, const PackedShape &shape, const bf16 *x, float *sums) {
    Sums<R, strip_vectors> total;
    total.begin(nullptr);
    add_bf16(total, strip, shape.padded_inputs(), x, shape.row_stride(), true);
    total.keep(sums);
}

void bf16_times_rows(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    if (rows.rows <= most_streamed_rows)
        return with_count<2>(rows.rows, [&](auto count) {
            stream_bf16<decltype(count)::value>(strip, shape, static_cast<const bf16 *>(rows.values), sums);
        });
    const int64_t inputs = shape.padded_inputs(), stride = shape.row_stride();
    const int64_t step = rows.rows > row_tile || together < strip_vectors ? 2 * piece : inputs;
    for (int64_t k = 0; k < inputs; k += step)
        over_tiles(rows.rows, [&](int64_t row, auto count) {
            const bf16 *x = static_cast<const bf16 *>(rows.values) + row * stride + k;
            for (int64_t first = 0; first < strip_outputs; first += together * Vec::lanes) {
                float *kept = sums + row * strip_outputs + first;
                Sums<decltype(count)::value> total;
                total.begin(k ? kept : nullptr);
                add_bf16(total, strip + 2 * k * strip_outputs + 4 * first, inputs - k < step ? inputs - k : step, x,
                         stride, most_streamed_rows > 0 && row == 0 && first == 0);
                total.keep(kept);
            }
        });
}

void fp8_times_rows(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    const int64_t stride = shape.row_stride();
    uint8_t *pairs = static_cast<uint8_t *>(scratch(wide_slot, piece * 2 * strip_outputs));
    for (int64_t k = 0; k < shape.padded_inputs(); k += piece, strip += shape.block_bytes()) {
        bf16_of_block(strip, pairs);
        over_tiles(rows.rows, [&](int64_t row, auto count) {
            constexpr int R = decltype(count)::value;
            const bf16 *x = static_cast<const bf16 *>(rows.values) + row * stride + k;
            for (int64_t first = 0; first < strip_outputs; first += together * Vec::lanes) {
                float *kept = sums + row * strip_outputs + first;
                Sums<R> of_block, total;
                of_block.begin(nullptr);
                add_bf16(of_block, pairs + 4 * first, piece, x, stride, false);
                total.begin(k ? kept : nullptr);
                for (int i = 0; i < together; ++i) {
                    const Vec scale = load(reinterpret_cast<const float *>(strip) + first + i * Vec::lanes);
                    for (int r = 0; r < R; ++r) total.v[r][i] = fma(of_block.v[r][i], scale, total.v[r][i]);
                }
                total.keep(kept);
            }
        });
    }
}
#endif

}  // namespace

void multiply_strip_of_floats(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    if (shape.format == Format::f32) {
        floats_times_rows(reinterpret_cast<const float *>(strip), shape, rows, sums);
        return;
    }
#if defined(MOESAIC_HAS_TILES)
    if (shape.format == Format::fp8) tiles_of_fp8(strip, shape, rows, sums);
    else tiles_of_bf16(strip, shape, rows, sums);
#else
    if (shape.format == Format::fp8) fp8_times_rows(strip, shape, rows, sums);
    else bf16_times_rows(strip, shape, rows, sums);
#endif
}

}  // namespace moesaic::MOESAIC_ISA
