// Each expert's rows times its own matrix, for FEW rows an expert: decoding reads every weight once, so the time is
// that of reading memory. Weights stream through registers in blocks of matrix rows against blocks of x rows.
//
// One accumulator per (matrix row, x row), filled along I from the left: a result depends neither on the number of
// threads nor on how many rows share the call.
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Accumulators plus one vector a row and column must fit the registers.
constexpr int weight_block = 4;
constexpr int row_block = Vec::registers >= 32 ? 4 : 2;
constexpr int64_t strip_bytes = 128 << 10;  // a thread's unit of work: well inside its second-level cache

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

template <class T>
void strip(const T *weight, const T *x, T *y, int64_t rows, int64_t width, int64_t inputs, int64_t outputs) {
    int64_t o = 0;
    for (; o + weight_block <= width; o += weight_block)
        rows_block<weight_block>(weight + o * inputs, x, y + o, rows, inputs, outputs);
    for (; o < width; ++o) rows_block<1>(weight + o * inputs, x, y + o, rows, inputs, outputs);
}

int64_t strip_width(int64_t row_bytes, int64_t outputs) {
    int64_t width = row_bytes > 0 ? strip_bytes / row_bytes / weight_block * weight_block : outputs;
    if (width < weight_block) width = weight_block;
    return width < outputs ? width : outputs;
}

}  // namespace

template <class T>
void grouped_linear(const T *x, const T *weight, T *y, const Grouped &grouped, int threads) {
    const int64_t inputs = grouped.inputs, outputs = grouped.outputs, *offsets = grouped.offsets;
    if (outputs == 0) return;
    int64_t *active = new int64_t[grouped.num_experts + 1];
    int64_t num_active = 0;
    for (int64_t e = 0; e < grouped.num_experts; ++e) {
        const int64_t rows = offsets[e + 1] - offsets[e];
        if (rows > 0 && rows <= grouped.max_rows) active[num_active++] = e;
    }
    const int64_t row_bytes = inputs * static_cast<int64_t>(sizeof(T));
    const int64_t width = strip_width(row_bytes, outputs);
    const int64_t strips = (outputs + width - 1) / width;
    const int useful = threads_for(num_active * outputs * row_bytes, 64 << 10, threads);
    parallel_for(num_active * strips, 1, useful, [=](int64_t item) {
        const int64_t e = active[item / strips], o = item % strips * width;
        const int64_t here = outputs - o < width ? outputs - o : width;
        strip(weight + (e * outputs + o) * inputs, x + offsets[e] * inputs, y + offsets[e] * outputs + o,
              offsets[e + 1] - offsets[e], here, inputs, outputs);
    });
    delete[] active;
}

template void grouped_linear(const float *, const float *, float *, const Grouped &, int);
template void grouped_linear(const bf16 *, const bf16 *, bf16 *, const Grouped &, int);

}  // namespace moesaic::MOESAIC_ISA
