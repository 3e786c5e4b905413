// A feed-forward block whose matrices are packed, of one expert or many, and the rows that it takes.
#pragma once

#include "packed.h"

namespace moesaic {

// silu: x sigmoid(alpha x). gelu_tanh: the GELU by its tanh formula. relu2: the square of relu.
enum class ActivationKind { silu, gelu, gelu_tanh, relu, relu2 };

// Gated: (up + shift) * kind(gate), of gate at most `limit` and up from -limit to limit (infinite where there is none);
// else kind(up).
struct PackedActivation {
    ActivationKind kind;
    float limit, alpha, shift;
};

struct PackedExperts {
    PackedShape into_shape;  // F or, where paired, 2 F outputs of D inputs: gate and up
    PackedShape down_shape;  // D outputs of F inputs
    const uint8_t *into, *down;
    const float *into_bias, *down_bias;  // [E, F or 2 F], [E, D], or null
    int64_t num_experts;
    PackedActivation activation;
};

// Rows sorted by expert. Null throughout: every token is a row of the one expert, with a weight of 1.
struct ExpertRows {
    const int64_t *offsets;  // [E+1]
    const float *weights;    // [R], what an output (or input) is multiplied by
    const int64_t *row_of;   // [T, top_k]: the rows of a token's choices, -1 for none
    int64_t top_k;
    bool weight_on_input;
};

// out += multiplier * the sum over a token's choices, from the first to the last.
struct ExpertTokens {
    int64_t count;
    const float *x;  // [T, D], rows x_stride apart
    int64_t x_stride;
    float *out;  // [T, D], rows out_stride apart
    int64_t out_stride;
    float multiplier;
};

}  // namespace moesaic
