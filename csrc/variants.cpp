// The table of this instruction set.
#include "variants.h"

#define MOESAIC_TEXT_(x) #x
#define MOESAIC_TEXT(x) MOESAIC_TEXT_(x)

namespace moesaic::MOESAIC_ISA {

template <class T>
static constexpr Typed<T> typed = {
    causal_attention<T>, causal_attention_grad<T>, cross_entropy<T>, rotate<T>,
    silu_mul<T>,     silu_mul_grad<T>,     rms_norm<T>,       rms_norm_grad<T>,
    combine_rows<T>, combine_rows_grad<T>, grouped_linear<T, T>, grouped_gated<T, T>,      grouped_linear_input_grad<T>,
    grouped_linear_weight_grad<T>, grouped_linear_weight_grad_wide<T>,
};

extern const Kernels kernels = {MOESAIC_TEXT(MOESAIC_ISA), typed<float>, typed<bf16>, read_words, adamw, prepare_rows,
                                multiply_rows, packed_linear, packed_experts, norm_rows, rotate_rows, add_rows,
                                write_cache, paged_attention, pack, greatest_logits, weigh_logits,
                                grouped_linear<float, bf16>, grouped_gated<float, bf16>};

}  // namespace moesaic::MOESAIC_ISA
