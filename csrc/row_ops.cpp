#include "row_ops.h"

#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 1 << 14;  // elements below which waking a thread costs more than it saves

float sum_of(const float *x, int64_t size) {
    Vec total = set(0.0f);
    along(
        size, [&](int64_t i) { total = total + load(x + i); },
        [&](int64_t i, int64_t n) { total = total + load(x + i, n); });
    return sum(total);
}

float sum_of_squares(const float *x, int64_t size, float mean) {
    Vec total = set(0.0f);
    const Vec middle = set(mean);
    along(
        size,
        [&](int64_t i) {
            const Vec v = load(x + i) - middle;
            total = fma(v, v, total);
        },
        [&](int64_t i, int64_t n) {
            float away[Vec::lanes] = {};
            store(away, load(x + i, n) - middle, n);
            const Vec v = load(away);
            total = fma(v, v, total);
        });
    return sum(total);
}

void normalise(const float *x, float *y, const NormRows &norm) {
    const float mean = norm.centered ? sum_of(x, norm.size) / static_cast<float>(norm.size) : 0.0f;
    const float squares = sum_of_squares(x, norm.size, mean) / static_cast<float>(norm.size);
    const Vec by = set(1.0f / __builtin_sqrtf(squares + norm.eps)), middle = set(mean);
    const auto scaled = [&](Vec v, Vec weight, Vec bias) { return fma((v - middle) * by, weight, bias); };
    const Vec one = set(1.0f), zero = set(0.0f);
    along(
        norm.size,
        [&](int64_t i) {
            store(y + i, scaled(load(x + i), norm.weight ? load(norm.weight + i) : one,
                                norm.bias ? load(norm.bias + i) : zero));
        },
        [&](int64_t i, int64_t n) {
            store(y + i, scaled(load(x + i, n), norm.weight ? load(norm.weight + i, n) : one,
                                norm.bias ? load(norm.bias + i, n) : zero), n);
        });
}

void turn_halves(float *x, const float *cos, const float *sin, int64_t half) {
    const auto turned = [&](int64_t i, Vec a, Vec b, Vec c, Vec s, auto put) {
        put(i, fma(a, c, set(-1.0f) * b * s), fma(a, s, b * c));
    };
    along(
        half,
        [&](int64_t i) {
            turned(i, load(x + i), load(x + half + i), load(cos + i), load(sin + i), [&](int64_t at, Vec a, Vec b) {
                store(x + at, a);
                store(x + half + at, b);
            });
        },
        [&](int64_t i, int64_t n) {
            turned(i, load(x + i, n), load(x + half + i, n), load(cos + i, n), load(sin + i, n),
                   [&](int64_t at, Vec a, Vec b) {
                       store(x + at, a, n);
                       store(x + half + at, b, n);
                   });
        });
}

void turn_pairs(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = __builtin_fmaf(a, cos[i], -b * sin[i]);
        x[2 * i + 1] = __builtin_fmaf(a, sin[i], b * cos[i]);
    }
}

}  // namespace

void norm_rows(const NormRows &norm, int threads) {
    parallel_for(norm.rows, 4, threads_for(norm.rows * norm.count * norm.size, grain, threads), [&](int64_t row) {
        for (int64_t i = 0; i < norm.count; ++i)
            normalise(norm.from.row(row) + i * norm.size, norm.to.row(row) + i * norm.size, norm);
    });
}

void rotate_rows(const RotateRows &turn, int threads) {
    const int64_t half = turn.turning / 2;
    const int useful = threads_for(turn.num_rows * turn.heads * turn.turning, grain, threads);
    parallel_for(turn.num_rows, 4, useful, [&](int64_t row) {
        const float *cos = turn.cos + turn.positions[row] * half, *sin = turn.sin + turn.positions[row] * half;
        for (int64_t head = 0; head < turn.heads; ++head) {
            float *x = turn.rows.row(row) + head * turn.head_stride;
            if (turn.interleaved) turn_pairs(x, cos, sin, half);
            else turn_halves(x, cos, sin, half);
        }
    });
}

void add_rows(const AddRows &add, int threads) {
    parallel_for(add.rows, 4, threads_for(add.rows * add.size, grain, threads), [&](int64_t row) {
        const float *x = add.from.row(row);
        float *y = add.to.row(row);
        const Vec by = set(add.gates ? add.gates[row] * add.multiplier : add.multiplier);
        along(
            add.size, [&](int64_t i) { store(y + i, fma(load(x + i), by, load(y + i))); },
            [&](int64_t i, int64_t n) { store(y + i, fma(load(x + i, n), by, load(y + i, n)), n); });
    });
}

}  // namespace moesaic::MOESAIC_ISA
