#include "bind_program.h"
#include "scratch.h"

namespace moesaic {
namespace {

constexpr int from_slot = 24, to_slot = 25;

}  // namespace

void multiply_rows(const Packed &packed, const RowsOf &from, const RowsOf &to, int64_t rows, const float *bias,
                   std::optional<float> multiplier, int threads) {
    const PackedShape &shape = packed.shape;
    auto *x = static_cast<float *>(scratch(from_slot, rows * shape.inputs * 4));
    auto *y = static_cast<float *>(scratch(to_slot, rows * shape.outputs * 4));
    for (int64_t r = 0; r < rows; ++r) std::memcpy(x + r * shape.inputs, from.row(r), static_cast<size_t>(shape.inputs) * 4);
    const int64_t offsets[2] = {0, rows};
    chosen().packed_linear(x, packed.bytes(), y, shape, offsets, 1, threads);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < shape.outputs; ++o) {
            const float value = y[r * shape.outputs + o] + (bias ? bias[o] : 0.0f);
            float &out = to.row(r)[o];
            out = multiplier ? out + *multiplier * value : value;
        }
}

}  // namespace moesaic
