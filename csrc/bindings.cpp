// What Python sees: arrays are checked here (array_checks.h), arithmetic happens elsewhere. Outputs are allocated by the
// caller.
#include "array_checks.h"

using namespace moesaic;

namespace moesaic {
void bind_packed(nb::module_ &m);
void bind_pack(nb::module_ &m);
void bind_probe(nb::module_ &m);
void bind_route(nb::module_ &m);
void bind_program(nb::module_ &m);
void bind_paged_attention(nb::module_ &m);
void bind_draw(nb::module_ &m);
}

namespace {

void bound_silu_mul(const Array &gate_up, const Array &y, int threads) {
    check_rank_2("gate_up", gate_up);
    if (size(gate_up, 1) % 2) refuse("gate_up", "has an odd last dimension; it must hold gate then up, equally wide");
    const int64_t rows = size(gate_up, 0), inner = size(gate_up, 1) / 2;
    check("y", y, {kind_of(gate_up)}, {rows, inner});
    nb::gil_scoped_release release;
    for_type(gate_up, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).silu_mul(data<T>(gate_up), data<T>(y), rows, inner, threads);
    });
}

void bound_silu_mul_grad(const Array &dy, const Array &gate_up, const Array &d_gate_up, int threads) {
    check_rank_2("gate_up", gate_up);
    if (size(gate_up, 1) % 2) refuse("gate_up", "has an odd last dimension; it must hold gate then up, equally wide");
    const int64_t rows = size(gate_up, 0), inner = size(gate_up, 1) / 2;
    check("dy", dy, {kind_of(gate_up)}, {rows, inner});
    check("d_gate_up", d_gate_up, {kind_of(gate_up)}, {rows, 2 * inner});
    nb::gil_scoped_release release;
    for_type(gate_up, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).silu_mul_grad(data<T>(dy), data<T>(gate_up), data<T>(d_gate_up), rows, inner, threads);
    });
}

void bound_cross_entropy(const Array &logits, const Array &targets, const Array &losses, int threads) {
    check_rank_2("logits", logits);
    const int64_t rows = size(logits, 0), vocab = size(logits, 1);
    check("targets", targets, {Kind::i64}, {rows});
    check("losses", losses, {Kind::f32}, {rows});
    for (int64_t row = 0; row < rows; ++row)
        if (data<int64_t>(targets)[row] >= vocab) refuse("targets", "hold an id past " + std::to_string(vocab - 1));
    nb::gil_scoped_release release;
    for_type(logits, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).cross_entropy(data<T>(logits), data<int64_t>(targets), data<float>(losses), rows, vocab,
                                        threads);
    });
}

void bound_rotate(const Array &x, const Array &cos, const Array &sin, const Array &y, float sign, int threads) {
    check("x_THA", x, floats, {any, any, any});
    check("cos", cos, {kind_of(x)}, {any, size(x, 2)});
    const Heads heads = {size(x, 0), size(x, 1), size(x, 2), size(cos, 0)};
    if (heads.head_dim % 2) refuse("x_THA", "has an odd head dimension; halves turn with each other");
    check("sin", sin, {kind_of(x)}, {heads.positions, heads.head_dim});
    check("y_THA", y, {kind_of(x)}, {heads.tokens, heads.num_heads, heads.head_dim});
    if (heads.tokens > 0 && heads.positions == 0) refuse("cos", "has no positions");
    nb::gil_scoped_release release;
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).rotate(data<T>(x), data<T>(cos), data<T>(sin), data<T>(y), heads, sign, threads);
    });
}

void bound_rms_norm(const Array &x, const Array &weight, const Array &y, const Array &inverse, float eps, int threads) {
    check_rank_2("x", x);
    const int64_t rows = size(x, 0), width = size(x, 1);
    check("weight", weight, {kind_of(x)}, {width});
    check("y", y, {kind_of(x)}, {rows, width});
    check("inverse", inverse, {Kind::f32}, {rows});
    nb::gil_scoped_release release;
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).rms_norm(data<T>(x), data<T>(weight), data<T>(y), data<float>(inverse), rows, width, eps,
                                   threads);
    });
}

void bound_rms_norm_grad(const Array &dy, const Array &x, const Array &weight, const Array &inverse, const Array &dx,
                         const Array &d_weight, int threads) {
    check_rank_2("x", x);
    const int64_t rows = size(x, 0), width = size(x, 1);
    check("dy", dy, {kind_of(x)}, {rows, width});
    check("weight", weight, {kind_of(x)}, {width});
    check("inverse", inverse, {Kind::f32}, {rows});
    check("dx", dx, {kind_of(x)}, {rows, width});
    check("d_weight", d_weight, {Kind::f32}, {width});
    nb::gil_scoped_release release;
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).rms_norm_grad(data<T>(dy), data<T>(x), data<T>(weight), data<float>(inverse), data<T>(dx),
                                        data<float>(d_weight), rows, width, threads);
    });
}

void bound_adamw(const Array &weight, const Array &gradient, const Array &first, const Array &second,
                 const std::optional<Array> &rounded, const std::optional<Array> &average,
                 const std::array<float, 9> &numbers, int threads) {
    check("weight", weight, {Kind::f32}, {any});
    const int64_t count = size(weight, 0);
    check("gradient", gradient, {Kind::f32}, {count});
    check("first", first, {Kind::f32}, {count});
    check("second", second, {Kind::f32}, {count});
    if (rounded) check("rounded", *rounded, {Kind::bf16}, {count});
    if (average) check("average", *average, {Kind::f32}, {count});
    const auto [clip, kept, fresh1, beta2, fresh2, rate, second_root, eps, newest] = numbers;
    const AdamStep step{clip, kept, fresh1, beta2, fresh2, rate, second_root, eps, newest};
    const AdamTensors tensors{data<float>(weight),
                              data<float>(first),
                              data<float>(second),
                              data<float>(gradient),
                              rounded ? data<bf16>(*rounded) : nullptr,
                              average ? data<float>(*average) : nullptr};
    nb::gil_scoped_release release;
    chosen().adamw(tensors, step, count, threads);
}

AttentionShape check_heads(const Array &q, const Array &k, const Array &v) {
    check("q_BSHA", q, floats, {any, any, any, any});
    check("k_BSGA", k, {kind_of(q)}, {size(q, 0), size(q, 1), any, size(q, 3)});
    const AttentionShape shape{size(q, 0), size(q, 1), size(q, 2), size(k, 2), size(q, 3)};
    check("v_BSGA", v, {kind_of(q)}, {shape.batch, shape.length, shape.num_groups, shape.head_dim});
    if (shape.num_groups < 1 || shape.num_heads % shape.num_groups)
        refuse("k_BSGA", "has a number of heads that does not divide that of the queries");
    return shape;
}

void bound_causal_attention(const Array &q, const Array &k, const Array &v, const Array &out, const Array &log_sum,
                            int threads) {
    const AttentionShape shape = check_heads(q, k, v);
    check("out_BSHA", out, {kind_of(q)}, {shape.batch, shape.length, shape.num_heads, shape.head_dim});
    check("log_sum_BHS", log_sum, {Kind::f32}, {shape.batch, shape.num_heads, shape.length});
    nb::gil_scoped_release release;
    for_type(q, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).causal_attention(data<T>(q), data<T>(k), data<T>(v), data<T>(out), data<float>(log_sum),
                                           shape, threads);
    });
}

void bound_causal_attention_grad(const Array &d_out, const Array &q, const Array &k, const Array &v, const Array &out,
                                 const Array &log_sum, const Array &dq, const Array &dk, const Array &dv, int threads) {
    const AttentionShape shape = check_heads(q, k, v);
    const Kind kind = kind_of(q);
    for (const auto &[name, array] : {std::pair{"d_out_BSHA", &d_out}, {"out_BSHA", &out}, {"dq_BSHA", &dq}})
        check(name, *array, {kind}, {shape.batch, shape.length, shape.num_heads, shape.head_dim});
    for (const auto &[name, array] : {std::pair{"dk_BSGA", &dk}, {"dv_BSGA", &dv}})
        check(name, *array, {kind}, {shape.batch, shape.length, shape.num_groups, shape.head_dim});
    check("log_sum_BHS", log_sum, {Kind::f32}, {shape.batch, shape.num_heads, shape.length});
    nb::gil_scoped_release release;
    for_type(q, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AttentionGrad<T> grad{data<T>(d_out), data<T>(q), data<T>(k), data<T>(v), data<T>(out),
                                    data<float>(log_sum), data<T>(dq), data<T>(dk), data<T>(dv)};
        chosen().of(type).causal_attention_grad(grad, shape, threads);
    });
}

void bound_combine_rows(const Array &out, const Array &weights, const Array &row_ids, const Array &token_offsets,
                        const Array &y, int threads) {
    check_rank_2("out_RD", out);
    const int64_t rows = size(out, 0), hidden = size(out, 1);
    check("weights_R", weights, {Kind::f32}, {rows});
    check("row_ids_R", row_ids, {Kind::i64}, {rows});
    check("token_offsets", token_offsets, {Kind::i64}, {any});
    const int64_t tokens = size(token_offsets, 0) - 1;
    check("y_TD", y, {kind_of(out)}, {tokens, hidden});
    check_indices("row_ids_R", row_ids, rows);
    check_offsets("token_offsets", token_offsets, rows);
    nb::gil_scoped_release release;
    for_type(out, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).combine_rows(data<T>(out), data<float>(weights), data<int64_t>(row_ids),
                                       data<int64_t>(token_offsets), data<T>(y), tokens, hidden, threads);
    });
}

void bound_combine_rows_grad(const Array &dy, const Array &out, const Array &weights, const Array &token_ids,
                             const Array &d_out, const Array &d_weights, int threads) {
    check_rank_2("out_RD", out);
    const int64_t rows = size(out, 0), hidden = size(out, 1);
    const Kind kind = kind_of(out);
    check("dy_TD", dy, {kind}, {any, hidden});
    check("weights_R", weights, {Kind::f32}, {rows});
    check("token_ids_R", token_ids, {Kind::i64}, {rows});
    check("d_out_RD", d_out, {kind}, {rows, hidden});
    check("d_weights_R", d_weights, {Kind::f32}, {rows});
    check_indices("token_ids_R", token_ids, size(dy, 0));
    nb::gil_scoped_release release;
    for_type(out, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).combine_rows_grad(data<T>(dy), data<T>(out), data<float>(weights), data<int64_t>(token_ids),
                                            data<T>(d_out), data<float>(d_weights), rows, hidden, threads);
    });
}

constexpr auto only_bf16 = {Kind::bf16};

// Checks what every grouped product has: rows of inputs, a stack of matrices, offsets; and describes it.
Grouped check_grouped(const Array &x, const Array &weight, const Array &offsets, int64_t few_rows, int64_t max_rows,
                      std::initializer_list<Kind> weight_kinds) {
    check_rank_2("x_RI", x);
    const int64_t inputs = size(x, 1);
    check("weight_EOI", weight, weight_kinds, {any, any, inputs});
    const int64_t num_experts = size(weight, 0);
    check("offsets", offsets, {Kind::i64}, {num_experts + 1});
    check_offsets("offsets", offsets, size(x, 0));
    return {num_experts, inputs, size(weight, 1), data<int64_t>(offsets), few_rows, max_rows};
}

// What weights may be beside these rows: no wider.
std::initializer_list<Kind> weight_kinds(const Array &x) { return is(x, Kind::f32) ? floats : only_bf16; }

void bound_grouped_linear(const Array &x, const Array &weight, const Array &offsets, const Array &y, int64_t few_rows,
                          int64_t max_rows, int threads) {
    const Grouped grouped = check_grouped(x, weight, offsets, few_rows, max_rows, weight_kinds(x));
    check("y_RO", y, {kind_of(x)}, {size(x, 0), grouped.outputs});
    nb::gil_scoped_release release;
    if (kind_of(x) != kind_of(weight)) {
        chosen().grouped_linear_b16(data<float>(x), data<bf16>(weight), data<float>(y), grouped, threads);
        return;
    }
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).grouped_linear(data<T>(x), data<T>(weight), data<T>(y), grouped, threads);
    });
}

void bound_grouped_gated(const Array &x, const Array &weight, const Array &offsets, const Array &gate_up,
                         const Array &y, int64_t few_rows, int threads) {
    const Grouped grouped = check_grouped(x, weight, offsets, few_rows, INT64_MAX, weight_kinds(x));
    if (grouped.outputs % 2) refuse("weight_EGI", "has an odd number of rows; it must hold gate then up, equally many");
    check("gate_up_RG", gate_up, {kind_of(x)}, {size(x, 0), grouped.outputs});
    check("y_RF", y, {kind_of(x)}, {size(x, 0), grouped.outputs / 2});
    nb::gil_scoped_release release;
    if (kind_of(x) != kind_of(weight)) {
        chosen().grouped_gated_b16(data<float>(x), data<bf16>(weight), data<float>(gate_up), data<float>(y), grouped,
                                   threads);
        return;
    }
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).grouped_gated(data<T>(x), data<T>(weight), data<T>(gate_up), data<T>(y), grouped, threads);
    });
}

void bound_grouped_linear_input_grad(const Array &dy, const Array &weight, const Array &offsets, const Array &dx,
                                     int64_t max_rows, int threads) {
    check_rank_2("dx_RI", dx);
    const Grouped grouped = check_grouped(dx, weight, offsets, 0, max_rows, {kind_of(dx)});
    check("dy_RO", dy, {kind_of(dx)}, {size(dx, 0), grouped.outputs});
    nb::gil_scoped_release release;
    for_type(dx, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        chosen().of(type).grouped_linear_input_grad(data<T>(dy), data<T>(weight), data<T>(dx), grouped, threads);
    });
}

void bound_grouped_linear_weight_grad(const Array &dy, const Array &x, const Array &offsets, const Array &dw,
                                      bool fresh, bool accumulate, int64_t max_rows, int threads) {
    check_rank_2("x_RI", x);
    const int64_t rows = size(x, 0), inputs = size(x, 1);
    check("dy_RO", dy, {kind_of(x)}, {rows, any});
    check("dw_EOI", dw, {Kind::f32, kind_of(x)}, {any, size(dy, 1), inputs});
    check("offsets", offsets, {Kind::i64}, {size(dw, 0) + 1});
    check_offsets("offsets", offsets, rows);
    const bool wide = kind_of(dw) == Kind::f32;
    if (accumulate && !wide) refuse("dw_EOI", "is bfloat16; sums of several gradients are kept in float32");
    const Grouped grouped{size(dw, 0), inputs, size(dy, 1), data<int64_t>(offsets), 0, max_rows};
    const Target target = accumulate ? Target::sums : fresh ? Target::fresh : Target::reused;
    nb::gil_scoped_release release;
    for_type(x, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto &kernels = chosen().of(type);
        if (wide)
            kernels.grouped_linear_weight_grad_wide(data<T>(dy), data<T>(x), data<float>(dw), target, grouped, threads);
        else kernels.grouped_linear_weight_grad(data<T>(dy), data<T>(x), data<T>(dw), grouped, threads);
    });
}

void bound_select_topk(const Array &scores, const Array &ids, int threads) {
    check("scores_TE", scores, {Kind::f32}, {any, any});
    check("ids_TK", ids, {Kind::i64}, {size(scores, 0), any});
    if (size(ids, 1) > size(scores, 1)) refuse("top_k", "is more than there are experts");
    nb::gil_scoped_release release;
    select_topk(data<float>(scores), data<int64_t>(ids), size(scores, 0), size(scores, 1), size(ids, 1), threads);
}

int64_t bound_sort_rows(const Array &expert_ids, const Array &token_ids, const Array &choices, const Array &offsets) {
    check("expert_ids_TK", expert_ids, {Kind::i64}, {any, any});
    check("offsets", offsets, {Kind::i64}, {any});
    const int64_t tokens = size(expert_ids, 0), top_k = size(expert_ids, 1), num_experts = size(offsets, 0) - 1;
    check("token_ids_R", token_ids, {Kind::i64}, {tokens * top_k});
    check("choice_R", choices, {Kind::i64}, {tokens * top_k});
    int64_t rows = 0;
    {
        nb::gil_scoped_release release;
        rows = sort_rows(data<int64_t>(expert_ids), data<int64_t>(token_ids), data<int64_t>(choices),
                         data<int64_t>(offsets), tokens, top_k, num_experts);
    }
    if (rows < 0)
        refuse("expert_ids_TK", "holds expert " + std::to_string(data<int64_t>(expert_ids)[-1 - rows]) + " of " +
                                    std::to_string(num_experts) + "; ids run from 0, and -1 means no row");
    return rows;
}

void bound_gather_rows(const Array &x, const Array &token_ids, const Array &rows_out, int threads) {
    check_rank_2("x_TD", x);
    const int64_t rows = size(token_ids, 0), hidden = size(x, 1);
    check("token_ids_R", token_ids, {Kind::i64}, {any});
    check("x_RD", rows_out, {kind_of(x)}, {rows, hidden});
    check_indices("token_ids_R", token_ids, size(x, 0));
    nb::gil_scoped_release release;
    gather_rows(x.data(), data<int64_t>(token_ids), rows_out.data(), rows,
                hidden * static_cast<int64_t>(x.itemsize()), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    bind_pack(m);
    bind_probe(m);
    bind_route(m);
    bind_program(m);
    m.doc() = "Compiled kernels of moesaic; use moesaic.kernels.ops.";
    m.def("available_isas", &available_isas, "Instruction sets compiled in that this processor has, worst first.");
    m.def("isa", [] { return std::string(chosen().isa); }, "The instruction set in use.");
    m.def("use_isa", &use_isa, nb::arg("name"), "Use another available instruction set; False when it is not.");
    m.def("has_threads", [] {
#ifdef _OPENMP
        return true;
#else
        return false;
#endif
    }, "Whether the kernels were built with OpenMP.");
    m.def("select_topk", &bound_select_topk, nb::arg("scores_TE"), nb::arg("ids_TK"), nb::arg("threads"));
    m.def("sort_rows", &bound_sort_rows, nb::arg("expert_ids_TK"), nb::arg("token_ids_R"), nb::arg("choice_R"),
          nb::arg("offsets"));
    m.def("gather_rows", &bound_gather_rows, nb::arg("x_TD"), nb::arg("token_ids_R"), nb::arg("x_RD"),
          nb::arg("threads"));
    m.def("combine_rows", &bound_combine_rows, nb::arg("out_RD"), nb::arg("weights_R"), nb::arg("row_ids_R"),
          nb::arg("token_offsets"), nb::arg("y_TD"), nb::arg("threads"));
    m.def("combine_rows_grad", &bound_combine_rows_grad, nb::arg("dy_TD"), nb::arg("out_RD"), nb::arg("weights_R"),
          nb::arg("token_ids_R"), nb::arg("d_out_RD"), nb::arg("d_weights_R"), nb::arg("threads"));
    m.def("grouped_linear", &bound_grouped_linear, nb::arg("x_RI"), nb::arg("weight_EOI"), nb::arg("offsets"),
          nb::arg("y_RO"), nb::arg("few_rows"), nb::arg("max_rows"), nb::arg("threads"));
    m.def("grouped_gated", &bound_grouped_gated, nb::arg("x_RI"), nb::arg("weight_EGI"), nb::arg("offsets"),
          nb::arg("gate_up_RG"), nb::arg("y_RF"), nb::arg("few_rows"), nb::arg("threads"));
    m.def("grouped_linear_input_grad", &bound_grouped_linear_input_grad, nb::arg("dy_RO"), nb::arg("weight_EOI"),
          nb::arg("offsets"), nb::arg("dx_RI"), nb::arg("max_rows"), nb::arg("threads"));
    m.def("grouped_linear_weight_grad", &bound_grouped_linear_weight_grad, nb::arg("dy_RO"), nb::arg("x_RI"),
          nb::arg("offsets"), nb::arg("dw_EOI"), nb::arg("fresh"), nb::arg("accumulate"), nb::arg("max_rows"), nb::arg("threads"));
    m.def("silu_mul", &bound_silu_mul, nb::arg("gate_up"), nb::arg("y"), nb::arg("threads"));
    m.def("cross_entropy", &bound_cross_entropy, nb::arg("logits"), nb::arg("targets"), nb::arg("losses"),
          nb::arg("threads"));
    m.def("rotate", &bound_rotate, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"), nb::arg("sign"),
          nb::arg("threads"));
    m.def("causal_attention", &bound_causal_attention, nb::arg("q_BSHA"), nb::arg("k_BSGA"), nb::arg("v_BSGA"),
          nb::arg("out_BSHA"), nb::arg("log_sum_BHS"), nb::arg("threads"));
    m.def("causal_attention_grad", &bound_causal_attention_grad, nb::arg("d_out_BSHA"), nb::arg("q_BSHA"),
          nb::arg("k_BSGA"), nb::arg("v_BSGA"), nb::arg("out_BSHA"), nb::arg("log_sum_BHS"), nb::arg("dq_BSHA"),
          nb::arg("dk_BSGA"), nb::arg("dv_BSGA"), nb::arg("threads"));
    m.def("adamw", &bound_adamw, nb::arg("weight"), nb::arg("gradient"), nb::arg("first"), nb::arg("second"),
          nb::arg("rounded").none(), nb::arg("average").none(), nb::arg("numbers"), nb::arg("threads"));
    m.def("rms_norm", &bound_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("inverse"),
          nb::arg("eps"), nb::arg("threads"));
    m.def("rms_norm_grad", &bound_rms_norm_grad, nb::arg("dy"), nb::arg("x"), nb::arg("weight"), nb::arg("inverse"),
          nb::arg("dx"), nb::arg("d_weight"), nb::arg("threads"));
    m.def("silu_mul_grad", &bound_silu_mul_grad, nb::arg("dy"), nb::arg("gate_up"), nb::arg("d_gate_up"),
          nb::arg("threads"));
    bind_paged_attention(m);
    bind_draw(m);
    bind_packed(m);
}
