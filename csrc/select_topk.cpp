// The k best experts of each token (topk.h).
#include "kernels.h"
#include "parallel.h"
#include "topk.h"

namespace moesaic {

void select_topk(const float *scores, int64_t *ids, int64_t tokens, int64_t num_experts, int64_t top_k, int threads) {
    parallel_for(tokens, 16, threads_for(tokens * num_experts, 8192, threads), [=](int64_t token) {
        topk_of_row(scores + token * num_experts, ids + token * top_k, num_experts, top_k);
    });
}

}  // namespace moesaic
