// What the engine does to rows of floats, and the choice of the k best.
#include <algorithm>
#include <limits>

#include "draw.h"
#include "row_ops.h"
#include "suite.h"

namespace moesaic {
namespace {

constexpr int64_t num_rows = 5;

std::string named(const char *operation, int64_t size) { return std::string(operation) + " " + std::to_string(size); }

// Rows of `size` floats, `stride` apart; behind the last there is nothing.
Floats rows_of(int64_t size, int64_t stride, uint32_t seed) {
    return random_floats((num_rows - 1) * stride + size, seed);
}

void norms(Suite &suite, int64_t size) {
    for (bool centered : {false, true})
        suite.check(named("norm_rows", size), of_fp32, [=](const Kernels &kernels, int threads, Results &results) {
            constexpr int64_t count = 2;
            const Floats from = rows_of(count * size, count * size + 3, 1), to = rows_of(count * size, count * size, 2);
            const Floats weight = random_floats(size, 3), bias = random_floats(size, 4);
            kernels.norm_rows({{from.data(), count * size + 3}, {to.data(), count * size}, num_rows, count, size,
                               weight.data(), centered ? bias.data() : nullptr, 1e-3f, centered},
                              threads);
            results.add(to);
        });
}

void rotations(Suite &suite, int64_t turning) {
    for (bool interleaved : {false, true})
        suite.check(named("rotate_rows", turning), of_fp32, [=](const Kernels &kernels, int threads, Results &results) {
            const int64_t heads = 3, head_stride = turning + 1, stride = heads * head_stride + 2;
            const Floats rows = rows_of((heads - 1) * head_stride + turning, stride, 1);
            const Floats cos = random_floats(9 * turning / 2, 2), sin = random_floats(9 * turning / 2, 3);
            const Guarded<int64_t> positions = whole({8, 0, 3, 3, 1});
            kernels.rotate_rows({{rows.data(), stride}, num_rows, heads, head_stride, turning, positions.data(),
                                 cos.data(), sin.data(), interleaved},
                                threads);
            results.add(rows);
        });
}

void sums(Suite &suite, int64_t size) {
    for (bool gated : {false, true})
        suite.check(named("add_rows", size), of_fp32, [=](const Kernels &kernels, int threads, Results &results) {
            const Floats from = rows_of(size, size + 5, 1), to = rows_of(size, size, 2);
            const Floats gates = random_floats(num_rows, 3);
            kernels.add_rows({{from.data(), size + 5}, {to.data(), size}, num_rows, size, 0.3f,
                              gated ? gates.data() : nullptr},
                             threads);
            results.add(to);
        });
}

// Weights are at most 1, their sums of fp64.
void weights(Suite &suite, int64_t size) {
    suite.check(named("weigh_logits", size), of_fp32, [=](const Kernels &kernels, int, Results &results) {
        const int64_t blocks = (size + draw_block - 1) / draw_block;
        const Floats logits = random_floats(size, 1), greatest(blocks), weights(size);
        const Guarded<double> sums(blocks);
        logits[size / 2] = -std::numeric_limits<float>::infinity();
        kernels.greatest_logits(logits.data(), size, greatest.data());
        kernels.weigh_logits(logits.data(), size, 1.0f, 3.0f, weights.data(), sums.data());
        results.add(greatest);
        results.add(weights);
        for (int64_t block = 0; block < blocks; ++block) results.add(static_cast<float>(sums[block]));
    });
}

// Not compiled per instruction set, and run by all the same: held against a stable sort.
void choices(Suite &suite, int64_t num_experts) {
    const int64_t tokens = 7, top_k = std::min<int64_t>(num_experts, 8);
    suite.check(named("select_topk", num_experts), exact, [=](const Kernels &, int threads, Results &results) {
        const Floats scores = random_floats(tokens * num_experts, 1);
        for (int64_t i = 0; i + 3 < scores.size(); i += 3) scores[i] = scores[i + 3];  // equals
        const Guarded<int64_t> ids(tokens * top_k);
        select_topk(scores.data(), ids.data(), tokens, num_experts, top_k, threads);
        for (int64_t t = 0; t < tokens; ++t) {
            std::vector<int64_t> order;
            for (int64_t e = 0; e < num_experts; ++e) order.push_back(e);
            const float *row = scores.data() + t * num_experts;
            std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return row[a] > row[b]; });
            for (int64_t k = 0; k < top_k; ++k)
                results.expect(ids[t * top_k + k] == order[static_cast<size_t>(k)]);
        }
    });
}

void probe(Suite &suite, int64_t size) {
    suite.check(named("read_words", size), exact, [=](const Kernels &kernels, int, Results &results) {
        Guarded<uint64_t> words(size);
        uint64_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += words[i] = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
        results.expect(kernels.read_words(words.data(), size) == sum);
    });
}

}  // namespace

void check_rows(Suite &suite) {
    suite.begin("rows");
    for (int64_t size : {1, 3, 4, 7, 8, 15, 16, 17, 33, 67}) {
        norms(suite, size);
        sums(suite, size);
        rotations(suite, 2 * size);
        choices(suite, size);
        weights(suite, size + 60);
        probe(suite, size + 20);
    }
}

}  // namespace moesaic
