// Products for few rows of A: decoding reads every weight once, so the time is that of reading memory. Weights (columns
// of B, which run along k) stream through registers in blocks of them against blocks of A's rows; nothing is packed.
//
// One accumulator per (column, row), filled along k from the left: a result depends neither on the number of threads
// nor on how many rows share the call.
#include "product.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Accumulators plus one vector a row and column must fit the registers.
constexpr int weight_block = 4;
constexpr int row_block = Vec::registers >= 32 ? 4 : 2;

template <int W, int N, class T>
inline void dot_block(const T *weight, const T *x, T *y, int64_t inputs, int64_t outputs) {
    Vec total[W][N];
    for (int w = 0; w < W; ++w)
        for (int n = 0; n < N; ++n) total[w][n] = set(0.0f);
    along(
        inputs,
        [&](int64_t i) {
            Vec xs[N];
            for (int n = 0; n < N; ++n) xs[n] = load(x + n * inputs + i);
            for (int w = 0; w < W; ++w) {
                const Vec ws = load(weight + w * inputs + i);
                for (int n = 0; n < N; ++n) total[w][n] = fma(ws, xs[n], total[w][n]);
            }
        },
        [&](int64_t i, int64_t tail) {
            for (int w = 0; w < W; ++w)
                for (int n = 0; n < N; ++n)
                    total[w][n] = fma(load(weight + w * inputs + i, tail), load(x + n * inputs + i, tail), total[w][n]);
        });
    for (int w = 0; w < W; ++w)
        for (int n = 0; n < N; ++n) put(y + n * outputs + w, sum(total[w][n]));
}

template <int W, class T>
inline void rows_block(const T *weight, const T *x, T *y, int64_t rows, int64_t inputs, int64_t outputs) {
    int64_t row = 0;
    for (; row + row_block <= rows; row += row_block)
        dot_block<W, row_block>(weight, x + row * inputs, y + row * outputs, inputs, outputs);
    x += row * inputs;
    y += row * outputs;
    switch (rows - row) {  // fewer than row_block
        case 3: dot_block<W, 3>(weight, x, y, inputs, outputs); break;
        case 2: dot_block<W, 2>(weight, x, y, inputs, outputs); break;
        case 1: dot_block<W, 1>(weight, x, y, inputs, outputs); break;
    }
}

}  // namespace

template <class T>
void multiply_strips(const Product<T, T> &p, const Block &block) {
    const int64_t rows = block.m1 - block.m0;
    for (int part = 0; part < p.parts; ++part) {
        const T *weight = p.b + part * p.b_part, *x = p.a + block.m0 * p.a_row;
        T *y = p.c + part * p.c_part + block.m0 * p.c_row;
        int64_t o = block.n0;
        for (; o + weight_block <= block.n1; o += weight_block)
            rows_block<weight_block>(weight + o * p.k, x, y + o, rows, p.k, p.c_row);
        for (; o < block.n1; ++o) rows_block<1>(weight + o * p.k, x, y + o, rows, p.k, p.c_row);
    }
}

template void multiply_strips(const Product<float, float> &, const Block &);
template void multiply_strips(const Product<bf16, bf16> &, const Block &);

}  // namespace moesaic::MOESAIC_ISA
