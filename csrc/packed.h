// Weights packed for reading once, in order: a matrix [outputs, inputs] is cut into strips of 32 outputs, a strip into
// blocks of inputs, and a block holds its scales and then its numbers as the kernels load them.
//
//   format   block    scales                   numbers of 32 outputs (bytes)
//   f32      1        -                        [32] floats
//   b16      2        -                        [32][2] bf16
//   fp8      128      32 floats                [64][4][2][4][2] e4m3 with their halves swapped: two inputs of outputs
//                                              4i to 4i + 3, then of 16 + 4i to 19 + 4i. Where one of an output's is
//                                              no number, its scale is none
//   int8     group    32 fp16                  [group / 4][32][4] q + 128
//   int4     group    32 fp16                  [group / 8][32][4] q + 8, inputs 8j + i in the low and 8j + 4 + i in the
//                                              high half of a byte
//   int6     group    32 fp16                  the lower four bits of q + 32 as in int4, then [group / 16][32][4] of the
//                                              upper two, of inputs 16j + i, 16j + 4 + i, ... from the lowest bits on
//   mxfp4    64       2 x 32 exponents         2 x [4][32][4] codes, halves of a byte as in int4
//   uneven4  32       32 words (see uneven.h)  2 x [2][32][4] codes, the same way
//
// paired: the first 16 outputs of a strip are of the matrix's first half (gate), the others of its second (up).
// What lies past the last output or input is zero.
#pragma once

#include <cstdint>

#include "uneven.h"

namespace moesaic {

enum class Format { f32, b16, fp8, int8, int6, int4, mxfp4, uneven4 };

// Whole numbers whose scale is shared by as many inputs as one likes.
constexpr bool has_groups(Format format) {
    return format == Format::int8 || format == Format::int6 || format == Format::int4;
}

constexpr int64_t strip_outputs = 32;

struct PackedShape {
    Format format;
    int64_t outputs, inputs;
    int64_t group;  // inputs that share a scale (int8, int6, int4)
    bool paired;

    int64_t block() const {
        switch (format) {
            case Format::f32: return 1;
            case Format::b16: return 2;
            case Format::fp8: return 128;
            case Format::mxfp4: return 64;
            case Format::uneven4: return uneven_block;
            default: return group;
        }
    }
    // Inputs for which rows have one scale; 0 where rows are not quantized.
    int64_t row_group() const {
        if (format == Format::uneven4) return uneven_group;
        return has_groups(format) ? group : format == Format::mxfp4 ? 32 : 0;
    }
    int64_t row_groups() const { return row_group() ? padded_inputs() / row_group() : 0; }
    int64_t row_element_bytes() const { return row_group() ? 1 : format == Format::f32 ? 4 : 2; }
    // Inputs of a prepared row, zeros included; tiles take 32 of bf16 at a time.
    int64_t row_inputs() const { return format == Format::b16 ? (inputs + 31) / 32 * 32 : padded_inputs(); }
    // From one row to the next: an odd number of cache lines, so that rows do not share a few of them.
    int64_t row_bytes() const { return ((row_inputs() * row_element_bytes() + 63) / 64 | 1) * 64; }
    int64_t row_stride() const { return row_bytes() / row_element_bytes(); }
    int64_t blocks() const { return (inputs + block() - 1) / block(); }
    int64_t padded_inputs() const { return blocks() * block(); }
    int64_t block_bytes() const {
        switch (format) {
            case Format::f32:
            case Format::b16: return 128;
            case Format::fp8: return (4 + 128) * strip_outputs;
            case Format::int8: return 64 + group * strip_outputs;
            case Format::int6: return 64 + group * strip_outputs * 3 / 4;
            default: return 64 + block() * strip_outputs / 2;
        }
    }
    int64_t strips() const {
        return paired ? (outputs / 2 + strip_outputs / 2 - 1) / (strip_outputs / 2)
                      : (outputs + strip_outputs - 1) / strip_outputs;
    }
    int64_t strip_bytes() const { return blocks() * block_bytes(); }
    int64_t bytes() const { return strips() * strip_bytes(); }
};

// Rows to be multiplied, `row_stride` apart: floats (f32), bf16 (b16, fp8), or bytes. Of bytes each group has a scale
// and what its sum begins with (see packed_lanes.h), at [group * groups_apart + row].
struct PackedRows {
    int64_t rows;
    void *values;
    float *scales;
    int32_t *starts;
    int64_t groups_apart;
};

// Rows are read in whole tiles, also where fewer are left.
constexpr int64_t spare_rows = 15;

inline int64_t packed_rows_bytes(int64_t rows, const PackedShape &shape) {
    return (rows + spare_rows) * (shape.row_bytes() + 8 * shape.row_groups());
}

// Rows in memory of that size, aligned to 64 bytes.
inline PackedRows packed_rows_at(void *memory, int64_t rows, const PackedShape &shape) {
    const int64_t all = rows + spare_rows;
    float *scales = reinterpret_cast<float *>(static_cast<uint8_t *>(memory) + all * shape.row_bytes());
    return {rows, memory, scales, reinterpret_cast<int32_t *>(scales + all * shape.row_groups()), all};
}

// `count` of them, from `row` on.
inline PackedRows rows_from(const PackedRows &rows, int64_t row, int64_t count, const PackedShape &shape) {
    return {count, static_cast<uint8_t *>(rows.values) + row * shape.row_bytes(), rows.scales + row, rows.starts + row,
            rows.groups_apart};
}

}  // namespace moesaic
