// How the tile unit (AMX) is set up, and what the compiler must be told of it.
#pragma once

#include <cstdint>

#include "simd.h"

namespace moesaic::MOESAIC_ISA {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler does not see how much of memory the unit's instructions read: what was stored before must be there.
inline void written(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

}  // namespace moesaic::MOESAIC_ISA
