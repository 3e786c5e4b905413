// x / sqrt(mean(x^2) + eps) * weight in fp32, and its gradients (arXiv:1910.07467, eq. 4).
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t rows_a_block = 64;
constexpr int64_t grain = 16384;  // elements below which waking a second thread costs more than it saves

}  // namespace

template <class T>
void rms_norm(const T *x, const T *weight, T *y, float *inverse, int64_t rows, int64_t size, float eps, int threads) {
    parallel_for(rows, 8, threads_for(rows * size, grain, threads), [=](int64_t row) {
        const T *in = x + row * size;
        T *out = y + row * size;
        Vec squares = set(0.0f);
        along(
            size,
            [&](int64_t i) {
                const Vec v = load(in + i);
                squares = fma(v, v, squares);
            },
            [&](int64_t i, int64_t n) {
                const Vec v = load(in + i, n);
                squares = fma(v, v, squares);
            });
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + eps);
        inverse[row] = scale;
        const Vec by = set(scale);
        along(
            size, [=](int64_t i) { store(out + i, load(in + i) * by * load(weight + i)); },
            [=](int64_t i, int64_t n) { store(out + i, load(in + i, n) * by * load(weight + i, n), n); });
    });
}

// dx = s * (w * dy - x * s^2 * mean(w * dy * x)) and dw = sum over rows of dy * x * s, with s the row's inverse root
// mean square. Rows are read once: each block of them has its own sum of dw, and these are added in the blocks' order,
// which does not depend on the number of threads.
template <class T>
void rms_norm_grad(const T *dy, const T *x, const T *weight, const float *inverse, T *dx, float *d_weight, int64_t rows,
                   int64_t size, int threads) {
    const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
    float *sums = new float[static_cast<size_t>(blocks * size)]();
    const int useful = threads_for(rows * size, grain, threads);
    parallel_for(blocks, 1, useful, [=](int64_t block) {
        float *dw = sums + block * size;
        const int64_t end = (block + 1) * rows_a_block < rows ? (block + 1) * rows_a_block : rows;
        for (int64_t row = block * rows_a_block; row < end; ++row) {
            const T *d = dy + row * size, *in = x + row * size;
            T *out = dx + row * size;
            Vec products = set(0.0f);
            along(
                size, [&](int64_t i) { products = fma(load(d + i) * load(weight + i), load(in + i), products); },
                [&](int64_t i, int64_t n) {
                    products = fma(load(d + i, n) * load(weight + i, n), load(in + i, n), products);
                });
            const float s = inverse[row];
            const Vec scale = set(s), pull = set(-s * s * s * sum(products) / static_cast<float>(size));
            along(
                size,
                [=](int64_t i) {
                    const Vec scaled = load(d + i) * scale, v = load(in + i);
                    store(dw + i, fma(scaled, v, load(dw + i)));
                    store(out + i, fma(v, pull, scaled * load(weight + i)));
                },
                [=](int64_t i, int64_t n) {
                    const Vec scaled = load(d + i, n) * scale, v = load(in + i, n);
                    store(dw + i, fma(scaled, v, load(dw + i, n)), n);
                    store(out + i, fma(v, pull, scaled * load(weight + i, n)), n);
                });
        }
    });
    for (int64_t i = 0; i < size; ++i) d_weight[i] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < size; ++i) d_weight[i] += sums[block * size + i];
    delete[] sums;
}

template void rms_norm(const float *, const float *, float *, float *, int64_t, int64_t, float, int);
template void rms_norm(const bf16 *, const bf16 *, bf16 *, float *, int64_t, int64_t, float, int);
template void rms_norm_grad(const float *, const float *, const float *, const float *, float *, float *, int64_t,
                            int64_t, int);
template void rms_norm_grad(const bf16 *, const bf16 *, const bf16 *, const float *, bf16 *, float *, int64_t, int64_t,
                            int);

}  // namespace moesaic::MOESAIC_ISA
