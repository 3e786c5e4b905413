// Packing, and packed products and feed-forward blocks of every format.
#include <limits>

#include "formats.h"
#include "pack.h"
#include "packed_experts.h"

namespace moesaic {
namespace {

// outputs, inputs, paired: one, primes, whole strips and blocks, one more and one less
struct Size {
    int64_t outputs, inputs;
    bool paired;
};
constexpr Size sizes[] = {{1, 1, false},   {33, 129, false}, {64, 128, false}, {97, 31, false},
                          {2, 127, true}, {62, 65, true},   {32, 300, true}};

Bytes codes(int64_t size, uint32_t seed, int below) {
    const Floats x = random_floats(size, seed);
    Bytes y(size);
    for (int64_t i = 0; i < size; ++i)
        y[i] = static_cast<uint8_t>((x[i] + 1.0f) * 0.5f * static_cast<float>(below));
    return y;
}

template <class T>
RowBlock rows_at(const Guarded<T> &x, int64_t rows) {
    return {reinterpret_cast<const uint8_t *>(x.data()), rows};
}

}  // namespace

Bytes packed(const Kernels &kernels, const PackedShape &shape, int threads, uint32_t seed) {
    const int64_t rows = shape.outputs, inputs = shape.inputs, numbers = num_experts * rows * inputs;
    Bytes out(num_experts * shape.bytes());
    const bool is_fp8 = shape.format == Format::fp8;
    if (!is_fp8 && shape.format != Format::mxfp4) {
        const Floats values = random_floats(numbers, seed);
        const RowBlock block = rows_at(values, rows);
        kernels.pack({Element::f32, {&block, inputs * 4}, {}}, shape, num_experts, out.data(), threads);
        return out;
    }
    const int64_t groups = (inputs + (is_fp8 ? 127 : 31)) / (is_fp8 ? 128 : 32);
    const Bytes values = codes(numbers, seed, is_fp8 ? 0x7f : 16);
    const Floats scales = random_floats(num_experts * rows * groups, seed + 1);
    const Bytes exponents = codes(num_experts * rows * groups, seed + 2, 254);
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] += 1.5f;
    for (int64_t i = 0; i < exponents.size(); ++i) exponents[i] = static_cast<uint8_t>(115 + exponents[i] % 20);
    const RowBlock block = rows_at(values, rows);
    const RowBlock scale_block = is_fp8 ? rows_at(scales, rows) : rows_at(exponents, rows);
    kernels.pack({Element::codes, {&block, inputs}, {&scale_block, groups * (is_fp8 ? 4 : 1)}}, shape, num_experts,
                 out.data(), threads);
    return out;
}

namespace {

struct Rows {
    std::vector<int64_t> counts;
    bool add;
    float poison;
};

void product(const Kernels &kernels, const PackedShape &shape, const Rows &rows, int threads, Results &results) {
    const Bytes weights = packed(kernels, shape, threads);
    const Guarded<int64_t> offsets = offsets_of(rows.counts);
    const int64_t count = offsets[num_experts], stride = shape.inputs + 3;
    const Floats x = random_floats(count ? (count - 1) * stride + shape.inputs : 0, 7);
    if (count && rows.poison != 0.0f) x[x.size() - 1] = rows.poison;
    const Floats bias = random_floats(num_experts * shape.outputs, 8), y = random_floats(count * shape.outputs, 9);
    const PackedLinear linear{shape,      weights.data(), bias.data(), offsets.data(), num_experts,
                              y.data(), shape.outputs,  rows.add,    0.75f};
    kernels.packed_linear(x.data(), stride, count, linear, threads);
    results.add(y);
}

constexpr float infinite = std::numeric_limits<float>::infinity();
constexpr PackedActivation plain = {ActivationKind::silu, infinite, 1.0f, 0.0f};

// How tokens come to their experts: by rows that were chosen, or all to one; with a weight on what they bring.
struct Way {
    bool chosen, weight_on_input;
};

void experts(const Kernels &kernels, const Kind &kind, bool paired, const PackedActivation &activation, const Way &way,
             int threads, Results &results) {
    constexpr int64_t hidden = 67, inner = 45, tokens = 11, top_k = 2;
    const PackedShape into{kind.format, paired ? 2 * inner : inner, hidden, kind.group, paired};
    const PackedShape down{kind.format, hidden, inner, kind.group, false};
    const Bytes into_weights = packed(kernels, into, threads), down_weights = packed(kernels, down, threads, 5);
    const Floats into_bias = random_floats(num_experts * into.outputs, 3);
    const Floats down_bias = random_floats(num_experts * hidden, 4), weights = random_floats(2 * tokens, 5);
    const Floats x = random_floats(tokens * hidden, 6), out = random_floats(tokens * hidden, 7);
    const Guarded<int64_t> offsets = offsets_of({13, 0, 8});
    Guarded<int64_t> row_of(tokens * top_k);
    for (int64_t i = 0; i < row_of.size(); ++i) row_of[i] = i == 4 ? -1 : (i * 5) % 21;
    const PackedExperts block{into,        down,          into_weights.data(), down_weights.data(), into_bias.data(),
                              down_bias.data(), num_experts, activation};
    const ExpertRows by_choice{offsets.data(), weights.data(), row_of.data(), top_k, way.weight_on_input};
    kernels.packed_experts(block, way.chosen ? by_choice : ExpertRows{},
                           {tokens, x.data(), hidden, out.data(), hidden, 0.5f}, threads);
    results.add(out);
}

}  // namespace

void check_packed(Suite &suite) {
    const float none = std::numeric_limits<float>::quiet_NaN();
    const Rows row_sets[] = {{{0, 0, 0}, false, 0}, {{0, 1, 0}, false, 0},  {{1, 0, 3}, true, 0},
                             {{13, 2, 6}, false, 0}, {{0, 0, 35}, true, 0}, {{3, 2, 1}, false, none}};
    for (const Kind &kind : kinds) {
        suite.begin(kind.name);
        for (const Size &size : sizes) {
            const PackedShape shape{kind.format, size.outputs, size.inputs, kind.group, size.paired};
            const std::string name =
                std::string(kind.name) + " " + std::to_string(size.outputs) + " x " + std::to_string(size.inputs);
            suite.check("pack " + name, exact, [&](const Kernels &kernels, int threads, Results &results) {
                results.add(packed(kernels, shape, threads));
            });
            for (const Rows &rows : row_sets)
                suite.check("packed_linear " + name, of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
                    product(kernels, shape, rows, threads, results);
                });
        }
        for (bool paired : {false, true})
            suite.check(std::string("packed_experts ") + kind.name, kind.format == Format::f32 ? of_fp32 : of_bf16,
                        [&](const Kernels &kernels, int threads, Results &results) {
                            experts(kernels, kind, paired, plain, {true, false}, threads, results);
                        });
        for (const Way &way : {Way{true, true}, Way{false, false}})
            suite.check(std::string("packed_experts ") + kind.name + (way.chosen ? " weighted" : " of all tokens"),
                        kind.format == Format::f32 ? of_fp32 : of_bf16,
                        [&](const Kernels &kernels, int threads, Results &results) {
                            experts(kernels, kind, true, plain, way, threads, results);
                        });
    }
    using Kinds = ActivationKind;
    for (Kinds activation : {Kinds::silu, Kinds::gelu, Kinds::gelu_tanh, Kinds::relu, Kinds::relu2})
        for (bool paired : {false, true})
            suite.check("packed_experts, activation " + std::to_string(static_cast<int>(activation)), of_fp32,
                        [&](const Kernels &kernels, int threads, Results &results) {
                            experts(kernels, kinds[0], paired, {activation, 1.5f, 1.7f, 1.0f}, {true, false}, threads,
                                    results);
                        });
}

}  // namespace moesaic
