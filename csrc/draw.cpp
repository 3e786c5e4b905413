// One row's token by one random number (draw.h). What looks at every logit is compiled for each instruction set
// (weigh_logits.cpp); here only those are looked at that can be among the chosen, block by block.
#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "dispatch.h"
#include "scratch.h"

namespace moesaic {
namespace {

// 16 to 22 are packed_multiply.h's.
enum Slot { greatest_slot = 9, weights_slot, sums_slot, ids_slot, kept_slot, some_slot, blocks_slot, starts_slot = 23 };

constexpr float steepest = 1e30f, flattest = 1e-37f;  // times a difference of 0, or an infinite one, it stays so

template <class T>
T *room(Slot slot, int64_t count) {
    return static_cast<T *>(scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

int64_t blocks_of(int64_t size) { return (size + draw_block - 1) / draw_block; }

// whole: how many tokens there are, with those that are not among these because they weigh nothing.
struct Row {
    const float *logits;
    int64_t size, whole, blocks;
    float *greatest_of;  // each block
    float greatest;

    Row(const float *logits, int64_t size, int64_t whole)
        : logits(logits), size(size), whole(whole), blocks(blocks_of(size)) {
        greatest_of = room<float>(greatest_slot, blocks);
        chosen().greatest_logits(logits, size, greatest_of);
        greatest = *std::max_element(greatest_of, greatest_of + blocks);
    }

    // f(id) for all logits that are no less.
    template <class F>
    void for_each_from(float least, const F &f) const {
        for (int64_t block = 0; block < blocks; ++block) {
            if (greatest_of[block] < least) continue;
            const int64_t end = std::min(size, (block + 1) * draw_block);
            for (int64_t id = block * draw_block; id < end; ++id)
                if (logits[id] >= least) f(id);
        }
    }

    // The k-th greatest logit, or the least where there are fewer: no less than the k-th greatest of the blocks' greatest.
    float kth(int64_t k) const {
        float *some = room<float>(some_slot, size), least = -std::numeric_limits<float>::infinity();
        if (k <= blocks) {
            std::copy(greatest_of, greatest_of + blocks, some);
            std::nth_element(some, some + k - 1, some + blocks, std::greater<float>());
            least = some[k - 1];
        }
        float *end = some;
        for_each_from(least, [&](int64_t id) { *end++ = logits[id]; });
        if (end == some) return least;
        float *kth = std::min(some + k, end) - 1;
        std::nth_element(some, kth, end, std::greater<float>());
        return *kth;
    }
};

// The blocks of a row in which any token is allowed, one after another, the others' logits in them minus infinity.
// A block's sum does not depend on where it lies, and those left out add nothing: what is drawn is the same.
struct Allowed {
    float *logits;
    int64_t *starts;  // of each block, in the row
    int64_t size;

    Allowed(const float *row, int64_t vocab, const uint8_t *bits)
        : logits(room<float>(blocks_slot, vocab)), starts(room<int64_t>(starts_slot, blocks_of(vocab))), size(0) {
        for (int64_t start = 0; start < vocab; start += draw_block) {
            const int64_t count = std::min(vocab - start, draw_block);
            const uint64_t word = word_at(bits + start / 8, count);
            if (!word) continue;
            starts[size / draw_block] = start;
            take(row + start, word, count);
            size += count;
        }
    }

    int64_t id(int64_t place) const { return starts[place / draw_block] + place % draw_block; }

private:
    static uint64_t word_at(const uint8_t *bits, int64_t count) {
        uint64_t word = 0;
        for (int64_t byte = 0; byte * 8 < count; ++byte) word |= static_cast<uint64_t>(bits[byte]) << byte * 8;
        return word & all(count);
    }

    static uint64_t all(int64_t count) { return ~uint64_t{0} >> (draw_block - count); }

    // Most blocks have few tokens that are allowed, or few that are not.
    void take(const float *row, uint64_t word, int64_t count) {
        constexpr float none = -std::numeric_limits<float>::infinity();
        float *out = logits + size;
        if (const uint64_t others = ~word & all(count); __builtin_popcountll(others) * 2 < count) {
            std::copy(row, row + count, out);
            for_each_bit(others, [&](int bit) { out[bit] = none; });
        } else {
            std::fill(out, out + count, none);
            for_each_bit(word, [&](int bit) { out[bit] = row[bit]; });
        }
    }

    template <class F>
    static void for_each_bit(uint64_t word, const F &f) {
        for (; word; word &= word - 1) f(__builtin_ctzll(word));
    }
};

// Tokens that may be drawn, in the order of their ids. ids: null: all there are. among: how many there were, with those
// that weigh nothing.
struct Left {
    int64_t count, among;
    int64_t *ids;
    float *weights;
    const double *sums;  // of each block of weights
    double total;
};

Left weighed(const float *logits, int64_t count, int64_t among, int64_t *ids, float greatest, float factor) {
    float *weights = room<float>(weights_slot, count);
    double *sums = room<double>(sums_slot, blocks_of(count));
    chosen().weigh_logits(logits, count, greatest, factor, weights, sums);
    return {count, among, ids, weights, sums, std::accumulate(sums, sums + blocks_of(count), 0.0)};
}

Left likeliest(const Row &row, int64_t top_k, float factor) {
    if (top_k == 0 || top_k >= row.whole)
        return weighed(row.logits, row.size, row.whole, nullptr, row.greatest, factor);
    const float least = row.kth(top_k);
    int64_t *ids = room<int64_t>(ids_slot, row.size), count = 0;
    float *logits = room<float>(some_slot, row.size);
    row.for_each_from(least, [&](int64_t id) {
        logits[count] = row.logits[id];
        ids[count++] = id;
    });
    const int64_t among = least > -std::numeric_limits<float>::infinity() ? count : row.whole;
    return weighed(logits, count, among, ids, row.greatest, factor);
}

// Those that weigh no less than `least`, which is more than 0. All are written and few counted: which of them stay is
// nothing that a processor could foresee.
Left kept(const Left &from, double least) {
    int64_t *ids = from.ids ? from.ids : room<int64_t>(ids_slot, from.count), count = 0;
    float *weights = room<float>(kept_slot, from.count);
    for (int64_t start = 0; start < from.count; start += draw_block) {
        if (from.sums[start / draw_block] < least) continue;
        const int64_t end = std::min(from.count, start + draw_block);
        for (int64_t i = start; i < end; ++i) {
            const float weight = from.weights[i];
            weights[count] = weight;
            ids[count] = from.ids ? from.ids[i] : i;
            count += weight >= least;
        }
    }
    return {count, from.among, ids, weights, nullptr, from.total};
}

// Bits of numbers from 0 to 1 grow with them: bins of an eighth of an octave.
constexpr int bin_shift = 20;
constexpr uint32_t last_bin = 0x3f800000u >> bin_shift;

uint32_t bin_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return std::min(bits >> bin_shift, last_bin);
}

// Those with the greatest weights that together reach `wanted`; of equal ones the first.
void keep_share(Left &left, double wanted) {
    double bins[last_bin + 1] = {}, before = 0;
    for (int64_t i = 0; i < left.count; ++i) bins[bin_of(left.weights[i])] += left.weights[i];
    int64_t bin = last_bin;
    while (bin >= 0 && before + bins[bin] < wanted) before += bins[bin--];
    if (bin < 0) return;  // by rounding, where hardly anything is to be left out
    float *some = room<float>(some_slot, left.count);
    const auto is_here = [=](float weight) { return bin_of(weight) == static_cast<uint32_t>(bin); };
    float *end = std::copy_if(left.weights, left.weights + left.count, some, is_here);
    std::sort(some, end, std::greater<float>());
    const float *last = some;
    while (last + 1 < end && (before += *last) < wanted) ++last;
    const float least = *last;
    int64_t equal = std::count(static_cast<const float *>(some), last + 1, least), count = 0;
    for (int64_t i = 0; i < left.count; ++i) {
        const float weight = left.weights[i];
        left.weights[count] = weight;
        left.ids[count] = left.ids[i];
        count += weight == least ? equal-- > 0 : weight > least;
    }
    left.count = count;
}

// The first place at whose end more than `wanted` has gone by, which is less than all.
template <class T>
int64_t place_of(const T *weights, int64_t count, double wanted) {
    double gone = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (!(weights[i] > 0)) continue;
        last = i;
        gone += weights[i];
        if (gone > wanted) break;
    }
    return last;  // by rounding, the last that weighs something
}

int64_t draw_from(const Left &left, double number) {
    if (left.ids) {
        const double total = std::accumulate(left.weights, left.weights + left.count, 0.0);
        return left.ids[place_of(left.weights, left.count, number * total)];
    }
    const double wanted = number * left.total;
    const int64_t block = place_of(left.sums, blocks_of(left.count), wanted), start = block * draw_block;
    const double before = std::accumulate(left.sums, left.sums + block, 0.0);
    const int64_t count = std::min(left.count - start, draw_block);
    return start + place_of(left.weights + start, count, wanted - before);
}

int64_t drawn(const Row &row, const DrawRule &rule) {
    if (rule.temperature == 0) {
        const int64_t block = std::find(row.greatest_of, row.greatest_of + row.blocks, row.greatest) - row.greatest_of;
        return std::find(row.logits + block * draw_block, row.logits + row.size, row.greatest) - row.logits;
    }
    const float factor = rule.temperature < 1.0 / steepest ? steepest
                         : std::max(static_cast<float>(1 / rule.temperature), flattest);
    Left left = likeliest(row, rule.top_k, factor);
    // All that weigh less together weigh less than what may be left out.
    const double least_of_share = 0.999 * (1 - rule.top_p) * left.total / static_cast<double>(left.among);
    const double least = std::max(rule.min_p, least_of_share);
    if (least > 0) left = kept(left, least);
    if (rule.top_p < 1) keep_share(left, rule.top_p * left.total);
    return draw_from(left, rule.number);
}

}  // namespace

int64_t draw_row(const float *logits, int64_t vocab, const DrawRule &rule, const uint8_t *allowed) {
    if (!allowed) return drawn(Row(logits, vocab, vocab), rule);
    const Allowed some(logits, vocab, allowed);
    if (!some.size) return -1;
    const Row row(some.logits, some.size, vocab);
    return row.greatest > -std::numeric_limits<float>::infinity() ? some.id(drawn(row, rule)) : -1;
}

double score_row(const float *logits, int64_t vocab, int64_t count, std::vector<int64_t> &ids) {
    const Row row(logits, vocab, vocab);
    ids.clear();
    if (count > 0) {
        row.for_each_from(row.kth(count), [&](int64_t id) { ids.push_back(id); });
        std::stable_sort(ids.begin(), ids.end(), [=](int64_t a, int64_t b) { return logits[a] > logits[b]; });
        ids.resize(std::min(ids.size(), static_cast<size_t>(count)));
    }
    return row.greatest + std::log(weighed(logits, vocab, vocab, nullptr, row.greatest, 1.0f).total);
}

}  // namespace moesaic
