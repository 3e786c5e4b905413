// Packed weights as Python sees them: their size, their products, a whole feed-forward block.
#include <nanobind/stl/pair.h>

#include "packed_checks.h"

namespace moesaic {
namespace {

int64_t bound_packed_bytes(const std::string &format, int64_t outputs, int64_t inputs, int64_t group, bool paired) {
    return check_packed(format, outputs, inputs, group, paired).bytes();
}

// Raises ValueError unless `array` is fp32 [rows, columns] whose rows are contiguous, however far apart.
void check_rows(const char *name, const Array &array, int64_t rows, int64_t columns) {
    if (!is(array, Kind::f32)) refuse(name, "has a dtype that this operation does not take; use float32");
    if (array.ndim() != 2 || (rows != any && size(array, 0) != rows) || (columns != any && size(array, 1) != columns))
        refuse(name, "has shape " + shape_text(array) + "; it must be [" + (rows == any ? "*" : std::to_string(rows)) +
                         ", " + (columns == any ? "*" : std::to_string(columns)) + "]");
    if (array.size() && size(array, 1) > 1 && array.stride(1) != 1) refuse(name, "has rows that are not contiguous");
}

// A single row may come with any stride.
int64_t row_stride(const Array &array) { return size(array, 0) > 1 ? array.stride(0) : size(array, 1); }

const float *bias_of(const char *name, const std::optional<Array> &bias, int64_t num_experts, int64_t outputs) {
    if (!bias) return nullptr;
    check(name, *bias, {Kind::f32}, {num_experts, outputs});
    return data<float>(*bias);
}

void bound_packed_linear(const Array &x, const Array &weights, const Array &offsets, const Array &y,
                         const std::string &format, int64_t group, bool paired, int threads,
                         const std::optional<Array> &bias, std::optional<float> multiplier) {
    check_rows("x_RI", x, any, any);
    check_rows("y_RO", y, size(x, 0), any);
    const PackedShape shape = check_packed(format, size(y, 1), size(x, 1), group, paired);
    check("weights", weights, {Kind::u8}, {any, shape.bytes()});
    const int64_t num_experts = size(weights, 0);
    check("offsets", offsets, {Kind::i64}, {num_experts + 1});
    check_offsets("offsets", offsets, size(x, 0));
    PackedLinear linear{};
    linear.shape = shape;
    linear.weights = data<uint8_t>(weights);
    linear.bias = bias_of("bias_EO", bias, num_experts, shape.outputs);
    linear.offsets = data<int64_t>(offsets);
    linear.num_experts = num_experts;
    linear.y = data<float>(y);
    linear.y_stride = row_stride(y);
    linear.add = multiplier.has_value();
    linear.multiplier = multiplier.value_or(1.0f);
    nb::gil_scoped_release release;
    chosen().packed_linear(data<float>(x), row_stride(x), size(x, 0), linear, threads);
}

ExpertRows check_expert_rows(const std::optional<Array> &offsets, const std::optional<Array> &weights,
                             const std::optional<Array> &row_of, bool weight_on_input, int64_t num_experts,
                             int64_t tokens) {
    ExpertRows rows{};
    rows.weight_on_input = weight_on_input;
    if (!offsets != !row_of || (!offsets && weights))
        refuse("offsets", "and row_of_TK come together, weights_R with them");
    if (!offsets) {
        if (num_experts != 1) refuse("offsets", "are missing; without them there is one expert");
        return rows;
    }
    check("offsets", *offsets, {Kind::i64}, {num_experts + 1});
    rows.offsets = data<int64_t>(*offsets);
    const int64_t count = rows.offsets[num_experts];
    check_offsets("offsets", *offsets, count);
    check("row_of_TK", *row_of, {Kind::i64}, {tokens, any});
    rows.row_of = data<int64_t>(*row_of);
    rows.top_k = size(*row_of, 1);
    for (int64_t i = 0; i < tokens * rows.top_k; ++i)
        if (rows.row_of[i] < -1 || rows.row_of[i] >= count)
            refuse("row_of_TK", "holds a row outside 0 to " + std::to_string(count - 1) + "; -1 means none");
    if (!weights) return rows;
    check("weights_R", *weights, {Kind::f32}, {count});
    rows.weights = data<float>(*weights);
    return rows;
}

using Layout = std::pair<std::string, int64_t>;  // format, group

void bound_packed_experts(const Array &x, const Array &into, const Array &down, const Array &out,
                          const std::optional<Array> &into_bias, const std::optional<Array> &down_bias,
                          const Layout &into_layout, const Layout &down_layout, int64_t inner, bool paired,
                          const std::string &activation, const std::array<float, 3> &figures,
                          const std::optional<Array> &offsets, const std::optional<Array> &weights,
                          const std::optional<Array> &row_of, bool weight_on_input, float multiplier, int threads) {
    check_rows("x_TD", x, any, any);
    check_rows("out_TD", out, size(x, 0), size(x, 1));
    PackedExperts experts{};
    experts.into_shape =
        check_packed(into_layout.first, inner * (paired ? 2 : 1), size(x, 1), into_layout.second, paired);
    experts.down_shape = check_packed(down_layout.first, size(x, 1), inner, down_layout.second, false);
    check("into", into, {Kind::u8}, {any, experts.into_shape.bytes()});
    experts.num_experts = size(into, 0);
    check("down", down, {Kind::u8}, {experts.num_experts, experts.down_shape.bytes()});
    experts.into = data<uint8_t>(into);
    experts.down = data<uint8_t>(down);
    experts.into_bias = bias_of("into_bias_EG", into_bias, experts.num_experts, experts.into_shape.outputs);
    experts.down_bias = bias_of("down_bias_ED", down_bias, experts.num_experts, experts.down_shape.outputs);
    experts.activation = check_activation(activation, figures[0], figures[1], figures[2]);
    const ExpertRows rows =
        check_expert_rows(offsets, weights, row_of, weight_on_input, experts.num_experts, size(x, 0));
    const ExpertTokens tokens{size(x, 0), data<float>(x), row_stride(x), data<float>(out), row_stride(out), multiplier};
    nb::gil_scoped_release release;
    chosen().packed_experts(experts, rows, tokens, threads);
}

}  // namespace

void bind_packed(nb::module_ &m) {
    m.def("packed_bytes", &bound_packed_bytes, nb::arg("format"), nb::arg("outputs"), nb::arg("inputs"),
          nb::arg("group"), nb::arg("paired"), "Bytes of one packed matrix.");
    m.def("packed_linear", &bound_packed_linear, nb::arg("x_RI"), nb::arg("weights"), nb::arg("offsets"),
          nb::arg("y_RO"), nb::arg("format"), nb::arg("group"), nb::arg("paired"), nb::arg("threads"),
          nb::arg("bias_EO").none() = nb::none(), nb::arg("multiplier").none() = nb::none());
    m.def("packed_experts", &bound_packed_experts, nb::arg("x_TD"), nb::arg("into"), nb::arg("down"), nb::arg("out_TD"),
          nb::arg("into_bias_EG").none(), nb::arg("down_bias_ED").none(), nb::arg("into_layout"),
          nb::arg("down_layout"), nb::arg("inner"), nb::arg("paired"), nb::arg("activation"), nb::arg("figures"),
          nb::arg("offsets").none(), nb::arg("weights_R").none(), nb::arg("row_of_TK").none(),
          nb::arg("weight_on_input"), nb::arg("multiplier"), nb::arg("threads"));
}

}  // namespace moesaic
