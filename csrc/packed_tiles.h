// Packed strips on the tile unit (AMX): 16 rows by 16 outputs, a group of inputs at a time.
#pragma once

#include "fetch.h"
#include "packed.h"
#include "simd.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define MOESAIC_HAS_TILES

namespace moesaic::MOESAIC_ISA {

// From how many rows on whole numbers are summed by tiles (measured); the sums are exact, and so the same either way.
constexpr int64_t rows_for_tiles(int64_t group) {
    return group < 64 ? 12 : 8;
}

// The tile unit, set up for groups of whole numbers or for so many rows of bf16.
class TilesLent {
  public:
    struct Rows {
        int64_t count;
    };
    explicit TilesLent(int64_t group);
    explicit TilesLent(Rows rows);
    ~TilesLent();
    TilesLent(const TilesLent &) = delete;
    TilesLent &operator=(const TilesLent &) = delete;
};

// Groups g0 to g1, made signed bytes at `wide` (see Groups in packed_numbers.h), added to the sums of all rows, or
// begun where g0 is 0.
template <int64_t group>
void tiles_of_ints(const uint8_t *wide, int64_t g0, int64_t g1, const PackedShape &shape, const PackedRows &rows,
                   FetchInParts next, float *sums);
// Parts in which it asks for what comes next.
constexpr int64_t parts_of_ints(int64_t rows) { return (rows + 15) / 16 * 2; }

// A whole strip of bf16. The unit sums in an order of its own, so that every number of rows comes here. Sums of up to
// spare_rows past the last are written, too.
void tiles_of_bf16(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums);

// The same of fp8, whose numbers are made bf16 block by block.
void tiles_of_fp8(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums);

}  // namespace moesaic::MOESAIC_ISA
#endif
