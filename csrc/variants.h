// What each instruction set compiles: declared here, defined in one file an operation, tabled in variants.cpp.
#pragma once

#include "simd.h"

namespace moesaic::MOESAIC_ISA {

uint64_t read_words(const uint64_t *words, int64_t count);
void adamw(const AdamTensors &tensors, const AdamStep &step, int64_t size, int threads);
void prepare_rows(const float *x, int64_t x_stride, const PackedShape &shape, const PackedRows &rows, int threads);
void multiply_rows(const PackedRows &rows, const PackedLinear &linear, int threads);
void packed_linear(const float *x, int64_t x_stride, int64_t rows, const PackedLinear &linear, int threads);
void packed_experts(const PackedExperts &experts, const ExpertRows &rows, const ExpertTokens &tokens, int threads);
void norm_rows(const NormRows &norm, int threads);
void rotate_rows(const RotateRows &turn, int threads);
void add_rows(const AddRows &add, int threads);
void write_cache(const PagedCache &cache, const PagedTokens &tokens, const float *k, int64_t k_stride, const float *v,
                 int64_t v_stride, int threads);
void paged_attention(const PagedCache &cache, const PagedTokens &tokens, const PagedSight &sight, const float *q,
                     int64_t q_stride, float *out, int64_t out_stride, int threads);
void pack(const PackSource &source, const PackedShape &shape, int64_t matrices, uint8_t *out, int threads);
void greatest_logits(const float *logits, int64_t size, float *greatest);
void weigh_logits(const float *logits, int64_t size, float greatest, float factor, float *weights, double *sums);
template <class T>
void causal_attention(const T *q, const T *k, const T *v, T *out, float *log_sum, const AttentionShape &shape,
                      int threads);
template <class T>
void causal_attention_grad(const AttentionGrad<T> &grad, const AttentionShape &shape, int threads);
template <class T>
void silu_mul(const T *gate_up, T *y, int64_t rows, int64_t inner, int threads);
template <class T>
void silu_mul_grad(const T *dy, const T *gate_up, T *d_gate_up, int64_t rows, int64_t inner, int threads);
template <class T>
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocab, int threads);
template <class T>
void rotate(const T *x, const T *cos, const T *sin, T *y, const Heads &heads, float sign, int threads);
template <class T>
void rms_norm(const T *x, const T *weight, T *y, float *inverse, int64_t rows, int64_t size, float eps, int threads);
template <class T>
void rms_norm_grad(const T *dy, const T *x, const T *weight, const float *inverse, T *dx, float *d_weight, int64_t rows,
                   int64_t size, int threads);
template <class T>
void combine_rows(const T *out, const float *weights, const int64_t *row_ids, const int64_t *token_offsets, T *y,
                  int64_t tokens, int64_t hidden, int threads);
template <class T>
void combine_rows_grad(const T *dy, const T *out, const float *weights, const int64_t *token_ids, T *d_out,
                       float *d_weights, int64_t rows, int64_t hidden, int threads);
template <class T, class B>
void grouped_linear(const T *x, const B *weight, T *y, const Grouped &grouped, int threads);
template <class T, class B>
void grouped_gated(const T *x, const B *weight, T *gate_up, T *y, const Grouped &grouped, int threads);
template <class T>
void grouped_linear_input_grad(const T *dy, const T *weight, T *dx, const Grouped &grouped, int threads);
template <class T>
void grouped_linear_weight_grad(const T *dy, const T *x, T *dw, const Grouped &grouped, int threads);
template <class T>
void grouped_linear_weight_grad_wide(const T *dy, const T *x, float *dw, Target target, const Grouped &grouped,
                                     int threads);

}  // namespace moesaic::MOESAIC_ISA
