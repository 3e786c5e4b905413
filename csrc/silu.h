// silu(gate) * up along a row (SwiGLU, arXiv:2002.05202, eq. 6).
#pragma once

#include "simd.h"

namespace moesaic::MOESAIC_ISA {

inline Vec sigmoid(Vec x) { return set(1.0f) / (set(1.0f) + exp(set(0.0f) - x)); }

template <class T>
inline void gated_row(const T *gate, const T *up, T *y, int64_t size) {
    along(
        size,
        [=](int64_t i) {
            const Vec g = load(gate + i);
            store(y + i, g * sigmoid(g) * load(up + i));
        },
        [=](int64_t i, int64_t n) {
            const Vec g = load(gate + i, n);
            store(y + i, g * sigmoid(g) * load(up + i, n), n);
        });
}

}  // namespace moesaic::MOESAIC_ISA
