// Steps of feed-forward parts: routers, experts, and dense blocks.
#include "bind_program.h"
#include "bind_route.h"
#include "scratch.h"

namespace moesaic {
namespace {

constexpr int logits_slot = 31;

// Name, limit, alpha and shift, of which only a clamped one has the latter.
using ActivationTuple = std::tuple<std::string, float, float, float>;

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
    program.choices().layers.push_back({label.layer, router.spec.columns()});
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

}  // namespace

void bind_expert_steps(nb::class_<Program> &program) {
    program.def("router", &add_router, nb::arg("label"), nb::arg("source"), nb::arg("matrix").none(),
                nb::arg("router"));
}

}  // namespace moesaic
