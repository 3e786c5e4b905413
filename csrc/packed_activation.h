// What stands between the projections of a feed-forward block, on the sums of one strip.
#pragma once

#include "packed_experts.h"
#include "silu.h"

namespace moesaic::MOESAIC_ISA {

// A rational approximation with odd powers over even, within 2 units in the last place for |x| below 4, where it has
// reached 1 in fp32 (the coefficients of Eigen's `erf`).
inline Vec erf(Vec x) {
    x = clamp(x, -4.0f, 4.0f);
    const Vec squared = x * x;
    Vec p = set(-2.72614225801306e-10f);
    p = fma(p, squared, set(2.77068142495902e-08f));
    p = fma(p, squared, set(-2.10102402082508e-06f));
    p = fma(p, squared, set(-5.69250639462346e-05f));
    p = fma(p, squared, set(-7.34990630326855e-04f));
    p = fma(p, squared, set(-2.95459980854025e-03f));
    p = fma(p, squared, set(-1.60960333262415e-02f));
    Vec q = set(-1.45660718464996e-05f);
    q = fma(q, squared, set(-2.13374055278905e-04f));
    q = fma(q, squared, set(-1.68282697438203e-03f));
    q = fma(q, squared, set(-7.37332916720468e-03f));
    q = fma(q, squared, set(-1.42647390514189e-02f));
    return x * p / q;
}

inline Vec activated(Vec x, const PackedActivation &activation) {
    switch (activation.kind) {
        case ActivationKind::silu: return x * sigmoid(x * set(activation.alpha));
        case ActivationKind::gelu: {
            const Vec half = x * set(0.5f);
            return fma(half, erf(x * set(0.70710678118654752f)), half);
        }
        case ActivationKind::gelu_tanh: {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
            const Vec cubic = fma(x * x, set(0.044715f), set(1.0f));
            return x * sigmoid(x * cubic * set(1.5957691216057308f));
        }
        case ActivationKind::relu: return max(set(0.0f), x);
        default: {
            const Vec positive = max(set(0.0f), x);
            return positive * positive;
        }
    }
}

inline Vec gated(Vec gate, Vec up, const PackedActivation &activation) {
    const float limit = activation.limit;
    up = clamp(up, -limit, limit) + set(activation.shift);
    return up * activated(clamp(gate, -__builtin_inff(), limit), activation);
}

}  // namespace moesaic::MOESAIC_ISA
