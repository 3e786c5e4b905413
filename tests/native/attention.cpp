// Attention over the paged cache and over whole sequences.
#include <algorithm>
#include <limits>

#include "suite.h"

namespace moesaic {
namespace {

struct Paged {
    int64_t key_dim, value_dim, groups, heads;
    bool shared;
    int64_t window, chunk;
    bool sinks;
};
constexpr Paged pages[] = {{6, 6, 2, 4, false, 0, 0, false},  {33, 17, 1, 3, false, 5, 0, true},
                           {16, 16, 3, 3, false, 0, 33, false}, {19, 13, 1, 5, true, 0, 0, false},
                           {64, 48, 1, 20, true, 40, 0, true},  {1, 1, 1, 1, false, 0, 0, false}};

constexpr int64_t lengths[2] = {71, 3}, all_tokens = lengths[0] + lengths[1];

// Two sequences, one of 71 tokens and one of 3, whose blocks lie anywhere, `piece` tokens a step. T: of the cache;
// bytes: numbers of 8 bits.
template <class T>
Floats paged(const Paged &p, float poison, int64_t piece, const Kernels &kernels, int threads, Results &results) {
    constexpr int64_t num_blocks = 5, table_width = 3;
    constexpr CacheFormat format = sizeof(T) == 4   ? CacheFormat::fp32
                                   : sizeof(T) == 2 ? CacheFormat::bf16
                                                    : CacheFormat::int8;
    PagedCache cache{nullptr, nullptr, format, num_blocks, p.groups, p.key_dim, p.value_dim, p.shared};
    constexpr auto width = static_cast<int64_t>(sizeof(T));
    const Guarded<T> keys(num_blocks * cache.key_block_bytes() / width);
    const Guarded<T> values(num_blocks * cache.value_block_bytes() / width);
    cache.keys = keys.data();
    cache.values = p.shared ? nullptr : values.data();
    Guarded<int32_t> tables(2 * table_width), sequence_of(all_tokens);
    const int32_t blocks[2 * table_width] = {3, 0, 4, 1, -1, -1};
    for (int64_t i = 0; i < tables.size(); ++i) tables[i] = blocks[i];
    Guarded<int64_t> positions(sequence_of.size());
    for (int64_t t = 0; t < positions.size(); ++t) {
        sequence_of[t] = t >= lengths[0];
        positions[t] = t - sequence_of[t] * lengths[0];
    }
    const int64_t k_stride = p.groups * p.key_dim, v_stride = p.groups * p.value_dim;
    const int64_t q_stride = p.heads * p.key_dim, out_stride = p.heads * p.value_dim;
    const Floats k = random_floats(all_tokens * k_stride, 1), v = random_floats(all_tokens * v_stride, 2);
    k[all_tokens / 2 * k_stride] = poison;
    const Floats q = random_floats(all_tokens * q_stride, 3), out = random_floats(all_tokens * out_stride, 4);
    const Floats sinks = random_floats(p.heads, 5);
    const PagedSight sight{p.heads, p.window, p.chunk, 1.7f, p.sinks ? sinks.data() : nullptr};
    for (int64_t first = 0; first < all_tokens; first += piece) {
        const PagedTokens step{std::min(piece, all_tokens - first), positions.data() + first,
                               sequence_of.data() + first, tables.data(), table_width};
        kernels.write_cache(cache, step, k.data() + first * k_stride, k_stride,
                            p.shared ? nullptr : v.data() + first * v_stride, v_stride, threads);
        kernels.paged_attention(cache, step, sight, q.data() + first * q_stride, q_stride,
                                out.data() + first * out_stride, out_stride, threads);
    }
    results.add(keys);
    results.add(values);
    return out;
}

template <class T>
void paged(const Paged &p, float poison, const Kernels &kernels, int threads, Results &results) {
    results.add(paged<T>(p, poison, all_tokens, kernels, threads, results));
}

// A token's bits do not depend on which tokens share its step.
template <class T>
void in_pieces(const Paged &p, const Kernels &kernels, int threads, Results &results) {
    Results unused;
    const Floats whole = paged<T>(p, 0.5f, all_tokens, kernels, threads, results);
    results.add(whole);
    for (int64_t piece : {1, 2, 3, 7, 8, 13, 17, 33})
        results.expect_same(paged<T>(p, 0.5f, piece, kernels, threads, unused), whole);
}

template <class T>
void causal(int64_t length, int64_t head_dim, const Kernels &kernels, int threads, Results &results) {
    const AttentionShape shape{2, length, 4, 2, head_dim};
    const int64_t wide = 2 * length * 4 * head_dim, narrow = wide / 2;
    const Guarded<T> q = random<T>(wide, 1), k = random<T>(narrow, 2), v = random<T>(narrow, 3), out(wide);
    const Guarded<T> d_out = random<T>(wide, 4), dq(wide), dk(narrow), dv(narrow);
    const Floats log_sum(2 * 4 * length);
    const Typed<T> &typed = kernels.of(q.data());
    typed.causal_attention(q.data(), k.data(), v.data(), out.data(), log_sum.data(), shape, threads);
    typed.causal_attention_grad({d_out.data(), q.data(), k.data(), v.data(), out.data(), log_sum.data(), dq.data(),
                                 dk.data(), dv.data()},
                                shape, threads);
    for (const Guarded<T> *written : {&out, &dq, &dk, &dv}) results.add(*written);
    results.add(log_sum);
}

}  // namespace

void check_attention(Suite &suite) {
    suite.begin("attention");
    for (float poison : {0.5f, std::numeric_limits<float>::quiet_NaN()})
        for (const Paged &p : pages) {
            const std::string name = "paged_attention " + std::to_string(p.key_dim);
            suite.check(name + " fp32", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
                paged<float>(p, poison, kernels, threads, results);
            });
            suite.check(name + " bf16", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
                paged<bf16>(p, poison, kernels, threads, results);
            });
            suite.check(name + " int8", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
                paged<uint8_t>(p, poison, kernels, threads, results);
            });
        }
    for (const Paged &p : pages) {
        const std::string name = "paged_attention in pieces " + std::to_string(p.key_dim);
        suite.check(name + " fp32", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
            in_pieces<float>(p, kernels, threads, results);
        });
        suite.check(name + " bf16", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
            in_pieces<bf16>(p, kernels, threads, results);
        });
        suite.check(name + " int8", of_fp32, [&](const Kernels &kernels, int threads, Results &results) {
            in_pieces<uint8_t>(p, kernels, threads, results);
        });
    }
    for (int64_t length : {1, 5, 33, 70})
        for (int64_t head_dim : {1, 6, 16, 33}) {
            const std::string name = "causal_attention " + std::to_string(length) + " x " + std::to_string(head_dim);
            suite.check(name + " fp32", of_fp32, [=](const Kernels &kernels, int threads, Results &results) {
                causal<float>(length, head_dim, kernels, threads, results);
            });
            suite.check(name + " bf16", of_bf16, [=](const Kernels &kernels, int threads, Results &results) {
                causal<bf16>(length, head_dim, kernels, threads, results);
            });
        }
}

}  // namespace moesaic
