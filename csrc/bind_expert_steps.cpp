// Steps of feed-forward parts: routers, experts, and dense blocks.
#include <algorithm>

#include "bind_program.h"
#include "bind_route.h"
#include "scratch.h"

namespace moesaic {
namespace {

constexpr int logits_slot = 31;

// Name, limit, alpha and shift.
using ActivationTuple = std::tuple<std::string, float, float, float>;

// A feed-forward block of one expert or many, and what keeps its memory.
struct Block {
    Packed into, down;
    std::optional<Array> into_bias, down_bias;
    PackedActivation activation;

    PackedExperts experts() const {
        return {into.shape, down.shape,       into.bytes(), down.bytes(), floats_or_null(into_bias),
                floats_or_null(down_bias), into.count, activation};
    }
};

Block check_block(const Packed &into, const Packed &down, const std::optional<Array> &into_bias,
                  const std::optional<Array> &down_bias, const ActivationTuple &activation) {
    const int64_t inner = into.shape.paired ? into.shape.outputs / 2 : into.shape.outputs;
    if (down.count != into.count || down.shape.inputs != inner || down.shape.outputs != into.shape.inputs)
        refuse("down", "does not lead back from where `into` leads");
    if (into_bias) check("into_bias", *into_bias, {Kind::f32}, {into.count, into.shape.outputs});
    if (down_bias) check("down_bias", *down_bias, {Kind::f32}, {down.count, down.shape.outputs});
    const auto &[name, limit, alpha, shift] = activation;
    return {into, down, into_bias, down_bias, check_activation(name, limit, alpha, shift)};
}

ExpertTokens tokens_of(const Batch &batch, const RowsOf &from, const RowsOf &to, float multiplier) {
    return {batch.tokens, from.data, from.stride, to.data, to.stride, multiplier};
}

// Chooses experts for every token, or weighs those that were dictated; then sorts the choices by expert.
void choose(Choices &choices, Choices::Layer &own, const BoundRouter &router, const float *logits, const Batch &batch,
            int threads) {
    const int64_t count = batch.tokens * own.columns, experts = router.spec.num_experts;
    own.ids.resize(static_cast<size_t>(count));
    own.weights.resize(static_cast<size_t>(count));
    if (own.dictated.empty()) {
        route(logits, router.spec, batch.token_ids, own.ids.data(), own.weights.data(), batch.tokens, threads);
    } else {
        own.ids = own.dictated;
        weigh_choices(logits, router.spec, own.ids.data(), own.columns, own.weights.data(), batch.tokens, threads);
    }
    if (own.section == 0) choices.newest.insert(choices.newest.end(), own.ids.begin(), own.ids.end());
    choices.offsets.resize(static_cast<size_t>(experts) + 1);
    choices.token_ids.resize(static_cast<size_t>(count));
    choices.row_weights.resize(static_cast<size_t>(count));
    choices.row_of.resize(static_cast<size_t>(count));
    choices.columns = own.columns;
    choices.rows = sort_by_expert(own.ids.data(), own.weights.data(), batch.tokens, own.columns, experts,
                                  choices.offsets.data(), choices.token_ids.data(), choices.row_weights.data(),
                                  choices.row_of.data());
}

void add_router(Program &program, const Label &label, Place from, const std::optional<Packed> &matrix,
                const BoundRouter &router) {
    if (matrix) check_place("source", program, from, matrix->shape.inputs);
    if (matrix && matrix->shape.outputs != router.spec.choices()) refuse("matrix", "has another width than the router");
    if (router.vocab_size) program.limit_vocab(router.vocab_size);
    const size_t place = program.choices().layers.size();
    program.choices().layers.push_back(
        {label.layer, router.spec.columns(), router.spec.num_experts, program.sections() - 1});
    program.add_step({label.part, label.layer, -1, 0, 0, [=](const Batch &batch, Program &p) {
        float *logits = nullptr;
        if (matrix) {
            const int64_t width = router.spec.choices();
            logits = static_cast<float *>(scratch(logits_slot, batch.tokens * width * 4));
            multiply(*matrix, p.rows(from.buffer, from.offset), {logits, width}, batch.tokens, nullptr, {},
                          p.threads());
        }
        choose(p.choices(), p.choices().layers[place], router, logits, batch, p.threads());
    }});
}

// to += multiplier * block(from).
void feed_forward(Program &program, const Label &label, Place from, Place to, const Packed &into, const Packed &down,
                  const std::optional<Array> &into_bias, const std::optional<Array> &down_bias,
                  const ActivationTuple &activation, float multiplier) {
    const Block block = check_block(into, down, into_bias, down_bias, activation);
    const int64_t size = down.shape.outputs;
    check_place("source", program, from, into.shape.inputs);
    check_place("target", program, to, size);
    program.add_step({label.part, label.layer, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        const RowsOf source = p.rows(from.buffer, from.offset), target = p.rows(to.buffer, to.offset);
        chosen().packed_experts(block.experts(), {}, tokens_of(batch, source, target, multiplier), p.threads());
    }});
}

// Of the experts that a row went to those whose own output is not finite.
std::vector<int64_t> broken_experts(const Block &block, const Choices::Layer &choices, const RowsOf &from, int64_t row,
                                    int threads) {
    std::vector<int64_t> broken;
    std::vector<float> out(static_cast<size_t>(block.down.shape.outputs));
    const float weight = 1.0f;
    const int64_t row_of = 0;
    for (int64_t k = 0; k < choices.columns; ++k) {
        const int64_t expert = choices.ids[static_cast<size_t>(row * choices.columns + k)];
        if (expert < 0) continue;
        std::vector<int64_t> offsets(static_cast<size_t>(block.into.count) + 1, 0);
        for (int64_t e = expert + 1; e <= block.into.count; ++e) offsets[static_cast<size_t>(e)] = 1;
        std::fill(out.begin(), out.end(), 0.0f);
        const ExpertRows rows = {offsets.data(), &weight, &row_of, 1, false};
        const ExpertTokens tokens = {1, from.row(row), from.stride, out.data(), block.down.shape.outputs, 1.0f};
        chosen().packed_experts(block.experts(), rows, tokens, threads);
        if (!is_finite(out.data(), block.down.shape.outputs)) broken.push_back(expert);
    }
    return broken;
}

// The same of the experts that the router before this step chose, weighted.
void experts(Program &program, const Label &label, Place from, Place to, const Packed &into, const Packed &down,
             const std::optional<Array> &into_bias, const std::optional<Array> &down_bias,
             const ActivationTuple &activation, float multiplier, bool weight_on_input) {
    const Block block = check_block(into, down, into_bias, down_bias, activation);
    const int64_t size = down.shape.outputs;
    check_place("source", program, from, into.shape.inputs);
    check_place("target", program, to, size);
    if (program.choices().layers.empty()) refuse("experts", "have no router before them");
    const size_t router = program.choices().layers.size() - 1;
    const auto broken = [=](Program &p, int64_t row) {
        return broken_experts(block, p.choices().layers[router], p.rows(from.buffer, from.offset), row, p.threads());
    };
    program.add_step({label.part, label.layer, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        const Choices &choices = p.choices();
        const ExpertRows rows = {choices.offsets.data(), choices.row_weights.data(), choices.row_of.data(),
                                 choices.columns, weight_on_input};
        const RowsOf source = p.rows(from.buffer, from.offset), target = p.rows(to.buffer, to.offset);
        chosen().packed_experts(block.experts(), rows, tokens_of(batch, source, target, multiplier), p.threads());
    }, broken});
}

Choices::Layer &layer_of(Program &program, int64_t layer) {
    for (Choices::Layer &each : program.choices().layers)
        if (each.layer == layer) return each;
    refuse("layer", std::to_string(layer) + " does not route");
}

// The layers that route, and the choices that a token has in each.
std::vector<std::tuple<int64_t, int64_t>> routing_layers(Program &program) {
    std::vector<std::tuple<int64_t, int64_t>> all;
    for (const Choices::Layer &each : program.choices().layers) all.emplace_back(each.layer, each.columns);
    return all;
}

// Copies what the newest batch's tokens chose.
void read_choices(Program &program, int64_t layer, const Array &ids, const Array &weights) {
    const Choices::Layer &own = layer_of(program, layer);
    const auto count = static_cast<int64_t>(own.ids.size());
    check("ids", ids, {Kind::i64}, {count / own.columns, own.columns});
    check("weights", weights, {Kind::f32}, {count / own.columns, own.columns});
    std::copy(own.ids.begin(), own.ids.end(), data<int64_t>(ids));
    std::copy(own.weights.begin(), own.weights.end(), data<float>(weights));
}

// What stands in for a layer's own choices from now on; none: its own again.
void dictate(Program &program, int64_t layer, const std::optional<Array> &ids) {
    Choices::Layer &own = layer_of(program, layer);
    own.dictated.clear();
    if (!ids) return;
    check("ids", *ids, {Kind::i64}, {any, own.columns});
    const int64_t *first = data<int64_t>(*ids), *end = first + size(*ids, 0) * own.columns;
    for (const int64_t *id = first; id < end; ++id)
        if (*id < -1 || *id >= own.num_experts) refuse("ids", "hold an expert that there is not");
    own.dictated.assign(first, end);
}

}  // namespace

void bind_expert_steps(nb::class_<Program> &program) {
    program
        .def("router", &add_router, nb::arg("label"), nb::arg("source"), nb::arg("matrix").none(),
             nb::arg("router"))
        .def("feed_forward", &feed_forward, nb::arg("label"), nb::arg("source"), nb::arg("target"), nb::arg("into"),
             nb::arg("down"), nb::arg("into_bias").none(), nb::arg("down_bias").none(), nb::arg("activation"),
             nb::arg("multiplier"))
        .def("experts", &experts, nb::arg("label"), nb::arg("source"), nb::arg("target"), nb::arg("into"),
             nb::arg("down"), nb::arg("into_bias").none(), nb::arg("down_bias").none(), nb::arg("activation"),
             nb::arg("multiplier"), nb::arg("weight_on_input"))
        .def("routing_layers", &routing_layers)
        .def("read_choices", &read_choices, nb::arg("layer"), nb::arg("ids"), nb::arg("weights"))
        .def("dictate", &dictate, nb::arg("layer"), nb::arg("ids").none());
}

}  // namespace moesaic
