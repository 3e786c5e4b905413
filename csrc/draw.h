// A token drawn from a row of logits, and what the likeliest tokens of one are.
#pragma once

#include <cstdint>
#include <vector>

namespace moesaic {

constexpr int64_t draw_block = 64;  // logits of which the greatest, and the weight of all, are known together

// Weights are e^((logit - greatest) / temperature); of equally likely tokens the first come first.
struct DrawRule {
    double temperature;  // 0: the first of the greatest, whatever the rest says
    int64_t top_k;       // the likeliest so many, and those as likely as the last of them; 0: all
    double top_p;        // of these the likeliest whose share reaches this; 1: all
    double min_p;        // of these those that weigh no less, where the likeliest weighs 1
    double number;       // at least 0, below 1: how far along the weights of those that are left, in the order of ids
};

// allowed: bit id % 8 of byte id / 8 for each token; null: all. -1: none of them is possible. What is drawn is what the
// whole row would give if the others' logits were minus infinity.
int64_t draw_row(const float *logits, int64_t vocab, const DrawRule &rule, const uint8_t *allowed);

// ln of the sum of e^logit; and the `count` likeliest tokens, from the first on.
double score_row(const float *logits, int64_t vocab, int64_t count, std::vector<int64_t> &ids);

}  // namespace moesaic
