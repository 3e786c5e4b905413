// Sixteen uneven values of four bits, and the words of scales beside them: see src/moesaic/kernels/uneven.py.
//
//   word: 6 bits of an exponent | sign, 4 bits of the second group's scale | sign, 4 bits of the first's
//
// The four bits are one more of the exponent and three of a mantissa, so that a scale is put together by shifting. The
// exponent stands so high in a float that the word of no number is NaN; a row's scale takes that back.
#pragma once

#include <cstdint>

namespace moesaic {

constexpr int64_t uneven_block = 32, uneven_group = 16;

// By code, which is 0 for the value 0 and has the upper bit below it; with an offset, so that none is negative. Four
// products of them with bytes fit 16 bits: 4 * 64 * 127 < 2^15.
constexpr int32_t uneven_offset = 34;
alignas(16) constexpr uint8_t uneven_values[16] = {34, 37, 41, 44, 48, 52, 57, 64, 0, 5, 12, 17, 21, 25, 28, 31};

constexpr uint32_t uneven_none = 62u << 10 | 15u << 5 | 15u;
constexpr uint32_t uneven_lifted = 192u << 23;  // added to a float's exponent
constexpr float uneven_unit = 0x1p-92f;         // what lifted scales are to be multiplied by

}  // namespace moesaic
