// The routers, token by token. Equations and sources stand beside their definitions in src/moesaic/routing/routers.
//
// Numbers are computed one at a time with the C library's functions, so that equal logits have equal scores wherever
// they stand, and ties go to the lower id.
#include "route.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "parallel.h"
#include "scratch.h"
#include "topk.h"

namespace moesaic {
namespace {

constexpr float infinity = INFINITY;
constexpr float batch_norm_epsilon = 1e-5f;

enum class Score { none, softmax, sigmoid, sqrt_softplus, relu };

// What a router scores by; whether it ranks the logits instead; what is added to the sum that divides the weights.
struct Way {
    Score score;
    bool ranks_logits;
    float tiny;
};

Way way_of(const RouterSpec &spec) {
    switch (spec.router) {
        case Router::topk_softmax:
        case Router::noisy_topk: return {Score::none, true, 0.0f};
        case Router::sigmoid_topk: return {Score::sigmoid, false, 1e-20f};
        case Router::sqrt_softplus_topk: return {Score::sqrt_softplus, false, 1e-20f};
        case Router::sigmoid_input:
        case Router::base: return {Score::sigmoid, true, 0.0f};
        case Router::sinkhorn: return {Score::softmax, true, 0.0f};
        case Router::relu: return {Score::relu, false, 0.0f};
        case Router::hash: break;
        default: return {Score::softmax, false, 0.0f};
    }
    switch (spec.hash_weight) {
        case HashWeight::uniform: return {Score::none, false, 0.0f};
        case HashWeight::softmax: return {Score::softmax, false, 0.0f};
        case HashWeight::sigmoid: return {Score::sigmoid, false, 1e-20f};
        default: return {Score::sqrt_softplus, false, 1e-20f};
    }
}

// What one thread needs for one token.
struct Room {
    float *logits, *scores, *ranked;  // [C] each
    float *groups;                    // [num_groups]
    int64_t *ids;                     // [max(C, 2)]
};

Room room_for(const RouterSpec &spec) {
    const int64_t width = spec.choices(), floats = 3 * width + spec.num_groups;
    char *memory = static_cast<char *>(scratch(0, std::max<int64_t>(width, 2) * 8 + floats * 4));
    int64_t *ids = reinterpret_cast<int64_t *>(memory);
    float *first = reinterpret_cast<float *>(ids + std::max<int64_t>(width, 2));
    return {first, first + width, first + 2 * width, first + 3 * width, ids};
}

// NaN where there is one.
float largest(const float *x, int64_t count) {
    float most = -infinity;
    for (int64_t i = 0; i < count; ++i)
        if (x[i] > most || x[i] != x[i]) most = x[i];
    return most;
}

void softmax(const float *x, float *y, int64_t count) {
    const float most = largest(x, count);
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        y[i] = std::exp(x[i] - most);
        sum += y[i];
    }
    const double share = 1.0 / sum;
    for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(y[i] * share);
}

float softplus(float x) { return x > 50.0f ? x : std::log1p(std::exp(x)); }

float score_of(float logit, Score score) {
    switch (score) {
        case Score::sigmoid: return 1.0f / (1.0f + std::exp(-logit));
        case Score::sqrt_softplus: return std::sqrt(softplus(logit));
        case Score::relu: return logit < 0.0f ? 0.0f : logit;
        default: return logit;
    }
}

void look(const float *logits, const RouterSpec &spec, const Room &room) {
    const int64_t width = spec.choices();
    std::copy_n(logits, width, room.logits);
    if (spec.bias)
        for (int64_t e = 0; e < width; ++e) room.logits[e] += spec.bias[e];
    if (spec.running_mean)
        for (int64_t e = 0; e < width; ++e)
            room.logits[e] =
                (room.logits[e] - spec.running_mean[e]) / std::sqrt(spec.running_var[e] + batch_norm_epsilon);
}

void score_all(const RouterSpec &spec, Score score, const Room &room) {
    const int64_t width = spec.choices();
    if (score == Score::softmax) return softmax(room.logits, room.scores, width);
    for (int64_t e = 0; e < width; ++e) room.scores[e] = score_of(room.logits[e], score);
}

float score_of_group(const float *x, int64_t size, GroupScore score) {
    if (score == GroupScore::max) return largest(x, size);
    float first = -infinity, second = -infinity;
    for (int64_t i = 0; i < size; ++i) {
        if (x[i] != x[i]) return x[i];
        second = std::max(second, std::min(first, x[i]));
        first = std::max(first, x[i]);
    }
    return first + second;
}

// -infinity outside of the best groups: biased scores may be negative, and 0 would win from outside. Inside, it becomes
// the lowest number: closed experts of a kept group still come before all others.
void keep_best_groups(const RouterSpec &spec, const Room &room) {
    const int64_t size = spec.num_experts / spec.num_groups;
    for (int64_t e = 0; e < spec.num_experts; ++e)
        if (room.ranked[e] < -FLT_MAX) room.ranked[e] = -FLT_MAX;
    for (int64_t g = 0; g < spec.num_groups; ++g)
        room.groups[g] = score_of_group(room.ranked + g * size, size, spec.group_score);
    topk_of_row(room.groups, room.ids, spec.num_groups, spec.top_groups);
    std::sort(room.ids, room.ids + spec.top_groups);
    const int64_t *kept = room.ids;
    for (int64_t g = 0; g < spec.num_groups; ++g) {
        if (kept < room.ids + spec.top_groups && *kept == g) ++kept;
        else std::fill_n(room.ranked + g * size, size, -infinity);
    }
}

void select(const RouterSpec &spec, const float *ranked, const Room &room, int64_t *ids) {
    std::copy_n(ranked, spec.choices(), room.ranked);
    if (spec.selection_bias)
        for (int64_t e = 0; e < spec.num_experts; ++e) room.ranked[e] += spec.selection_bias[e];
    if (spec.num_groups > 0) keep_best_groups(spec, room);
    topk_of_row(room.ranked, ids, spec.choices(), spec.top_k);
}

void select_positive(const RouterSpec &spec, const Room &room, int64_t *ids) {
    int64_t positive = 0;
    for (int64_t e = 0; e < spec.num_experts; ++e) {
        room.ranked[e] = room.scores[e] > 0.0f ? room.scores[e] : -infinity;
        positive += room.scores[e] > 0.0f;
    }
    topk_of_row(room.ranked, ids, spec.num_experts, positive);
    std::fill(ids + positive, ids + spec.num_experts, -1);
}

// Drops what comes after the scores have reached p.
void stop_at(float p, const float *scores, int64_t top_k, int64_t *ids) {
    double before = 0.0;
    for (int64_t k = 0; k < top_k; ++k) {
        const float score = scores[ids[k]];
        if (static_cast<float>(before) >= p) ids[k] = -1;
        before += score;
    }
}

void choose(const RouterSpec &spec, const Way &way, int64_t token_id, const Room &room, int64_t *ids) {
    if (spec.router == Router::hash) {
        for (int64_t k = 0; k < spec.top_k; ++k) ids[k] = spec.table[token_id * spec.top_k + k];
        return;
    }
    if (spec.router == Router::relu) return select_positive(spec, room, ids);
    select(spec, way.ranks_logits ? room.logits : room.scores, room, ids);
    if (spec.router == Router::top_p) stop_at(spec.p, room.scores, spec.top_k, ids);
    for (int64_t k = 0; k < spec.top_k; ++k)
        if (ids[k] >= spec.num_experts) ids[k] = -1;
}

// Softmax over the chosen logits alone. Where all of them are closed they are equal.
void weigh_by_softmax(const Room &room, const int64_t *ids, int64_t columns, float *weights) {
    for (int64_t k = 0; k < columns; ++k) weights[k] = ids[k] < 0 ? -infinity : room.logits[ids[k]];
    if (largest(weights, columns) == -infinity) std::fill_n(weights, columns, 0.0f);
    softmax(weights, weights, columns);
}

// The chosen scores. A sum too small to divide by divides nothing.
void weigh_by_score(const RouterSpec &spec, const Way &way, const Room &room, const int64_t *ids, int64_t columns,
                    float *weights) {
    float sum = 0.0f;
    for (int64_t k = 0; k < columns; ++k) {
        weights[k] = ids[k] < 0 ? 0.0f : room.scores[ids[k]];
        sum += weights[k];
    }
    sum += way.tiny;
    if (!spec.renormalize || sum < FLT_MIN) return;
    for (int64_t k = 0; k < columns; ++k) weights[k] /= sum;
}

void weigh(const RouterSpec &spec, const Way &way, const Room &room, const int64_t *ids, int64_t columns,
           float *weights) {
    if (way.score != Score::none) weigh_by_score(spec, way, room, ids, columns, weights);
    else if (spec.router == Router::hash) std::fill_n(weights, columns, 1.0f / static_cast<float>(spec.top_k));
    else weigh_by_softmax(room, ids, columns, weights);
    for (int64_t k = 0; k < columns; ++k) weights[k] = ids[k] < 0 ? 0.0f : weights[k] * spec.scaling_factor;
}

// K rounds of one expert each, among those near the best. ids holds the choices, -1 where a round makes its own.
void mix_sparsely(const RouterSpec &spec, const Room &room, int64_t *ids, float *weights) {
    float *left = room.scores, *open = room.ranked;
    for (int64_t e = 0; e < spec.num_experts; ++e)  // -infinity as the lowest number: the last round still takes one
        left[e] = room.logits[e] < -FLT_MAX ? -FLT_MAX : room.logits[e];
    for (int64_t k = 0; k < spec.top_k; ++k) {
        const float best = largest(left, spec.num_experts);
        for (int64_t e = 0; e < spec.num_experts; ++e) {
            const float scale = std::max(std::fabs(left[e]), best);
            open[e] = (best - left[e]) / scale > 2.0f * spec.gap ? -infinity : left[e];
        }
        if (ids[k] < 0) topk_of_row(open, ids + k, spec.num_experts, 1);
        softmax(open, open, spec.num_experts);
        weights[k] = open[ids[k]] * spec.scaling_factor;
        left[ids[k]] = -infinity;
    }
}

// A dictated pair in which a second that went is there again: the best expert that is not the first. Its share divides
// the weight of the first.
void complete_pair(const RouterSpec &spec, const Room &room, const int64_t *dictated, int64_t *pair) {
    topk_of_row(room.scores, pair, spec.num_experts, 2);
    const int64_t other = pair[0] == dictated[0] ? pair[1] : pair[0];
    pair[0] = dictated[0];
    pair[1] = dictated[1] >= 0 ? dictated[1] : other;
}

void weigh_dictated(const RouterSpec &spec, const Way &way, const Room &room, const int64_t *ids, int64_t columns,
                    float *weights) {
    const bool is_pair = spec.router == Router::gshard_top2, is_sparse = spec.router == Router::sparsemixer;
    if (!is_pair && !is_sparse) return weigh(spec, way, room, ids, columns, weights);
    if (is_pair) {
        complete_pair(spec, room, ids, room.ids);
        weigh(spec, way, room, room.ids, 2, weights);
    } else {
        std::copy_n(ids, spec.top_k, room.ids);
        mix_sparsely(spec, room, room.ids, weights);
    }
    for (int64_t k = 0; k < columns; ++k)
        if (k >= spec.top_k || ids[k] < 0) weights[k] = 0.0f;
}

}  // namespace

void route(const float *logits, const RouterSpec &spec, const int64_t *token_ids, int64_t *ids, float *weights,
           int64_t tokens, int threads) {
    const Way way = way_of(spec);
    const int64_t width = spec.choices(), columns = spec.columns();
    parallel_for(tokens, 16, threads_for(tokens * width, 2048, threads), [&](int64_t token) {
        const Room room = room_for(spec);
        int64_t *own_ids = ids + token * columns;
        float *own_weights = weights + token * columns;
        if (logits) look(logits + token * width, spec, room);
        if (spec.router == Router::sparsemixer) {
            std::fill_n(own_ids, columns, -1);
            return mix_sparsely(spec, room, own_ids, own_weights);
        }
        if (way.score != Score::none) score_all(spec, way.score, room);
        choose(spec, way, token_ids ? token_ids[token] : 0, room, own_ids);
        weigh(spec, way, room, own_ids, columns, own_weights);
    });
}

void weigh_choices(const float *logits, const RouterSpec &spec, const int64_t *ids, int64_t columns, float *weights,
                   int64_t tokens, int threads) {
    const Way way = way_of(spec);
    const int64_t width = spec.choices();
    parallel_for(tokens, 16, threads_for(tokens * width, 2048, threads), [&](int64_t token) {
        const Room room = room_for(spec);
        if (logits) look(logits + token * width, spec, room);
        if (way.score != Score::none) score_all(spec, way.score, room);
        weigh_dictated(spec, way, room, ids + token * columns, columns, weights + token * columns);
    });
}

}  // namespace moesaic
