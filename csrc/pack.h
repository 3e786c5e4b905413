// Matrices as files hold them, and their way into the layout of packed.h.
#pragma once

#include <cstdint>

#include "packed.h"

namespace moesaic {

// What a source's numbers are: floats of three widths, whole numbers of one byte each, or codes (e4m3, or four
// bits in the low half of a byte).
enum class Element { f32, b16, f16, ints, codes };

// Rows [matrices, rows, row_bytes], contiguous, at any address.
struct RowBlock {
    const uint8_t *first;
    int64_t rows;
};

// The rows of each matrix, in blocks that stand one below the other.
struct RowBlocks {
    const RowBlock *blocks;
    int64_t row_bytes;
};

// values: [O, I] of the element. scales: none for floats, which are rounded to whole numbers where the format has such;
// [O, groups] of fp16 for ints, fp32 for fp8, exponents (a byte each) for mxfp4, words for uneven4.
struct PackSource {
    Element element;
    RowBlocks values, scales;
};

}  // namespace moesaic
