// What training computes beside attention, in fp32 and bf16: forward and backward.
#include <cstring>

#include "suite.h"

namespace moesaic {
namespace {

constexpr int64_t rows = 5;

template <class T>
void row_by_row(int64_t size, const Kernels &kernels, int threads, Results &results) {
    const Guarded<T> x = random<T>(rows * size, 1), weight = random<T>(size, 2), dy = random<T>(rows * size, 3);
    const Guarded<T> y(rows * size), dx(rows * size);
    const Floats inverse(rows), d_weight(size), losses(rows);
    const Typed<T> &typed = kernels.of(x.data());
    typed.rms_norm(x.data(), weight.data(), y.data(), inverse.data(), rows, size, 1e-3f, threads);
    typed.rms_norm_grad(dy.data(), x.data(), weight.data(), inverse.data(), dx.data(), d_weight.data(), rows, size,
                        threads);
    results.add(y), results.add(dx), results.add(inverse), results.add(d_weight);
    const Guarded<T> gate_up = random<T>(2 * rows * size, 4), d_gate_up(2 * rows * size);
    typed.silu_mul(gate_up.data(), y.data(), rows, size, threads);
    typed.silu_mul_grad(dy.data(), gate_up.data(), d_gate_up.data(), rows, size, threads);
    results.add(y), results.add(d_gate_up);
    const Guarded<int64_t> targets = whole({0, size - 1, size / 2, 0, -100});  // the last one counts for nothing
    const Guarded<T> logits = random<T>(rows * size, 5);
    typed.cross_entropy(logits.data(), targets.data(), losses.data(), rows, size, threads);
    results.add(logits), results.add(losses);
    const Guarded<T> cos = random<T>(2 * 2 * size, 6), sin = random<T>(2 * 2 * size, 7);
    const Guarded<T> heads = random<T>(rows * 3 * 2 * size, 8), turned(rows * 3 * 2 * size);
    typed.rotate(heads.data(), cos.data(), sin.data(), turned.data(), {rows, 3, 2 * size, 2}, -1.0f, threads);
    results.add(turned);
}

// Five rows of three tokens.
template <class T>
void combined(int64_t size, const Kernels &kernels, int threads, Results &results) {
    const Guarded<T> out = random<T>(rows * size, 1), dy = random<T>(3 * size, 2), y(3 * size), d_out(rows * size);
    const Floats weights = random_floats(rows, 3), d_weights(rows);
    const Guarded<int64_t> row_ids = whole({4, 0, 2, 1, 3}), token_offsets = whole({0, 2, 2, 5});
    const Guarded<int64_t> token_ids = whole({0, 2, 2, 2, 0});
    const Typed<T> &typed = kernels.of(out.data());
    typed.combine_rows(out.data(), weights.data(), row_ids.data(), token_offsets.data(), y.data(), 3, size, threads);
    typed.combine_rows_grad(dy.data(), out.data(), weights.data(), token_ids.data(), d_out.data(), d_weights.data(),
                            rows, size, threads);
    results.add(y), results.add(d_out), results.add(d_weights);
}

struct Sizes {
    std::vector<int64_t> counts;
    int64_t inputs, outputs, few_rows;
};

template <class T>
void grouped(const Sizes &sizes, const Kernels &kernels, int threads, Results &results) {
    const Guarded<int64_t> offsets = offsets_of(sizes.counts);
    const int64_t experts = offsets.size() - 1, count = offsets[experts];
    const int64_t inputs = sizes.inputs, outputs = sizes.outputs;
    const Grouped g{experts, inputs, outputs, offsets.data(), sizes.few_rows, 1 << 20};
    const Guarded<T> x = random<T>(count * inputs, 1), weight = random<T>(experts * outputs * inputs, 2);
    const Guarded<T> dy = random<T>(count * outputs, 3), y(count * outputs), dx(count * inputs), inner(count * outputs / 2);
    const Guarded<T> dw(experts * outputs * inputs);
    const Floats sums = random_floats(experts * outputs * inputs, 4);
    const Typed<T> &typed = kernels.of(x.data());
    typed.grouped_linear(x.data(), weight.data(), y.data(), g, threads);
    results.add(y);
    typed.grouped_gated(x.data(), weight.data(), y.data(), inner.data(), g, threads);
    typed.grouped_linear_input_grad(dy.data(), weight.data(), dx.data(), g, threads);
    typed.grouped_linear_weight_grad(dy.data(), x.data(), dw.data(), g, threads);
    typed.grouped_linear_weight_grad_wide(dy.data(), x.data(), sums.data(), Target::sums, g, threads);
    results.add(y), results.add(inner), results.add(dx), results.add(dw), results.add(sums);
}

// Gradients too large for the caches, into memory that has been written before.
template <class T>
void streamed(const Kernels &kernels, int threads, Results &results) {
    constexpr int64_t outputs = 1040, inputs = 1024, count = 3;
    const Guarded<int64_t> offsets = offsets_of({count});
    const Guarded<T> x = random<T>(count * inputs, 1), dy = random<T>(count * outputs, 2);
    const Floats dw = random_floats(outputs * inputs, 3);
    kernels.of(x.data()).grouped_linear_weight_grad_wide(dy.data(), x.data(), dw.data(), Target::reused,
                                                         {1, inputs, outputs, offsets.data(), 0, 1 << 20}, threads);
    results.add(dw);
}

float widened(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Weights of bf16 beside rows of fp32: the bits of the same weights in fp32.
void grouped_narrow(const Sizes &sizes, const Kernels &kernels, int threads, Results &results) {
    const Guarded<int64_t> offsets = offsets_of(sizes.counts);
    const int64_t experts = offsets.size() - 1, count = offsets[experts];
    const Grouped g{experts, sizes.inputs, sizes.outputs, offsets.data(), sizes.few_rows, 1 << 20};
    const Halves narrow = random_halves(experts * sizes.outputs * sizes.inputs, 2);
    const Floats x = random_floats(count * sizes.inputs, 1), weight(narrow.size());
    for (int64_t i = 0; i < narrow.size(); ++i) weight[i] = widened(narrow[i]);
    const Floats y(count * sizes.outputs), wanted(y.size()), inner(y.size() / 2), wanted_inner(inner.size());
    const auto hold = [&](const Floats &found, const Floats &to) {
        results.add(found);
        results.expect_same(found, to);
    };
    const Typed<float> &typed = kernels.of(x.data());
    kernels.grouped_linear_b16(x.data(), narrow.data(), y.data(), g, threads);
    typed.grouped_linear(x.data(), weight.data(), wanted.data(), g, threads);
    hold(y, wanted);
    kernels.grouped_gated_b16(x.data(), narrow.data(), y.data(), inner.data(), g, threads);
    typed.grouped_gated(x.data(), weight.data(), wanted.data(), wanted_inner.data(), g, threads);
    hold(y, wanted);
    hold(inner, wanted_inner);
}

void moved(int64_t size, const Kernels &kernels, int threads, Results &results) {
    const Floats weight = random_floats(size, 1), first = random_floats(size, 2), second = random_floats(size, 3);
    const Floats gradient = random_floats(size, 4), average = random_floats(size, 5);
    const Halves rounded(size);
    for (int64_t i = 0; i < size; ++i) second[i] += 1.0f;
    kernels.adamw({weight.data(), first.data(), second.data(), gradient.data(), rounded.data(), average.data()},
                  {0.9f, 0.99f, 0.1f, 0.95f, 0.05f, 1e-2f, 0.8f, 1e-8f, 0.01f}, size, threads);
    for (const Floats *each : {&weight, &first, &second, &average}) results.add(*each);
    results.add(rounded);
}

const std::vector<Sizes> grouped_sizes = {
    {{0, 1, 0}, 1, 2, 16}, {{3, 0, 17}, 33, 10, 16}, {{40, 1, 2}, 31, 66, 0}, {{35}, 70, 34, 0}, {{7, 51}, 600, 6, 64}};

template <class T>
void check_type(Suite &suite, const char *type, float tolerance) {
    for (int64_t size : {1, 3, 8, 17, 33, 67}) {
        const std::string name = std::string(type) + " " + std::to_string(size);
        suite.check("norm, silu, loss, rotation " + name, tolerance,
                    [=](const Kernels &kernels, int threads, Results &results) {
                        row_by_row<T>(size, kernels, threads, results);
                    });
        suite.check("combine_rows " + name, tolerance, [=](const Kernels &kernels, int threads, Results &results) {
            combined<T>(size, kernels, threads, results);
        });
    }
    suite.check("grouped_linear_weight_grad_wide " + std::string(type), of_fp32, streamed<T>);
    for (const Sizes &sizes : grouped_sizes)
        suite.check("grouped_linear " + std::string(type), tolerance,
                    [&](const Kernels &kernels, int threads, Results &results) {
                        grouped<T>(sizes, kernels, threads, results);
                    });
}

}  // namespace

void check_training(Suite &suite) {
    suite.begin("training");
    check_type<float>(suite, "fp32", of_fp32);
    check_type<bf16>(suite, "bf16", of_bf16);
    for (const Sizes &sizes : grouped_sizes)
        suite.check("grouped_linear bf16 beside fp32", of_fp32,
                    [&](const Kernels &kernels, int threads, Results &results) {
                        grouped_narrow(sizes, kernels, threads, results);
                    });
    for (int64_t size : {1, 7, 16, 67})
        suite.check("adamw " + std::to_string(size), of_bf16, [=](const Kernels &kernels, int threads, Results &results) {
            moved(size, kernels, threads, results);
        });
}

}  // namespace moesaic
