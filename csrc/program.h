// A model as a list of steps over buffers of rows: what the engine runs once for every batch of tokens. Layers beside
// the model itself are further sections of the list, each of which runs by itself.
//
// Whoever builds a program (engine/lower) says which buffers a step reads and writes; the steps know no model. All of
// a batch's tokens go through each step together, whether they belong to a prompt or are the newest of their text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "paged.h"
#include "pool.h"
#include "row_ops.h"

namespace moesaic {

// T tokens of S texts. Position p of a text is in block tables[text][p / block_tokens] of every layer's cache.
struct Batch {
    int64_t tokens;
    const int64_t *token_ids, *positions;  // [T]
    const int32_t *text_of;                // [T]
    const int32_t *tables;                 // [S, table_width]
    int64_t table_width;
    const int64_t *output_rows;  // [N], of the tokens whose logits are wanted
    int64_t outputs;
    float *logits;  // [N, V]
};

// What the routers of a batch chose: ids (-1: none) and weights, [T, columns] for every layer that routes; the newest
// layer's rows sorted by expert. dictated: choices that stand in for a layer's own, which are then weighed anew.
struct Choices {
    struct Layer {
        int64_t layer, columns, num_experts;
        int section;
        std::vector<int64_t> ids = {}, dictated = {};
        std::vector<float> weights = {};
    };
    std::vector<Layer> layers = {};
    // The ids of all layers of the model itself, layer after layer, of so many tokens: none where another section ran, or
    // the model itself not to its end.
    std::vector<int32_t> newest = {};
    int64_t newest_tokens = 0;
    int64_t rows = 0, columns = 0;
    std::vector<int64_t> offsets = {}, token_ids = {}, row_of = {};
    std::vector<float> row_weights = {};
};

class Program;

struct Step {
    std::string part;  // what it is a part of: attention, router, experts, ...
    int64_t layer;     // -1: of none
    int buffer = -1;    // what it writes: `size` floats of each row from `offset` on; -1: nothing to look at
    int64_t offset = 0, size = 0;
    std::function<void(const Batch &, Program &)> run;
    // The experts whose output for a row is not finite, where the step is of experts.
    std::function<std::vector<int64_t>(Program &, int64_t row)> broken_experts = {};
    double seconds = 0;
};

// Where a run first met a number that is infinite or none; experts: those of the row whose output it is in.
struct NotFinite {
    std::string part;
    int64_t layer = -1, row = -1;
    std::vector<int64_t> experts = {};
};

bool is_finite(const float *x, int64_t size);

class Program {
public:
    explicit Program(int threads) : pool_(threads) {}

    // A buffer of rows of so many floats; its number.
    int add_buffer(int64_t width);
    void widen(int buffer, int64_t width);
    int64_t width(int buffer) const { return buffers_.at(static_cast<size_t>(buffer)).width; }
    RowsOf rows(int buffer, int64_t offset = 0);
    // Tokens that the buffers have room for: no fewer than the newest batch had.
    int64_t room() const { return room_; }
    void add_step(Step step) { steps_.push_back(std::move(step)); }
    // Steps belong to a new section from now on; its number. The first is 0.
    int begin_section();
    int sections() const { return static_cast<int>(starts_.size()); }

    // Token ids must be below `vocab`, and positions below `positions`; the least that was said holds.
    void limit_vocab(int64_t vocab) { vocab_ = vocab < vocab_ ? vocab : vocab_; }
    void limit_positions(int64_t positions) { positions_ = positions < positions_ ? positions : positions_; }
    void set_logits(int64_t logits) { logits_ = logits; }
    // Raises std::invalid_argument for a batch that would be read past an end.
    void check(const Batch &batch, int64_t texts, int64_t logits) const;

    // Whether all logits are finite.
    bool run(const Batch &batch, int section);
    // The same, looking at what every step wrote: the first that is not finite, or a row of -1.
    NotFinite run_checked(const Batch &batch, int section);

    Pool &pool() { return pool_; }
    int threads() const { return pool_.threads(); }
    std::vector<PagedCache> &caches() { return caches_; }
    Choices &choices() { return choices_; }
    const std::vector<Step> &steps() const { return steps_; }
    int64_t bytes() const;
    void reset_times();

private:
    struct Buffer {
        int64_t width;
        float *memory = nullptr;
    };
    struct Release {
        void operator()(float *memory) const;
    };

    struct Steps {
        Step *first, *last;
        Step *begin() const { return first; }
        Step *end() const { return last; }
    };

    void begin(const Batch &batch);
    void make_room(int64_t tokens);
    Steps steps_of(int section);

    Pool pool_;
    int64_t vocab_ = INT64_MAX, positions_ = INT64_MAX, logits_ = 0;
    std::vector<Buffer> buffers_;
    std::vector<std::unique_ptr<float, Release>> memory_;
    int64_t room_ = 0;  // tokens
    std::vector<PagedCache> caches_;
    Choices choices_;
    std::vector<Step> steps_;
    std::vector<size_t> starts_ = {0};  // of sections
};

}  // namespace moesaic
