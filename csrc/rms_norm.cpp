// x / sqrt(mean(x^2) + eps) * weight in fp32, and its gradients (arXiv:1910.07467, eq. 4).
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

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

// dx = s * (w * dy - x * s^2 * mean(w * dy * x)), with s the row's inverse root mean square.
template <class T>
void rms_norm_input_grad(const T *dy, const T *x, const T *weight, const float *inverse, T *dx, int64_t rows,
                         int64_t size, int threads) {
    parallel_for(rows, 8, threads_for(rows * size, grain, threads), [=](int64_t row) {
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
            [=](int64_t i) { store(out + i, fma(load(in + i), pull, load(d + i) * load(weight + i) * scale)); },
            [=](int64_t i, int64_t n) {
                store(out + i, fma(load(in + i, n), pull, load(d + i, n) * load(weight + i, n) * scale), n);
            });
    });
}

// dw[i] = sum over rows of dy * x * s. Threads share out columns, so that no sum is split.
template <class T>
void rms_norm_weight_grad(const T *dy, const T *x, const float *inverse, float *d_weight, int64_t rows, int64_t size,
                          int threads) {
    const int64_t blocks = (size + Vec::lanes - 1) / Vec::lanes;
    parallel_for(blocks, 1, threads_for(rows * size, grain, threads), [=](int64_t block) {
        const int64_t i = block * Vec::lanes, n = size - i < Vec::lanes ? size - i : Vec::lanes;
        Vec total = set(0.0f);
        if (n == Vec::lanes) {
            for (int64_t row = 0; row < rows; ++row)
                total = fma(load(dy + row * size + i) * set(inverse[row]), load(x + row * size + i), total);
            store(d_weight + i, total);
            return;
        }
        for (int64_t row = 0; row < rows; ++row)
            total = fma(load(dy + row * size + i, n) * set(inverse[row]), load(x + row * size + i, n), total);
        store(d_weight + i, total, n);
    });
}

template void rms_norm(const float *, const float *, float *, float *, int64_t, int64_t, float, int);
template void rms_norm(const bf16 *, const bf16 *, bf16 *, float *, int64_t, int64_t, float, int);
template void rms_norm_input_grad(const float *, const float *, const float *, const float *, float *, int64_t, int64_t,
                                  int);
template void rms_norm_input_grad(const bf16 *, const bf16 *, const bf16 *, const float *, bf16 *, int64_t, int64_t,
                                  int);
template void rms_norm_weight_grad(const float *, const float *, const float *, float *, int64_t, int64_t, int);
template void rms_norm_weight_grad(const bf16 *, const bf16 *, const float *, float *, int64_t, int64_t, int);

}  // namespace moesaic::MOESAIC_ISA
