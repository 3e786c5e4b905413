// Rows sorted by expert times each expert's packed matrix.
#include "packed_multiply.h"
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Outputs of one row: y = sums + bias, or y += multiplier * (sums + bias). Those past the last are left.
void put_lanes(const float *sums, const float *bias, float *y, int64_t size, const PackedLinear &linear) {
    const Vec multiplier = set(linear.multiplier);
    along(
        size,
        [=](int64_t i) {
            Vec total = load(sums + i);
            if (bias) total = total + load(bias + i);
            store(y + i, linear.add ? fma(multiplier, total, load(y + i)) : total);
        },
        [=](int64_t i, int64_t n) {
            Vec total = load(sums + i, n);
            if (bias) total = total + load(bias + i, n);
            store(y + i, linear.add ? fma(multiplier, total, load(y + i, n)) : total, n);
        });
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

void put_strip(const float *sums, int64_t index, const PackedLinear &linear, const Unit &unit) {
    const PackedShape &shape = linear.shape;
    const float *bias = linear.bias ? linear.bias + unit.expert * shape.outputs : nullptr;
    const int64_t halves = shape.paired ? 2 : 1, width = strip_outputs / halves, inner = shape.outputs / halves;
    const int64_t at = index * width, size = at_most(inner - at, width);
    for (int64_t r = 0; r < unit.rows; ++r, sums += strip_outputs)
        for (int64_t half = 0; half < halves; ++half) {
            const int64_t output = half * inner + at;
            put_lanes(sums + half * width, bias ? bias + output : nullptr,
                      linear.y + (unit.row + r) * linear.y_stride + output, size, linear);
        }
}

}  // namespace

void multiply_rows(const PackedRows &rows, const PackedLinear &linear, int threads) {
    const PackedShape &shape = linear.shape;
    const Units units = units_of(linear.offsets, linear.num_experts, rows.rows);
    const int64_t work = units.count * shape.bytes() + rows.rows * shape.strips() * shape.padded_inputs();
    const int useful = threads_for(work, 1 << 15, threads);
    const int64_t strips = shape.strips(), some = strips_an_item(shape, units.count, 1, useful);
    const int64_t chunks = (strips + some - 1) / some;
    parallel_for(units.count * chunks, 1, useful, [&](int64_t item) {
        const Unit &unit = units.list[item / chunks];
        const PackedRows own = rows_from(rows, unit.row, unit.rows, shape);
        const uint8_t *weights = linear.weights + unit.expert * shape.bytes();
        float *sums = sums_in_scratch(unit.rows);
        const int64_t begin = item % chunks * some, end = at_most(begin + some, strips);
        for (int64_t strip = begin; strip < end; ++strip) {
            const uint8_t *own_weights = weights + strip * shape.strip_bytes();
            multiply_strip(own_weights, shape, own, sums, own_weights + shape.strip_bytes());
            put_strip(sums, strip, linear, unit);
        }
    });
}

void packed_linear(const float *x, int64_t x_stride, int64_t rows, const PackedLinear &linear, int threads) {
    const PackedRows prepared =
        packed_rows_at(scratch(rows_slot, packed_rows_bytes(rows, linear.shape)), rows, linear.shape);
    prepare_rows(x, x_stride, linear.shape, prepared, threads);
    multiply_rows(prepared, linear, threads);
}

Units units_of(const int64_t *offsets, int64_t num_experts, int64_t rows) {
    const int64_t whole[2] = {0, rows};
    if (!offsets) offsets = whole, num_experts = 1;
    const int64_t most = rows / rows_a_block + at_most(num_experts, rows);
    Units units{static_cast<Unit *>(scratch(units_slot, most * static_cast<int64_t>(sizeof(Unit)))), 0};
    for (int64_t e = 0; e < num_experts; ++e)
        for (int64_t row = offsets[e]; row < offsets[e + 1]; row += rows_a_block)
            units.list[units.count++] = {e, row, at_most(rows_a_block, offsets[e + 1] - row)};
    return units;
}

int64_t strips_an_item(const PackedShape &shape, int64_t units, int64_t granule, int threads) {
    constexpr int64_t chunk_bytes = 1 << 15, items_a_thread = 8;
    const int64_t granule_bytes = granule * (shape.strip_bytes() + 1);
    int64_t granules = (chunk_bytes + granule_bytes - 1) / granule_bytes;
    granules = at_most(granules, units * shape.strips() / (granule * threads * items_a_thread));
    return granule * (granules > 1 ? granules : 1);
}

}  // namespace moesaic::MOESAIC_ISA
