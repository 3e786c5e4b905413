// silu(gate) * up and its gradient, in fp32 whatever the rows are kept in (SwiGLU, arXiv:2002.05202, eq. 6).
#include "parallel.h"
#include "silu.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 16384;  // elements below which waking a second thread costs more than it saves

}  // namespace

template <class T>
void silu_mul(const T *gate_up, T *y, int64_t rows, int64_t inner, int threads) {
    parallel_for(rows, 1, threads_for(rows * inner, grain, threads), [=](int64_t row) {
        const T *gate = gate_up + row * 2 * inner;
        gated_row(gate, gate + inner, y + row * inner, inner);
    });
}

template <class T>
void silu_mul_grad(const T *dy, const T *gate_up, T *d_gate_up, int64_t rows, int64_t inner, int threads) {
    parallel_for(rows, 1, threads_for(rows * inner, grain, threads), [=](int64_t row) {
        const T *d = dy + row * inner, *gate = gate_up + row * 2 * inner, *up = gate + inner;
        T *d_gate = d_gate_up + row * 2 * inner, *d_up = d_gate + inner;
        const auto d_silu = [](Vec g, Vec s) { return s * fma(g, set(1.0f) - s, set(1.0f)); };
        along(
            inner,
            [=](int64_t i) {
                const Vec g = load(gate + i), s = sigmoid(g), dv = load(d + i);
                store(d_gate + i, dv * load(up + i) * d_silu(g, s));
                store(d_up + i, dv * g * s);
            },
            [=](int64_t i, int64_t n) {
                const Vec g = load(gate + i, n), s = sigmoid(g), dv = load(d + i, n);
                store(d_gate + i, dv * load(up + i, n) * d_silu(g, s), n);
                store(d_up + i, dv * g * s, n);
            });
    });
}

template void silu_mul(const float *, float *, int64_t, int64_t, int);
template void silu_mul(const bf16 *, bf16 *, int64_t, int64_t, int);
template void silu_mul_grad(const float *, const float *, float *, int64_t, int64_t, int);
template void silu_mul_grad(const bf16 *, const bf16 *, bf16 *, int64_t, int64_t, int);

}  // namespace moesaic::MOESAIC_ISA
