// How tokens choose experts outside of training: the routers of src/moesaic/routing/routers, without torch.
// T tokens, E experts, C what a token chooses from (experts and null experts), K choices, M columns, V vocabulary.
#pragma once

#include <cstdint>

namespace moesaic {

// Those whose choice of a token depends on that token alone. softmax_topk serves switch and dense, too.
enum class Router {
    softmax_topk,
    topk_softmax,
    sigmoid_topk,
    sqrt_softplus_topk,
    sigmoid_input,
    noisy_topk,
    gshard_top2,
    base,
    sinkhorn,
    hash,
    sparsemixer,
    relu,
    top_p,
    null_topk
};
enum class HashWeight { uniform, softmax, sigmoid, sqrt_softplus };
enum class GroupScore { max, top2_sum };

// Pointers are null where a router lacks what they name; the memory stays the caller's.
struct RouterSpec {
    Router router;
    int64_t num_experts, top_k;
    int64_t num_null_experts = 0;  // further choices after the experts, which compute nothing
    bool renormalize = false;      // divide the chosen scores by their sum
    float scaling_factor = 1.0f;
    const float *bias = nullptr;                                     // [C], added to the logits
    const float *running_mean = nullptr, *running_var = nullptr;     // [C], of logits that are normalised
    const float *selection_bias = nullptr;                           // [E], moves which, never how much
    int64_t num_groups = 0, top_groups = 0;                          // 0: no groups
    GroupScore group_score = GroupScore::top2_sum;
    HashWeight hash_weight = HashWeight::uniform;
    const int32_t *table = nullptr;  // [V, K] of hash
    float p = 0.0f;                  // of top_p
    float gap = 0.0f;                // of sparsemixer

    int64_t choices() const { return num_experts + num_null_experts; }
    int64_t columns() const { return router == Router::relu ? num_experts : top_k; }
};

// ids [T, columns()], -1 where a token has no such choice (whose weight is 0), and weights beside them. A token's
// answer depends on its own row alone. logits [T, C] may be null for a hash router of uniform weights; token_ids [T] is
// read by hash routers only and must lie inside the table, whose experts must exist. NaN ranks above all numbers and
// reaches the weights, but for ReLU, which it does not pass.
void route(const float *logits, const RouterSpec &spec, const int64_t *token_ids, int64_t *ids, float *weights,
           int64_t tokens, int threads);

// What the router weighs experts by that were chosen before: ids [T, columns], columns of at least top_k (but for
// ReLU), each -1 or an expert.
void weigh_choices(const float *logits, const RouterSpec &spec, const int64_t *ids, int64_t columns, float *weights,
                   int64_t tokens, int threads);

// Choices [tokens, columns] sorted by expert, by a counting sort that keeps the order of tokens and of a token's
// choices: offsets [E + 1]; token_ids and row_weights [R], in room for tokens * columns; row_of [tokens, columns], -1
// where there is no choice. Returns R.
int64_t sort_by_expert(const int64_t *ids, const float *weights, int64_t tokens, int64_t columns, int64_t num_experts,
                       int64_t *offsets, int64_t *token_ids, float *row_weights, int64_t *row_of);

}  // namespace moesaic
