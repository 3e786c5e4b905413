// (token, choice) pairs sorted by expert: a counting sort, stable, in one pass to count and one to place.
#include <vector>

#include "kernels.h"
#include "route.h"

namespace moesaic {

// Returns the number of rows, or -1 - position for the first expert id that is not below num_experts.
int64_t sort_rows(const int64_t *expert_ids, int64_t *token_ids, int64_t *choices, int64_t *offsets, int64_t tokens,
                  int64_t top_k, int64_t num_experts) {
    const int64_t pairs = tokens * top_k;
    for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
    for (int64_t i = 0; i < pairs; ++i) {
        if (expert_ids[i] >= num_experts) return -1 - i;
        if (expert_ids[i] >= 0) ++offsets[expert_ids[i] + 1];
    }
    for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    std::vector<int64_t> next(offsets, offsets + num_experts);
    const int64_t *id = expert_ids;
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t choice = 0; choice < top_k; ++choice, ++id) {
            if (*id < 0) continue;
            const int64_t row = next[*id]++;
            token_ids[row] = token;
            choices[row] = choice;
        }
    }
    return offsets[num_experts];
}

int64_t sort_by_expert(const int64_t *ids, const float *weights, int64_t tokens, int64_t columns, int64_t num_experts,
                       int64_t *offsets, int64_t *token_ids, float *row_weights, int64_t *row_of) {
    for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
    for (int64_t i = 0; i < tokens * columns; ++i)
        if (ids[i] >= 0) ++offsets[ids[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    const int64_t *id = ids;
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t k = 0; k < columns; ++k, ++id, ++weights, ++row_of) {
            *row_of = *id < 0 ? -1 : offsets[*id]++;
            if (*id < 0) continue;
            token_ids[*row_of] = token;
            row_weights[*row_of] = *weights;
        }
    }
    // Each offset has moved to its expert's end, where the next expert begins.
    for (int64_t e = num_experts; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    return offsets[num_experts];
}

}  // namespace moesaic
