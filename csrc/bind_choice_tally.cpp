// The experts that a program's batches chose, added up for somebody who listens.
//
// After a step of decoding the caches are full of weights, and the counts of all layers' experts are many lines in
// memory. So a batch's choices are only set down behind those before it, and counted once there are many.
#include "bind_program.h"

namespace moesaic {
namespace {

constexpr size_t most_kept = 1 << 14;

class ChoiceTally {
public:
    explicit ChoiceTally(Program &program) : program_(program) {
        int64_t experts = 0;
        for (const Choices::Layer &layer : program.choices().layers) {
            if (layer.section != 0) continue;
            layers_.push_back({layer.columns, layer.num_experts, experts});
            experts += layer.num_experts;
        }
        counts_.resize(static_cast<size_t>(experts));
        last_.resize(static_cast<size_t>(experts));
        distinct_.resize(layers_.size());
    }

    // Takes what the newest batch chose; nothing where that was of another section than the model itself.
    void hear() {
        const Choices &choices = program_.choices();
        if (!choices.newest_tokens) return;
        tokens_ += choices.newest_tokens;
        kept_.push_back(static_cast<int32_t>(choices.newest_tokens));
        kept_.insert(kept_.end(), choices.newest.begin(), choices.newest.end());
        if (kept_.size() >= most_kept) count();
    }

    int64_t read(const Array &counts, const Array &distinct) {
        check("counts", counts, {Kind::i64}, {static_cast<int64_t>(counts_.size())});
        check("distinct", distinct, {Kind::i64}, {static_cast<int64_t>(distinct_.size())});
        count();
        std::copy(counts_.begin(), counts_.end(), data<int64_t>(counts));
        std::copy(distinct_.begin(), distinct_.end(), data<int64_t>(distinct));
        return tokens_;
    }

    void clear() {
        kept_.clear();
        std::fill(counts_.begin(), counts_.end(), 0);
        std::fill(distinct_.begin(), distinct_.end(), 0);
        tokens_ = 0;
    }

private:
    struct Layer {
        int64_t columns, num_experts, first;  // place in counts_
    };

    void count() {
        for (const int32_t *at = kept_.data(), *end = at + kept_.size(); at < end;) {
            const int64_t tokens = *at++;
            ++batch_;
            for (size_t l = 0; l < layers_.size(); ++l) {
                const Layer &layer = layers_[l];
                for (const int32_t *last = at + tokens * layer.columns; at < last; ++at)
                    if (*at >= 0 && *at < layer.num_experts) add(static_cast<size_t>(layer.first + *at), l);
            }
        }
        kept_.clear();
    }

    void add(size_t expert, size_t layer) {
        ++counts_[expert];
        distinct_[layer] += last_[expert] != batch_;
        last_[expert] = batch_;
    }

    Program &program_;
    std::vector<Layer> layers_;
    std::vector<int32_t> kept_;  // of each batch: its tokens, then their choices in every layer
    std::vector<int64_t> counts_, distinct_;
    std::vector<int64_t> last_;  // batch that each expert had work in
    int64_t tokens_ = 0, batch_ = 0;
};

}  // namespace

void bind_choice_tally(nb::module_ &m) {
    nb::class_<ChoiceTally>(m, "ChoiceTally", "The experts that a program's batches chose, added up.")
        .def(nb::init<Program &>(), nb::arg("program"), nb::keep_alive<1, 2>())
        .def("hear", &ChoiceTally::hear, "Add the newest batch, if the model itself ran it.")
        .def("read", &ChoiceTally::read, nb::arg("counts"), nb::arg("distinct"),
             "Copy the rows of each expert, layer after layer, and the experts of each layer that batches had work "
             "for, added up, both int64; the number of tokens.")
        .def("clear", &ChoiceTally::clear, "Begin again.");
}

}  // namespace moesaic
