// A row's bits depend on the row and the weights alone: not on how many rows share the call, nor on its place there.
#include <algorithm>

#include "formats.h"
#include "packed_experts.h"

namespace moesaic {
namespace {

constexpr int64_t most = 33;
constexpr int64_t counts[] = {1, 2, 3, 5, 7, 8, 9, 12, 13, 16, 17, 32};

// The last `count` of `most` rows.
Floats tail(const Floats &rows, int64_t count) {
    const int64_t size = rows.size() / most * count;
    const Floats last(size);
    std::copy(rows.data() + rows.size() - size, rows.data() + rows.size(), last.data());
    return last;
}

// take(first, out) computes the rows from `first` on.
template <class Take>
void in_any_company(int64_t row_size, Results &results, const Take &take) {
    const Floats all(most * row_size);
    take(0, all);
    results.add(all);
    for (int64_t count : counts) {
        const Floats some(count * row_size);
        take(most - count, some);
        results.expect_same(some, tail(all, count));
    }
}

void product(const Kernels &kernels, const PackedShape &shape, int threads, Results &results) {
    const Bytes weights = packed(kernels, shape, threads);
    const Floats x = random_floats(most * shape.inputs, 7);
    in_any_company(shape.outputs, results, [&](int64_t first, const Floats &y) {
        const PackedLinear linear{shape, weights.data(), nullptr, nullptr, 1, y.data(), shape.outputs, false, 1.0f};
        kernels.packed_linear(x.data() + first * shape.inputs, shape.inputs, most - first, linear, threads);
    });
}

// The rows of tokens from `first` on, two choices each, sorted by expert.
struct Choices {
    Guarded<int64_t> offsets, row_of;

    explicit Choices(int64_t first) : offsets(num_experts + 1), row_of(2 * (most - first)) {
        int64_t row = 0;
        for (int64_t e = 0; e < num_experts; ++e) {
            offsets[e] = row;
            for (int64_t i = 0; i < row_of.size(); ++i) {
                const int64_t token = first + i / 2;
                if ((token * token + i % 2) % num_experts == e) row_of[i] = row++;
            }
        }
        offsets[num_experts] = row;
    }
};

void experts(const Kernels &kernels, const Kind &kind, int threads, Results &results) {
    constexpr int64_t hidden = 67, inner = 45;
    const PackedShape into{kind.format, 2 * inner, hidden, kind.group, true};
    const PackedShape down{kind.format, hidden, inner, kind.group, false};
    const Bytes into_weights = packed(kernels, into, threads), down_weights = packed(kernels, down, threads, 5);
    const PackedExperts block{into,    down,    into_weights.data(), down_weights.data(),
                              nullptr, nullptr, num_experts,         {ActivationKind::silu, 7.0f, 1.0f, 0.0f}};
    const Floats x = random_floats(most * hidden, 6);
    in_any_company(hidden, results, [&](int64_t first, const Floats &out) {
        const Choices choices(first);
        std::fill(out.data(), out.data() + out.size(), 0.0f);
        kernels.packed_experts(block, {choices.offsets.data(), nullptr, choices.row_of.data(), 2, false},
                               {most - first, x.data() + first * hidden, hidden, out.data(), hidden, 1.0f}, threads);
    });
}

// Narrow numbers, widened.
template <class T>
Floats wide(const Guarded<T> &x) {
    Results numbers;
    numbers.add(x);
    const Floats y(x.size());
    std::copy(numbers.numbers().begin(), numbers.numbers().end(), y.data());
    return y;
}

// few_rows: how many rows read their weights in strips, which sum in another order than blocks do.
template <class T, class W, class Linear, class Gated>
void grouped(int64_t inputs, int64_t few_rows, const Linear &linear, const Gated &gated, Results &results) {
    constexpr int64_t outputs = 34;
    const Guarded<T> x = random<T>(most * inputs, 1);
    const Guarded<W> weight = random<W>(outputs * inputs, 2);
    const auto with = [&](int64_t columns, const auto &compute) {
        in_any_company(columns, results, [&](int64_t first, const Floats &out) {
            const Guarded<int64_t> offsets = offsets_of({most - first});
            const Guarded<T> y((most - first) * columns), inner((most - first) * outputs / 2);
            compute(x.data() + first * inputs, weight.data(), y.data(), inner.data(),
                    Grouped{1, inputs, outputs, offsets.data(), few_rows, 1 << 20});
            const Floats found = wide(columns == outputs ? y : inner);
            std::copy(found.data(), found.data() + found.size(), out.data());
        });
    };
    with(outputs, linear);
    with(outputs / 2, gated);
}

template <class T>
void grouped_of(int64_t inputs, int64_t few_rows, const Kernels &kernels, int threads, Results &results) {
    const Typed<T> &typed = kernels.of(static_cast<const T *>(nullptr));
    grouped<T, T>(
        inputs, few_rows,
        [&](const T *x, const T *weight, T *y, T *, const Grouped &g) {
            typed.grouped_linear(x, weight, y, g, threads);
        },
        [&](const T *x, const T *weight, T *, T *inner, const Grouped &g) {
            const Guarded<T> gate_up(g.offsets[1] * g.outputs);
            typed.grouped_gated(x, weight, gate_up.data(), inner, g, threads);
        },
        results);
}

void grouped_narrow(int64_t inputs, int64_t few_rows, const Kernels &kernels, int threads, Results &results) {
    grouped<float, bf16>(
        inputs, few_rows,
        [&](const float *x, const bf16 *weight, float *y, float *, const Grouped &g) {
            kernels.grouped_linear_b16(x, weight, y, g, threads);
        },
        [&](const float *x, const bf16 *weight, float *, float *inner, const Grouped &g) {
            const Floats gate_up(g.offsets[1] * g.outputs);
            kernels.grouped_gated_b16(x, weight, gate_up.data(), inner, g, threads);
        },
        results);
}

}  // namespace

void check_company(Suite &suite) {
    suite.begin("rows in company");
    for (const Kind &kind : kinds) {
        const std::string name = kind.name;
        for (const PackedShape &shape : {PackedShape{kind.format, 33, 300, kind.group, false},
                                         PackedShape{kind.format, 62, 65, kind.group, true}})
            suite.check("packed_linear " + name, of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
                product(kernels, shape, threads, results);
            });
        suite.check("packed_experts " + name, kind.format == Format::f32 ? of_fp32 : of_bf16,
                    [&](const Kernels &kernels, int threads, Results &results) {
                        experts(kernels, kind, threads, results);
                    });
    }
    for (int64_t inputs : {33, 600})
        for (int64_t few_rows : {0, 64}) {
            const std::string name = std::to_string(inputs) + (few_rows ? " in strips" : " in blocks");
            suite.check("grouped_linear fp32 " + name, of_fp32,
                        [=](const Kernels &kernels, int threads, Results &results) {
                            grouped_of<float>(inputs, few_rows, kernels, threads, results);
                        });
            suite.check("grouped_linear bf16 " + name, of_bf16,
                        [=](const Kernels &kernels, int threads, Results &results) {
                            grouped_of<bf16>(inputs, few_rows, kernels, threads, results);
                        });
            suite.check("grouped_linear bf16 beside fp32 " + name, of_fp32,
                        [=](const Kernels &kernels, int threads, Results &results) {
                            grouped_narrow(inputs, few_rows, kernels, threads, results);
                        });
        }
}

}  // namespace moesaic
