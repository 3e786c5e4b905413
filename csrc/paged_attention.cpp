// Softmax attention of a step's tokens to what their sequences have cached (paged.h), by tiles of 32 positions and with
// one pass over them (arXiv:1805.02867, alg. 3; FlashAttention, arXiv:2205.14135).
//
// A token's tiles begin at multiples of 32 positions and are taken in order; so its bits depend neither on the other
// tokens of the step, nor on how its prompt was cut, nor on the number of threads. Compiled without contraction
// (CMakeLists.txt): sums and products are rounded where this file says so, in every instance of a template alike.
#include "paged_tiles.h"
#include "parallel.h"
#include "scratch.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t rows_together = 64;  // queries that share a tile: they and their sums stay in the nearest caches
constexpr int64_t grain = 1 << 15;     // multiplications below which waking a second thread costs more than it saves
enum Slot { stretches_slot = 3, rows_slot, tile_slot };  // those of attention.cpp, which never runs at the same time

// Tokens in a row that follow each other in their sequence, too.
struct Stretch {
    int64_t first, count;
};

// A stretch and `heads` of one group: row i * heads + h is that of token i.
struct Item {
    Stretch tokens;
    int64_t group, first_head, heads;
};

struct Call {
    const PagedCache &cache;
    const PagedTokens &tokens;
    const PagedSight &sight;
    const float *q;
    int64_t q_stride;
    float *out;
    int64_t out_stride;
};

inline int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }
inline int64_t at_least(int64_t x, int64_t least) { return x > least ? x : least; }
inline int64_t in_sixteens(int64_t x) { return (x + 15) / 16 * 16; }
inline int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// What is known of an item's rows after some tiles.
struct State {
    int64_t count, key_dim, columns;
    float *q;        // [count][key_dim], scaled
    float *out;      // [count][columns]: values times e^(score - highest)
    float *totals;   // [count][lanes]: e^(score - highest)
    float *highest;  // [count]
    float *factors;  // [count]: what the last tile made of e^(score - highest) before it
    float *scores;   // [count][32]: of the last tile

    State(const Call &call, const Item &item)
        : count(item.tokens.count * item.heads), key_dim(call.cache.key_dim),
          columns(in_sixteens(call.cache.value_dim)) {
        const int64_t rows = in_sixteens(count), row = key_dim + columns + Vec::lanes + 2 + block_tokens;
        q = static_cast<float *>(scratch(rows_slot, rows * row * 4));
        out = q + rows * key_dim;
        totals = out + rows * columns;
        highest = totals + rows * Vec::lanes;
        factors = highest + rows;
        scores = factors + rows;
        std::memset(out, 0, static_cast<size_t>(rows * (columns + Vec::lanes)) * 4);
        std::memset(factors, 0, static_cast<size_t>(rows) * 4);
        for (int64_t row = 0; row < count; ++row) begin(call, item, row);
    }

    // A sink is there before the first tile; its e^(sink - highest) joins the total at the end.
    void begin(const Call &call, const Item &item, int64_t row) {
        const int64_t token = item.tokens.first + row / item.heads, head = item.first_head + row % item.heads;
        const float *from = call.q + token * call.q_stride + head * key_dim;
        for (int64_t a = 0; a < key_dim; ++a) q[row * key_dim + a] = from[a] * call.sight.scale;
        highest[row] = call.sight.sinks ? call.sight.sinks[head] : -__builtin_inff();
    }
};

// The highest score of a row so far. What is not seen becomes minus infinity, and e^-87 later: lost beside e^0.
inline void find_highest(const State &state, int64_t row, const Span &seen) {
    float *scores = state.scores + row * block_tokens;
    for (int64_t t = 0; t < seen.first; ++t) scores[t] = -__builtin_inff();
    for (int64_t t = seen.end; t < block_tokens; ++t) scores[t] = -__builtin_inff();
    Vec high = load(scores);
    for (int i = 1; i < tile_vectors; ++i) high = max(high, load(scores + i * Vec::lanes));
    const float before = state.highest[row], now = highest(high);
    state.highest[row] = now > before ? now : before;
    state.factors[row] = before - state.highest[row];
}

// Scores become e^(score - highest), and join the row's total.
inline void exponentiate(const State &state, int64_t row) {
    float *scores = state.scores + row * block_tokens, *total = state.totals + row * Vec::lanes;
    const Vec high = set(state.highest[row]);
    Vec sum = load(total) * set(state.factors[row]);
    for (int i = 0; i < tile_vectors; ++i) {
        const Vec e = exp(load(scores + i * Vec::lanes) - high);
        store(scores + i * Vec::lanes, e);
        sum = sum + e;
    }
    store(total, sum);
}

// One tile and the tokens [first, end) of a stretch that see some of it.
struct Visit {
    const PagedSight &sight;
    int64_t position;  // of the stretch's first token
    int64_t start;     // position of the tile
    int64_t first, end;

    Span seen(int64_t token) const {
        const int64_t at = position + token;
        return {at_least(sight.first_seen(at) - start, 0), at_most(at + 1 - start, block_tokens)};
    }
};

void weights_of(const State &state, const Visit &visit, int64_t heads) {
    for (int64_t token = visit.first; token < visit.end; ++token) {
        const Span seen = visit.seen(token);
        for (int64_t row = token * heads; row < (token + 1) * heads; ++row) find_highest(state, row, seen);
    }
    const int64_t first = visit.first * heads, end = visit.end * heads;
    for (int64_t row = first / Vec::lanes * Vec::lanes; row < end; row += Vec::lanes)
        store(state.factors + row, exp(load(state.factors + row)));
    for (int64_t row = first; row < end; ++row) exponentiate(state, row);
}

template <class T>
void score(const State &state, int64_t first, int64_t end, const Keys<T> &keys) {
    by_rows(first, end, [&](int64_t row, auto rows) {
        score_tile<rows.count>(state.q + row * state.key_dim, state.key_dim, keys, state.scores + row * block_tokens);
    });
}

// Tokens that see the same of a tile are weighed together.
template <class T>
void weigh(const State &state, const Visit &visit, int64_t heads, const Values<T> &values) {
    for (int64_t token = visit.first, next; token < visit.end; token = next) {
        const Span seen = visit.seen(token);
        for (next = token + 1; next < visit.end && visit.seen(next) == seen;) ++next;
        const Weighing<T> weighing{values, state.columns, seen};
        by_rows(token * heads, next * heads, [&](int64_t row, auto rows) {
            weigh_tile<rows.count>(weighing, state.scores + row * block_tokens, state.factors + row,
                                   state.out + row * state.columns);
        });
    }
}

// Room for a tile in floats.
struct Room {
    float *keys, *values, *key_scales, *value_scales;

    explicit Room(const PagedCache &cache) {
        const int64_t values_size = block_tokens * cache.value_pitch(), scales = cache.key_scales();
        const int64_t size = cache.key_numbers() + values_size + scales + cache.value_scales();
        keys = static_cast<float *>(scratch(tile_slot, size * 4));
        values = keys + cache.key_numbers();
        key_scales = values + values_size;
        value_scales = key_scales + scales;
    }
};

// Scales behind a tile's numbers, as floats.
const float *scales_behind(const int8_t *numbers, int64_t count, int64_t scales, float *to) {
    const bf16 *from = reinterpret_cast<const bf16 *>(numbers + count);
    for (int64_t i = 0; i < scales; i += Vec::lanes) store(to + i, load(from + i));
    return to;
}

template <class T>
Keys<T> keys_of(const PagedCache &cache, const uint8_t *tile, const Room &room) {
    const T *numbers = reinterpret_cast<const T *>(tile);
    if constexpr (sizeof(T) == 1)
        return {numbers, scales_behind(numbers, cache.key_numbers(), cache.key_scales(), room.key_scales)};
    else return {numbers};
}

template <class T>
Values<T> values_of(const PagedCache &cache, const uint8_t *tile, const Room &room) {
    const T *numbers = reinterpret_cast<const T *>(tile);
    if constexpr (sizeof(T) == 1)
        return {numbers, cache.value_pitch(),
                scales_behind(numbers, cache.value_numbers(), cache.value_scales(), room.value_scales)};
    else return {numbers, cache.value_pitch()};
}

// Keys that are values, too.
template <class T>
Values<T> latents_of(const PagedCache &cache, const Keys<T> &keys) {
    if constexpr (sizeof(T) == 1) return {keys.numbers, cache.value_pitch(), keys.scales};
    else return {keys.numbers, cache.value_pitch()};
}

// Rows from which on a tile is worth being widened first: 8 bits take more to widen, so that doing it twice is too much.
template <class T>
constexpr int64_t many_rows = sizeof(T) == 1 ? row_tile + 1 : 2 * row_tile;

template <class T>
void look_at(const PagedCache &cache, const State &state, const Visit &visit, const Item &item, int64_t block) {
    const int64_t first = visit.first * item.heads, end = visit.end * item.heads;
    const bool widen = end - first >= many_rows<T>;
    const Room room(cache);
    const Keys<T> keys = keys_of<T>(cache, cache.key_tile(block, item.group), room);
    const Values<T> values = cache.shared ? latents_of(cache, keys)
                                          : values_of<T>(cache, cache.value_tile(block, item.group), room);
    if (cache.shared) score(state, first, end, turned(values, room.keys));
    else if (widen) score(state, first, end, widened(keys, cache.key_dim, room.keys));
    else score(state, first, end, keys);
    weights_of(state, visit, item.heads);
    if (widen) weigh(state, visit, item.heads, widened(values, room.values));
    else weigh(state, visit, item.heads, values);
}

void finish(const Call &call, const Item &item, const State &state) {
    const int64_t size = call.cache.value_dim;
    for (int64_t row = 0; row < state.count; ++row) {
        const int64_t token = item.tokens.first + row / item.heads, head = item.first_head + row % item.heads;
        float total = sum(load(state.totals + row * Vec::lanes));
        if (call.sight.sinks) {
            float e[Vec::lanes];
            store(e, exp(set(call.sight.sinks[head] - state.highest[row])));
            total += e[0];
        }
        const float *from = state.out + row * state.columns, share = 1.0f / total;
        float *to = call.out + token * call.out_stride + head * size;
        for (int64_t i = 0; i < size; ++i) to[i] = from[i] * share;
    }
}

template <class T>
void attend(const Call &call, const Item &item) {
    const State state(call, item);
    const PagedSight &sight = call.sight;
    const int64_t count = item.tokens.count, position = call.tokens.positions[item.tokens.first];
    const int32_t *table =
        call.tokens.tables + call.tokens.sequence_of[item.tokens.first] * call.tokens.table_width;
    for (int64_t tile = sight.first_seen(position) / block_tokens; tile * block_tokens < position + count; ++tile) {
        const int64_t start = tile * block_tokens;
        Visit visit{sight, position, start, at_least(start - position, 0), count};
        while (visit.end > visit.first && sight.first_seen(position + visit.end - 1) >= start + block_tokens)
            --visit.end;
        if (visit.end > visit.first) look_at<T>(call.cache, state, visit, item, table[tile]);
    }
    finish(call, item, state);
}

int64_t cut_into_stretches(const PagedTokens &tokens, int64_t longest, Stretch *stretches) {
    int64_t count = 0;
    for (int64_t token = 0; token < tokens.tokens; ++token) {
        const bool follows = token > 0 && tokens.sequence_of[token] == tokens.sequence_of[token - 1] &&
                             tokens.positions[token] == tokens.positions[token - 1] + 1;
        if (follows && stretches[count - 1].count < longest) ++stretches[count - 1].count;
        else stretches[count++] = {token, 1};
    }
    return count;
}

// Multiplications of all heads.
int64_t work_of(const Call &call) {
    int64_t pairs = 0;
    for (int64_t token = 0; token < call.tokens.tokens; ++token) {
        const int64_t position = call.tokens.positions[token];
        pairs += position + 1 - call.sight.first_seen(position);
    }
    return pairs * call.sight.num_heads * (call.cache.key_dim + call.cache.value_dim);
}

// Parts that a group's heads are cut into: as few as the caches allow and leave threads idle for a fifth of the time at
// most, as each part loads its tiles anew.
int64_t parts_of_group(int64_t heads, int64_t items, int threads) {
    int64_t parts = divide_up(heads, rows_together);
    while (parts < heads && 5 * items * parts < 4 * threads * divide_up(items * parts, threads)) ++parts;
    return parts;
}

}  // namespace

void paged_attention(const PagedCache &cache, const PagedTokens &tokens, const PagedSight &sight, const float *q,
                     int64_t q_stride, float *out, int64_t out_stride, int threads) {
    const Call call{cache, tokens, sight, q, q_stride, out, out_stride};
    const int useful = threads_for(work_of(call), grain, threads);
    const int64_t groups = cache.num_groups, heads = sight.num_heads / groups;
    Stretch *stretches = static_cast<Stretch *>(
        scratch(stretches_slot, tokens.tokens * static_cast<int64_t>(sizeof(Stretch))));
    const int64_t count = cut_into_stretches(tokens, at_least(rows_together / heads, 1), stretches);
    const int64_t parts = parts_of_group(heads, count * groups, useful);
    parallel_for(count * groups * parts, 1, useful, [&](int64_t i) {
        // The last tokens of a prompt see the most: long items go first, so that threads end together.
        const int64_t stretch = count - 1 - i / (groups * parts), group = i / parts % groups, part = i % parts;
        const int64_t first = heads * part / parts, end = heads * (part + 1) / parts;
        const Item item{stretches[stretch], group, group * heads + first, end - first};
        switch (cache.format) {
            case CacheFormat::fp32: return attend<float>(call, item);
            case CacheFormat::bf16: return attend<bf16>(call, item);
            case CacheFormat::int8: return attend<int8_t>(call, item);
        }
    });
}

}  // namespace moesaic::MOESAIC_ISA
