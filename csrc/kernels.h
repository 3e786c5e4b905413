// The table of operations that exist once per instruction set, and the types they share.
// T tokens, R rows sorted by expert, E experts, I inputs, O outputs, F expert inner, D hidden.
#pragma once

#include <cstdint>

#include "packed.h"
#include "row_ops.h"
#include "paged.h"

namespace moesaic {

struct PackSource;  // pack.h

// The upper half of a float; arithmetic happens in float.
struct bf16 {
    uint16_t bits;
};

struct Grouped {
    int64_t num_experts, inputs, outputs;
    const int64_t *offsets;  // [E+1]
    int64_t few_rows;        // experts with no more rows read their weights in strips (grouped_linear, grouped_gated)
    int64_t max_rows;        // experts with more rows are left to the caller
};

// Where a gradient goes: into memory just allocated, into memory that has been written before, or onto sums. Pages that
// the system hands out are zeroed through the caches and found there; what goes past them would wait for both.
enum class Target { fresh, reused, sums };

// Tokens in a row, each of num_heads heads; cosines and sines are those of token % positions.
struct Heads {
    int64_t tokens, num_heads, head_dim, positions;
};

// Queries [batch, length, num_heads, head_dim]; keys and values have num_groups heads, each for as many query heads.
struct AttentionShape {
    int64_t batch, length, num_heads, num_groups, head_dim;
};

// What the gradient of attention reads and writes. log_sum [batch, num_heads, length].
template <class T>
struct AttentionGrad {
    const T *d_out, *q, *k, *v, *out;
    const float *log_sum;
    T *dq, *dk, *dv;
};

// What AdamW moves and writes, all of one size. rounded, average: null where not kept.
struct AdamTensors {
    float *weight, *first, *second;
    const float *gradient;
    bf16 *rounded;
    float *average;
};

// The numbers of one step: what the gradient is multiplied by, what decay leaves of the weight, the moments' decay and
// what is taken of the newest (fresh1 = 1 - beta1), the learning rate and the root of the second moment's bias
// correction, what the average takes of the newest weight.
struct AdamStep {
    float clip, kept, fresh1, beta2, fresh2, rate, second_root, eps, newest;
};

struct PackedExperts;  // packed_experts.h
struct ExpertRows;
struct ExpertTokens;

// Rows, sorted by expert, times each expert's packed matrix: y = x w + bias, or y += multiplier * (x w + bias).
struct PackedLinear {
    PackedShape shape;
    const uint8_t *weights;  // [E][shape.bytes()]
    const float *bias;       // [E, O], or null
    const int64_t *offsets;  // [E+1], or null: one matrix for all rows
    int64_t num_experts;
    float *y;
    int64_t y_stride;
    bool add;
    float multiplier;
};

template <class T>
struct Typed {
    void (*causal_attention)(const T *q, const T *k, const T *v, T *out, float *log_sum, const AttentionShape &shape,
                             int threads);
    void (*causal_attention_grad)(const AttentionGrad<T> &grad, const AttentionShape &shape, int threads);
    void (*cross_entropy)(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocab, int threads);
    void (*rotate)(const T *x, const T *cos, const T *sin, T *y, const Heads &heads, float sign, int threads);
    void (*silu_mul)(const T *gate_up, T *y, int64_t rows, int64_t inner, int threads);
    void (*silu_mul_grad)(const T *dy, const T *gate_up, T *d_gate_up, int64_t rows, int64_t inner, int threads);
    void (*rms_norm)(const T *x, const T *weight, T *y, float *inverse, int64_t rows, int64_t size, float eps,
                     int threads);
    void (*rms_norm_grad)(const T *dy, const T *x, const T *weight, const float *inverse, T *dx, float *d_weight,
                          int64_t rows, int64_t size, int threads);
    void (*combine_rows)(const T *out, const float *weights, const int64_t *row_ids, const int64_t *token_offsets, T *y,
                         int64_t tokens, int64_t hidden, int threads);
    void (*combine_rows_grad)(const T *dy, const T *out, const float *weights, const int64_t *token_ids, T *d_out,
                              float *d_weights, int64_t rows, int64_t hidden, int threads);
    void (*grouped_linear)(const T *x, const T *weight, T *y, const Grouped &grouped, int threads);
    void (*grouped_gated)(const T *x, const T *weight, T *gate_up, T *y, const Grouped &grouped, int threads);
    void (*grouped_linear_input_grad)(const T *dy, const T *weight, T *dx, const Grouped &grouped, int threads);
    void (*grouped_linear_weight_grad)(const T *dy, const T *x, T *dw, const Grouped &grouped, int threads);
    void (*grouped_linear_weight_grad_wide)(const T *dy, const T *x, float *dw, Target target, const Grouped &grouped,
                                            int threads);
};

struct Kernels {
    const char *isa;
    Typed<float> f32;
    Typed<bf16> b16;
    uint64_t (*read_words)(const uint64_t *words, int64_t count);
    void (*adamw)(const AdamTensors &tensors, const AdamStep &step, int64_t size, int threads);
    void (*prepare_rows)(const float *x, int64_t x_stride, const PackedShape &shape, const PackedRows &rows,
                         int threads);
    void (*multiply_rows)(const PackedRows &rows, const PackedLinear &linear, int threads);
    void (*packed_linear)(const float *x, int64_t x_stride, int64_t rows, const PackedLinear &linear, int threads);
    void (*packed_experts)(const PackedExperts &experts, const ExpertRows &rows, const ExpertTokens &tokens,
                           int threads);
    void (*norm_rows)(const NormRows &norm, int threads);
    void (*rotate_rows)(const RotateRows &turn, int threads);
    void (*add_rows)(const AddRows &add, int threads);
    // k [tokens, groups, key_dim], v [tokens, groups, value_dim] (null where shared), q [tokens, heads, key_dim] and
    // out [tokens, heads, value_dim]; strides in floats, from token to token.
    void (*write_cache)(const PagedCache &cache, const PagedTokens &tokens, const float *k, int64_t k_stride,
                        const float *v, int64_t v_stride, int threads);
    void (*paged_attention)(const PagedCache &cache, const PagedTokens &tokens, const PagedSight &sight, const float *q,
                            int64_t q_stride, float *out, int64_t out_stride, int threads);
    void (*pack)(const PackSource &source, const PackedShape &shape, int64_t matrices, uint8_t *out, int threads);
    // Of each draw_block logits (draw.h): the greatest; weights e^((logit - greatest) * factor), and their sums.
    void (*greatest_logits)(const float *logits, int64_t size, float *greatest);
    void (*weigh_logits)(const float *logits, int64_t size, float greatest, float factor, float *weights, double *sums);
    // Rows of floats times weights of bf16, in fp32: what the same weights as floats give, bit for bit.
    void (*grouped_linear_b16)(const float *x, const bf16 *weight, float *y, const Grouped &grouped, int threads);
    void (*grouped_gated_b16)(const float *x, const bf16 *weight, float *gate_up, float *y, const Grouped &grouped,
                              int threads);

    const Typed<float> &of(const float *) const { return f32; }
    const Typed<bf16> &of(const bf16 *) const { return b16; }
};

// Each instruction set is a namespace that holds one table.
namespace portable {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

// Operations without arithmetic worth a variant.
void select_topk(const float *scores, int64_t *ids, int64_t tokens, int64_t num_experts, int64_t top_k, int threads);
int64_t sort_rows(const int64_t *expert_ids, int64_t *token_ids, int64_t *choices, int64_t *offsets, int64_t tokens,
                  int64_t top_k, int64_t num_experts);
void gather_rows(const void *x, const int64_t *token_ids, void *rows_out, int64_t rows, int64_t row_bytes, int threads);

}  // namespace moesaic
