// What the engine does to rows of floats in place, or from one buffer to another. A row begins every `stride` floats.
#pragma once

#include <cstdint>

namespace moesaic {

struct RowsOf {
    float *data;
    int64_t stride;

    float *row(int64_t i) const { return data + i * stride; }
};

// `count` vectors of `size` one after another in each row, normalised each for itself. centered: LayerNorm
// (arXiv:1607.06450, eq. 4), else RMSNorm (arXiv:1910.07467, eq. 4). weight, bias: [size] or null.
struct NormRows {
    RowsOf from, to;
    int64_t rows, count, size;
    const float *weight, *bias;
    float eps;
    bool centered;
};

// Heads, `head_stride` apart, whose first `turning` dimensions turn by the angles of the rows' positions; cos, sin
// [positions, turning / 2]. interleaved: dimensions 2i and 2i + 1 are a pair, else i and i + turning / 2.
struct RotateRows {
    RowsOf rows;
    int64_t num_rows, heads, head_stride, turning;
    const int64_t *positions;
    const float *cos, *sin;
    bool interleaved;
};

// to += multiplier * gate * from. gates: one a row, null where there are none.
struct AddRows {
    RowsOf from, to;
    int64_t rows, size;
    float multiplier;
    const float *gates;
};

}  // namespace moesaic
