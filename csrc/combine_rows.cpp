// Rows back to tokens: a weighted sum over each token's rows in a fixed order, and its gradient.
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 16384;  // elements below which waking a second thread costs more than it saves

}  // namespace

template <class T>
void combine_rows(const T *out, const float *weights, const int64_t *row_ids, const int64_t *token_offsets, T *y,
                  int64_t tokens, int64_t hidden, int threads) {
    const int64_t rows = tokens > 0 ? token_offsets[tokens] - token_offsets[0] : 0;
    parallel_for(tokens, 1, threads_for((rows + tokens) * hidden, grain, threads), [=](int64_t token) {
        const int64_t start = token_offsets[token], end = token_offsets[token + 1];
        T *y_row = y + token * hidden;
        along(
            hidden,
            [=](int64_t i) {
                Vec total = set(0.0f);
                for (int64_t k = start; k < end; ++k)
                    total = fma(set(weights[row_ids[k]]), load(out + row_ids[k] * hidden + i), total);
                store(y_row + i, total);
            },
            [=](int64_t i, int64_t n) {
                Vec total = set(0.0f);
                for (int64_t k = start; k < end; ++k)
                    total = fma(set(weights[row_ids[k]]), load(out + row_ids[k] * hidden + i, n), total);
                store(y_row + i, total, n);
            });
    });
}

template <class T>
void combine_rows_grad(const T *dy, const T *out, const float *weights, const int64_t *token_ids, T *d_out,
                       float *d_weights, int64_t rows, int64_t hidden, int threads) {
    parallel_for(rows, 1, threads_for(rows * hidden, grain, threads), [=](int64_t row) {
        const T *d = dy + token_ids[row] * hidden, *o = out + row * hidden;
        T *d_row = d_out + row * hidden;
        const Vec weight = set(weights[row]);
        Vec total = set(0.0f);
        along(
            hidden,
            [&](int64_t i) {
                const Vec dv = load(d + i);
                total = fma(dv, load(o + i), total);
                store(d_row + i, dv * weight);
            },
            [&](int64_t i, int64_t n) {
                const Vec dv = load(d + i, n);
                total = fma(dv, load(o + i, n), total);
                store(d_row + i, dv * weight, n);
            });
        d_weights[row] = sum(total);
    });
}

template void combine_rows(const float *, const float *, const int64_t *, const int64_t *, float *, int64_t, int64_t,
                           int);
template void combine_rows(const bf16 *, const float *, const int64_t *, const int64_t *, bf16 *, int64_t, int64_t,
                           int);
template void combine_rows_grad(const float *, const float *, const float *, const int64_t *, float *, float *, int64_t,
                                int64_t, int);
template void combine_rows_grad(const bf16 *, const bf16 *, const float *, const int64_t *, bf16 *, float *, int64_t,
                                int64_t, int);

}  // namespace moesaic::MOESAIC_ISA
