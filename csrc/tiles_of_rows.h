// Rows in tiles whose size the compiler knows.
#pragma once

#include "packed_lanes.h"

namespace moesaic::MOESAIC_ISA {

template <int R>
struct Count {
    static constexpr int value = R;
};
template <int R, class F>
MOESAIC_INLINE void with_count(int64_t rows, const F &f) {
    if constexpr (R > 0) {
        if (rows == R) f(Count<R>());
        else with_count<R - 1>(rows, f);
    }
}
// f(first row, number of them as a type) over rows in tiles as even as they can be.
template <class F>
MOESAIC_INLINE void over_tiles(int64_t rows, const F &f) {
    const int64_t tiles = (rows + row_tile - 1) / row_tile;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t here = rows / tiles + (tile < rows % tiles);
        with_count<row_tile>(here, [&](auto count) { f(row, count); });
        row += here;
    }
}

}  // namespace moesaic::MOESAIC_ISA
