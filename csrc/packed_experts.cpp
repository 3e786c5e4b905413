// The feed-forward of tokens through packed experts in three sweeps: each token rounded once and laid where its experts
// find it; into the experts, activation and rounding again; down, and the weighted sum of each token's choices.
//
// Every output of a sweep is computed whole by one thread, and a token's choices are added in their order.
#include "packed_experts.h"

#include "fetch.h"
#include "packed_activation.h"
#include "packed_multiply.h"
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t tokens_ahead = 8;  // of the one whose choices are added up
constexpr int64_t rows_for_runs = 320;  // whose sums of several strips stay in the second cache

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

void copy_row(const PackedRows &rows, int64_t from, int64_t to, const PackedShape &shape) {
    uint8_t *values = static_cast<uint8_t *>(rows.values);
    const int64_t bytes = shape.row_bytes();
    std::memcpy(values + to * bytes, values + from * bytes, static_cast<size_t>(bytes));
    for (int64_t g = 0; g < shape.row_groups(); ++g) {
        rows.scales[g * rows.groups_apart + to] = rows.scales[g * rows.groups_apart + from];
        rows.starts[g * rows.groups_apart + to] = rows.starts[g * rows.groups_apart + from];
    }
}

// A token into the rows of all its choices; a weight on the input is multiplied before it is rounded.
void lay_token(const float *x, const int64_t *choices, const ExpertRows &chosen, const PackedShape &shape,
               const PackedRows &rows) {
    int64_t first = -1;
    for (int64_t k = 0; k < chosen.top_k; ++k) {
        const int64_t row = choices[k];
        if (row < 0) continue;
        if (chosen.weight_on_input && chosen.weights) {
            float *weighted = static_cast<float *>(scratch(inner_slot, shape.inputs * 4));
            const Vec weight = set(chosen.weights[row]);
            along(
                shape.inputs, [=](int64_t i) { store(weighted + i, load(x + i) * weight); },
                [=](int64_t i, int64_t n) { store(weighted + i, load(x + i, n) * weight, n); });
            prepare_inputs(weighted, 0, shape.inputs, shape, rows, row);
        } else if (first < 0) {
            prepare_inputs(x, 0, shape.inputs, shape, rows, row);
            first = row;
        } else {
            copy_row(rows, first, row, shape);
        }
    }
}

// One strip's sums of a row through the activation: 16 of F where gate and up are paired, else 32. Past the last of F
// there are sums of zeros.
void activate_strip(const float *sums, const float *bias, int64_t at, int64_t inner, const PackedExperts &experts,
                    float *h) {
    const bool paired = experts.into_shape.paired;
    const int64_t width = paired ? strip_outputs / 2 : strip_outputs;
    for (int64_t i = 0; i < width; i += Vec::lanes) {
        const int64_t left = at_most(inner - at - i, Vec::lanes);
        const auto biased = [&](Vec sum, int64_t first) {
            return bias && left > 0 ? sum + load(bias + first + at + i, left) : sum;
        };
        if (paired) {
            const Vec gate = biased(load(sums + i), 0), up = biased(load(sums + width + i), inner);
            store(h + i, gated(gate, up, experts.activation));
        } else {
            store(h + i, activated(biased(load(sums + i), 0), experts.activation));
        }
    }
}

inline const uint8_t *into_strip(const PackedExperts &experts, const Unit &unit, int64_t strip) {
    return experts.into + unit.expert * experts.into_shape.bytes() + strip * experts.into_shape.strip_bytes();
}
inline const uint8_t *down_strip(const PackedExperts &experts, const Unit &unit, int64_t strip) {
    return experts.down + unit.expert * experts.down_shape.bytes() + strip * experts.down_shape.strip_bytes();
}

// Strips `begin` to `end` of a unit's rows into its expert, activated and rounded for the way down. after: what is read
// then.
void go_in(const PackedExperts &experts, const Unit &unit, const PackedRows &rows, const PackedRows &inner_rows,
           int64_t begin, int64_t end, const uint8_t *after) {
    const PackedShape &shape = experts.into_shape;
    const int64_t width = strip_outputs / (shape.paired ? 2 : 1), inner = experts.down_shape.inputs;
    const int64_t span = (end - begin) * width;
    const float *bias = experts.into_bias ? experts.into_bias + unit.expert * shape.outputs : nullptr;
    const PackedRows own = rows_from(rows, unit.row, unit.rows, shape);
    float *sums = sums_in_scratch(unit.rows);
    float *h = static_cast<float *>(scratch(inner_slot, unit.rows * span * 4));
    for (int64_t strip = begin; strip < end; ++strip) {
        multiply_strip(into_strip(experts, unit, strip), shape, own, sums,
                       strip + 1 < end ? into_strip(experts, unit, strip + 1) : after);
        for (int64_t r = 0; r < unit.rows; ++r)
            activate_strip(sums + r * strip_outputs, bias, strip * width, inner, experts,
                           h + r * span + (strip - begin) * width);
    }
    for (int64_t r = 0; r < unit.rows; ++r)
        prepare_inputs(h + r * span, begin * width, at_most(end * width, inner), experts.down_shape, inner_rows,
                       unit.row + r);
}

// A strip of the way down for a unit's rows, its bias added; y [R, 32]. after: what is read then.
void go_down(const PackedExperts &experts, const Unit &unit, const PackedRows &inner_rows, int64_t strip, float *y,
             const uint8_t *after) {
    const PackedShape &shape = experts.down_shape;
    const int64_t size = at_most(shape.outputs - strip * strip_outputs, strip_outputs);
    {
        float *sums = y + unit.row * strip_outputs;
        multiply_strip(down_strip(experts, unit, strip), shape, rows_from(inner_rows, unit.row, unit.rows, shape), sums,
                       after);
        if (!experts.down_bias) return;
        const float *bias = experts.down_bias + unit.expert * shape.outputs + strip * strip_outputs;
        for (int64_t r = 0; r < unit.rows; ++r, sums += strip_outputs)
            along(
                size, [=](int64_t i) { store(sums + i, load(sums + i) + load(bias + i)); },
                [=](int64_t i, int64_t n) { store(sums + i, load(sums + i, n) + load(bias + i, n), n); });
    }
}

// out += multiplier * the sum of a token's rows of y, for one strip's outputs.
void combine(const ExpertRows &chosen, const int64_t *choices, const float *y, float multiplier, float *out,
             int64_t size) {
    constexpr int64_t vectors = strip_outputs / Vec::lanes;
    const bool weighted = chosen.weights && !chosen.weight_on_input;
    Vec total[vectors];
    for (Vec &each : total) each = set(0.0f);
    for (int64_t k = 0; k < chosen.top_k; ++k) {
        const int64_t row = choices[k];
        if (row < 0) continue;
        const float *from = y + row * strip_outputs;
        const Vec weight = set(weighted ? chosen.weights[row] : 1.0f);
        for (int64_t v = 0; v < vectors; ++v) total[v] = fma(weight, load(from + v * Vec::lanes), total[v]);
    }
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t i = v * Vec::lanes, left = size - i;
        if (left >= Vec::lanes) store(out + i, fma(set(multiplier), total[v], load(out + i)));
        else if (left > 0) store(out + i, fma(set(multiplier), total[v], load(out + i, left)), left);
    }
}

// What `combine` will read of a token, asked for: rows of y lie anywhere, and rows of `out` a power of two apart.
MOESAIC_INLINE void ask_for(const int64_t *choices, int64_t top_k, const float *y, const float *out) {
    constexpr int64_t bytes = strip_outputs * 4;
    fetch(reinterpret_cast<const uint8_t *>(out), bytes);
    for (int64_t k = 0; k < top_k; ++k)
        if (choices[k] >= 0) fetch(reinterpret_cast<const uint8_t *>(y + choices[k] * strip_outputs), bytes);
}

PackedRows rows_in_scratch(PackedSlot slot, int64_t rows, const PackedShape &shape) {
    return packed_rows_at(scratch(slot, packed_rows_bytes(rows, shape)), rows, shape);
}

}  // namespace

void packed_experts(const PackedExperts &experts, const ExpertRows &given, const ExpertTokens &tokens, int threads) {
    const PackedShape &into = experts.into_shape, &down = experts.down_shape;
    ExpertRows chosen = given;
    if (!chosen.row_of) chosen.top_k = 1;
    const auto choices_of = [&](int64_t token, int64_t &self) {
        return chosen.row_of ? chosen.row_of + token * chosen.top_k : &(self = token);
    };
    const int64_t num_rows = chosen.offsets ? chosen.offsets[experts.num_experts] : tokens.count;
    if (num_rows == 0) return;
    const PackedRows rows = rows_in_scratch(rows_slot, num_rows, into);
    const PackedRows inner_rows = rows_in_scratch(inner_rows_slot, num_rows, down);
    parallel_for(tokens.count, 1, threads_for(num_rows * into.inputs, 1 << 14, threads), [&](int64_t token) {
        int64_t self;
        lay_token(tokens.x + token * tokens.x_stride, choices_of(token, self), chosen, into, rows);
    });

    const Units units = units_of(chosen.offsets, experts.num_experts, num_rows);
    const auto work = [&](const PackedShape &shape) {
        return units.count * shape.bytes() + num_rows * shape.strips() * shape.padded_inputs();
    };
    // What is rounded together on the way down is computed by one thread.
    const int64_t width = strip_outputs / (into.paired ? 2 : 1);
    const int64_t granule = down.row_group() > width ? down.row_group() / width : 1;
    int useful = threads_for(work(into), 1 << 15, threads);
    const int64_t in_strips = into.strips(), some = strips_an_item(into, units.count, granule, useful);
    const int64_t chunks = (in_strips + some - 1) / some;
    parallel_for(units.count * chunks, 1, useful, [&](int64_t item) {
        const int64_t begin = item % chunks * some, next = at_most(item + 1, units.count * chunks - 1);
        go_in(experts, units.list[item / chunks], rows, inner_rows, begin, at_most(begin + some, in_strips),
              into_strip(experts, units.list[next / chunks], next % chunks * some));
    });

    // A thread takes a strip through all experts, and then has all that its outputs of every token are the sum of.
    useful = threads_for(work(down), 1 << 15, threads);
    const int64_t together = num_rows <= rows_for_runs ? 4 : 1, apart = (num_rows + spare_rows) * strip_outputs;
    parallel_for((down.strips() + together - 1) / together, 1, useful, [&](int64_t item) {
        float *y = static_cast<float *>(scratch(outputs_slot, together * apart * 4));
        const int64_t begin = item * together, end = at_most(begin + together, down.strips());
        for (int64_t u = 0; u < units.count; ++u)  // rows rise: what is written past a unit's last is the next one's
            for (int64_t strip = begin; strip < end; ++strip) {
                const bool ends = strip + 1 == end, last = u + 1 == units.count;
                const Unit &next = units.list[!ends ? u : last ? 0 : u + 1];
                go_down(experts, units.list[u], inner_rows, strip, y + (strip - begin) * apart,
                        down_strip(experts, next, !ends || last ? strip + 1 : begin));
            }
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t at = strip * strip_outputs, size = at_most(down.outputs - at, strip_outputs);
            for (int64_t token = 0; token < tokens.count; ++token) {
                int64_t self;
                if (const int64_t next = token + tokens_ahead; next < tokens.count)
                    ask_for(choices_of(next, self), chosen.top_k, y + (strip - begin) * apart,
                            tokens.out + next * tokens.out_stride + at);
                combine(chosen, choices_of(token, self), y + (strip - begin) * apart, tokens.multiplier,
                        tokens.out + token * tokens.out_stride + at, size);
            }
        }
    });
}

}  // namespace moesaic::MOESAIC_ISA
