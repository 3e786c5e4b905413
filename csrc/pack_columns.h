// The 32 rows of a strip, turned: what stands at one place of all rows lies side by side, so that lanes are outputs.
#pragma once

#include "pack.h"
#include "transpose.h"

namespace moesaic::MOESAIC_ISA {

constexpr int square = 16;                    // units of 4 bytes that are turned at once
constexpr int64_t square_bytes = 4 * square;  // of each row

// Rows of a strip; null past the last output, read as zeros.
struct StripRows {
    const uint8_t *row[strip_outputs];
    int64_t bytes;
};

inline const uint8_t *row_of(const RowBlocks &rows, int64_t matrix, int64_t output) {
    const RowBlock *block = rows.blocks;
    for (; output >= block->rows; ++block) output -= block->rows;
    return block->first + (matrix * block->rows + output) * rows.row_bytes;
}

inline StripRows strip_rows(const RowBlocks &rows, const PackedShape &shape, int64_t matrix, int64_t strip) {
    const int64_t parts = shape.paired ? 2 : 1, width = strip_outputs / parts, outputs = shape.outputs / parts;
    StripRows found{{}, rows.row_bytes};
    for (int64_t lane = 0; lane < strip_outputs; ++lane) {
        const int64_t output = strip * width + lane % width;
        if (output < outputs) found.row[lane] = row_of(rows, matrix, lane / width * outputs + output);
    }
    return found;
}

// A square of units from each row to out [square][32].
inline void turn_square(const uint8_t *const *rows, uint8_t *out) {
#if defined(__AVX512F__)
    for (int half = 0; half < 2; ++half) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[16 * half + i]);
        transpose(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + 128 * i + 64 * half, r[i]);
    }
#elif defined(__AVX2__)
    for (int quarter = 0; quarter < 4; ++quarter)
        for (int first = 0; first < square; first += 8) {
            Vec r[8];
            for (int i = 0; i < 8; ++i)
                r[i].v = _mm256_castsi256_ps(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows[8 * quarter + i] + 4 * first)));
            transpose(r);
            for (int i = 0; i < 8; ++i)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 128 * (first + i) + 32 * quarter),
                                    _mm256_castps_si256(r[i].v));
        }
#else
    for (int lane = 0; lane < strip_outputs; ++lane)
        for (int i = 0; i < square; ++i) std::memcpy(out + 128 * i + 4 * lane, rows[lane] + 4 * i, 4);
#endif
}

// Units [start / 4, start / 4 + units) of all rows to out [units][32]; zeros past the rows' ends. `out` holds numbers
// of any type of 4 bytes.
inline void turn(const StripRows &rows, int64_t start, int64_t units, void *out) {
    static const uint8_t zeros[square_bytes] = {};
    uint8_t *to = static_cast<uint8_t *>(out);
    for (int64_t unit = 0; unit < units; unit += square, start += square_bytes, to += square * 128) {
        const int64_t left = rows.bytes - start;
        const uint8_t *from[strip_outputs];
        uint8_t ends[strip_outputs][square_bytes];
        for (int lane = 0; lane < strip_outputs; ++lane) {
            from[lane] = rows.row[lane] && left > 0 ? rows.row[lane] + start : zeros;
            if (left >= square_bytes || from[lane] == zeros) continue;
            std::memset(ends[lane], 0, square_bytes);
            std::memcpy(ends[lane], from[lane], static_cast<size_t>(left));
            from[lane] = ends[lane];
        }
        if (units - unit >= square) {
            turn_square(from, to);
            continue;
        }
        uint8_t last[square * 128];
        turn_square(from, last);
        std::memcpy(to, last, static_cast<size_t>((units - unit) * 128));
    }
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of_half(uint32_t half) {
    // Exact, also below normal numbers: the exponent's bias is taken up by a product.
    const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(((half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled) | sign);
}

using Columns = float[strip_outputs];  // one input of 32 outputs

// Inputs [start, start + count) as floats; count a multiple of 32, zeros past the rows' ends.
inline void columns(Element element, const StripRows &rows, int64_t start, int64_t count, Columns *x) {
    if (element == Element::f32) return turn(rows, start * 4, count, x);
    for (int64_t i = 0; i < count; i += 2 * square, x += 2 * square) {
        uint32_t words[square][strip_outputs];
        turn(rows, (start + i) * 2, square, words);
        for (int unit = 0; unit < square; ++unit) {
            const uint32_t *word = words[unit];
            float *even = x[2 * unit], *odd = x[2 * unit + 1];
            if (element == Element::b16) {
                for (int o = 0; o < strip_outputs; ++o) even[o] = float_of(word[o] << 16);
                for (int o = 0; o < strip_outputs; ++o) odd[o] = float_of(word[o] & 0xffff0000u);
            } else {
                for (int o = 0; o < strip_outputs; ++o) even[o] = float_of_half(word[o] & 0xffffu);
                for (int o = 0; o < strip_outputs; ++o) odd[o] = float_of_half(word[o] >> 16);
            }
        }
    }
}

}  // namespace moesaic::MOESAIC_ISA
