// Rows times packed weights (see packed.h), a strip at a time.
//
// The bits of an output depend on its row and its weights alone: sums run along the inputs from the left, in whole
// numbers within a group and in fp32 over groups, however many rows share the call.
#pragma once

#include "packed.h"
#include "scratch.h"
#include "simd.h"

namespace moesaic::MOESAIC_ISA {

// The first three are the calling thread's while all compute; the others each thread's own.
enum PackedSlot { rows_slot = 16, units_slot, inner_rows_slot, sums_slot, wide_slot, inner_slot, outputs_slot };

// A row's inputs from `first` (where a group begins) to `end`, as the format wants them; zeros behind the last input.
void prepare_inputs(const float *x, int64_t first, int64_t end, const PackedShape &shape, const PackedRows &rows,
                    int64_t row);

// sums [rows, 32] of one strip. after: what this thread will read then, as far as is known.
void multiply_strip(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums,
                    const uint8_t *after);

// The same where weights are floats of some kind.
void multiply_strip_of_floats(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums);

// Memory of a strip's sums; rows beyond those asked for are written where tiles are whole.
inline float *sums_in_scratch(int64_t rows) {
    return static_cast<float *>(scratch(sums_slot, (rows + spare_rows) * strip_outputs * 4));
}

// Rows that meet a strip together: as many as stay in a core's cache beside it.
constexpr int64_t rows_a_block = 128;

// What one thread takes at a time: consecutive strips, read in one go, of one expert against some of its rows.
struct Unit {
    int64_t expert, row, rows;
};
struct Units {
    Unit *list;
    int64_t count;
};
// Experts without rows have none. Without offsets there is one expert.
Units units_of(const int64_t *offsets, int64_t num_experts, int64_t rows);

// Strips that one thread takes at a time, a multiple of `granule` (but for the last): about 32 KB of weights, less
// where threads would be left without.
int64_t strips_an_item(const PackedShape &shape, int64_t units, int64_t granule, int threads);

}  // namespace moesaic::MOESAIC_ISA
