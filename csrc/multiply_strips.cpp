// Products for few rows of A: decoding reads every weight once, so the time is that of reading memory. Weights (columns
// of B, which run along k) stream through registers in blocks of them against blocks of A's rows; nothing is packed.
// More rows take k in stretches, whose weights stay in the first cache for all of them.
//
// One accumulator per (column, row), filled along k from the left: a result depends neither on the number of threads
// nor on how many rows share the call.
#include "product.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Accumulators plus one vector a row and one of weights must fit the registers.
constexpr int weight_block = 4;
constexpr int row_block = Vec::registers >= 32 ? 4 : Vec::registers >= 16 ? 3 : 2;
constexpr int64_t stretch = 512;       // of k: weight_block and row_block rows of it fit the first cache
constexpr int64_t rows_together = 48;  // whose accumulators are kept between stretches, in the first cache, too
// Rows up to which k is taken at once (measured with AVX2; with more registers and larger caches, few enough always).
constexpr int64_t whole_rows = Vec::registers >= 32 ? 16 : 2 * row_block;
template <class T>
constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));  // elements of a cache line

// A stretch of k for some columns and rows: where they are, from row to row, and how long it is.
template <class T, class B>
struct Strip {
    const B *weight;
    const T *x;
    int64_t inputs, size;
};

template <int W, int N, class T, class B>
inline void add_products(const Strip<T, B> &s, int64_t row, Vec (&total)[W][N]) {
    const B *weight = s.weight;
    const T *x = s.x + row * s.inputs;
    const int64_t inputs = s.inputs;
    along(
        s.size,
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
}

// All of k at once.
template <class T, class B>
struct Whole {
    T *y;
    int64_t outputs;

    template <int W, int N>
    void dot(const Strip<T, B> &s, int64_t row) const {
        Vec total[W][N];
        for (int w = 0; w < W; ++w)
            for (int n = 0; n < N; ++n) total[w][n] = set(0.0f);
        add_products(s, row, total);
        for (int w = 0; w < W; ++w)
            for (int n = 0; n < N; ++n) put(y + (row + n) * outputs + w, sum(total[w][n]));
    }
};

// One stretch of several: sums are kept as [row][column][lanes].
template <class T, class B>
struct Part {
    T *y;
    int64_t outputs;
    float *kept;
    bool first, last;
    const B *next;  // what the next stretch will read of the weights: some of it is fetched with every block of rows
    int64_t next_lines;

    template <int W, int N>
    void dot(const Strip<T, B> &s, int64_t row) const {
        float *own = kept + row * W * Vec::lanes;
        Vec total[W][N];
        for (int w = 0; w < W; ++w)
            prefetch_lines(next + w * s.inputs + row / row_block * next_lines * line<B>, next_lines);
        for (int w = 0; w < W; ++w)
            for (int n = 0; n < N; ++n) total[w][n] = first ? set(0.0f) : load(own + (n * W + w) * Vec::lanes);
        add_products(s, row, total);
        for (int w = 0; w < W; ++w)
            for (int n = 0; n < N; ++n) {
                if (last) put(y + (row + n) * outputs + w, sum(total[w][n]));
                else store(own + (n * W + w) * Vec::lanes, total[w][n]);
            }
    }
};

// All rows, in blocks of even sizes.
template <int W, class T, class B, class Take>
inline void each_block(const Strip<T, B> &s, int64_t rows, const Take &take) {
    const int64_t blocks = ceil_div(rows, row_block);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = even_cut(rows, blocks, i);
        switch (even_cut(rows, blocks, i + 1) - row) {
            case 4: take.template dot<W, row_block>(s, row); break;  // never where a block has fewer
            case 3: take.template dot<W, row_block < 3 ? row_block : 3>(s, row); break;
            case 2: take.template dot<W, 2>(s, row); break;
            default: take.template dot<W, 1>(s, row);
        }
    }
}

template <int W, class T, class B>
void columns_block(const B *weight, const T *x, T *y, int64_t rows, int64_t inputs, int64_t outputs) {
    if (rows <= whole_rows) {
        each_block<W>(Strip<T, B>{weight, x, inputs, inputs}, rows, Whole<T, B>{y, outputs});
        return;
    }
    alignas(64) float kept[rows_together * W * Vec::lanes];
    for (; rows > 0; rows -= rows_together, x += rows_together * inputs, y += rows_together * outputs) {
        const int64_t some = at_most(rows, rows_together), blocks = ceil_div(some, row_block);
        for (int64_t k = 0; k < inputs; k += stretch) {
            const int64_t size = at_most(inputs - k, stretch);
            const bool last = k + size == inputs;
            const B *next = last ? weight + W * inputs : weight + k + size;
            each_block<W>(Strip<T, B>{weight + k, x + k, inputs, size}, some,
                          Part<T, B>{y, outputs, kept, k == 0, last, next, ceil_div(stretch, line<B> * blocks)});
        }
    }
}

}  // namespace

template <class T, class B>
void multiply_strips(const Product<T, T, B> &p, const Block &block) {
    const int64_t rows = block.m1 - block.m0;
    for (int part = 0; part < p.parts; ++part) {
        const B *weight = p.b + part * p.b_part;
        const T *x = p.a + block.m0 * p.a_row;
        T *y = p.c + part * p.c_part + block.m0 * p.c_row;
        int64_t o = block.n0;
        for (; o + weight_block <= block.n1; o += weight_block)
            columns_block<weight_block>(weight + o * p.k, x, y + o, rows, p.k, p.c_row);
        for (; o < block.n1; ++o) columns_block<1>(weight + o * p.k, x, y + o, rows, p.k, p.c_row);
    }
}

template void multiply_strips(const Product<float, float> &, const Block &);
template void multiply_strips(const Product<float, float, bf16> &, const Block &);
template void multiply_strips(const Product<bf16, bf16> &, const Block &);

}  // namespace moesaic::MOESAIC_ISA
