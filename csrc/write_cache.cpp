// Keys and values of new tokens into the blocks of a paged cache (paged.h), rounded to the nearest where it holds fewer
// than 32 bits of a number.
#include "paged.h"
#include "parallel.h"
#include "scratch.h"
#include "transpose.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 1 << 14;  // numbers below which waking a second thread costs more than it saves
constexpr int runs_slot = 3;        // of attention.cpp, which never runs at the same time

// Tokens next to each other in one block: written by one thread, as cache lines hold numbers of several tokens.
struct Run {
    int64_t token, count, block, place;
};

int64_t cut_into_runs(const PagedTokens &tokens, Run *runs) {
    int64_t count = 0;
    for (int64_t token = 0; token < tokens.tokens; ++token) {
        const int64_t position = tokens.positions[token], place = position % block_tokens;
        const int64_t block =
            tokens.tables[tokens.sequence_of[token] * tokens.table_width + position / block_tokens];
        const bool follows = count > 0 && runs[count - 1].block == block &&
                             runs[count - 1].place + runs[count - 1].count == place;
        if (follows) ++runs[count - 1].count;
        else runs[count++] = {token, 1, block, place};
    }
    return count;
}

inline void put_exactly(float *p, Vec x) { store(p, x); }
inline void put_exactly(bf16 *p, Vec x) { store_exactly(p, x); }

// `size` numbers, and zeros to the end of a whole sixteen.
template <class T>
void put_row(const float *from, int64_t size, T *to) {
    static_assert(16 % Vec::lanes == 0, "a pitch is whole vectors");
    for (int64_t i = 0; i < (size + 15) / 16 * 16; i += Vec::lanes) {
        const int64_t left = size - i;
        put_exactly(to + i, left >= Vec::lanes ? load(from + i) : load(from + i, left > 0 ? left : 0));
    }
}

// Keys [count] `stride` apart to [size][32]: as many tokens as there are lanes at a time, then one by one.
template <class T>
void turn_keys(const float *from, int64_t stride, int64_t count, int64_t size, T *to) {
    int64_t i = 0;
    for (; i + Vec::lanes <= count; i += Vec::lanes)
        for (int64_t a = 0; a < size; a += Vec::lanes) {
            const int64_t width = size - a < Vec::lanes ? size - a : Vec::lanes;
            const float *corner = from + i * stride + a;
            Vec square[Vec::lanes];
            for (int r = 0; r < Vec::lanes; ++r)
                square[r] = width == Vec::lanes ? load(corner + r * stride) : load(corner + r * stride, width);
            transpose(square);
            for (int64_t r = 0; r < width; ++r) put_exactly(to + (a + r) * block_tokens + i, square[r]);
        }
    for (; i < count; ++i)
        for (int64_t a = 0; a < size; ++a) put(to + a * block_tokens + i, from[i * stride + a]);
}

// Of up to 32 numbers; NaN where one of them is infinite or none.
bf16 scale_of(const float *from, int64_t count) {
    Vec most = set(0.0f), odd = set(0.0f);
    for (int64_t i = 0; i < count; i += Vec::lanes) {
        const Vec x = count - i >= Vec::lanes ? load(from + i) : load(from + i, count - i);
        most = max(most, max(x, set(0.0f) - x));
        odd = odd + (x - x);
    }
    bf16 scale;
    put(&scale, sum(odd) == 0.0f ? highest(most) / 127.0f : __builtin_nanf(""));
    return scale;
}

// A token's numbers `step` apart, those of a value with zeros to the end of a whole sixteen.
void put_rounded(const float *from, int64_t size, int8_t *to, int64_t step, bf16 *scales) {
    for (int64_t start = 0; start < size; start += scale_numbers, scales += block_tokens) {
        const int64_t count = size - start < scale_numbers ? size - start : scale_numbers;
        *scales = scale_of(from + start, count);
        const float scale = to_float(*scales);
        const Vec by = set(scale > 0 ? scale : 1.0f);  // a scale of zero: numbers that round to zero
        float whole[scale_numbers] = {};
        if (scale == scale)
            for (int64_t i = 0; i < count; i += Vec::lanes) {
                const Vec x = count - i >= Vec::lanes ? load(from + start + i) : load(from + start + i, count - i);
                store(whole + i, clamp(round(x / by), -127.0f, 127.0f));
            }
        const int64_t end = step == 1 ? (count + 15) / 16 * 16 : count;
        for (int64_t i = 0; i < end; ++i) to[(start + i) * step] = static_cast<int8_t>(whole[i]);
    }
}

// What a run brings to one group.
struct New {
    const float *k, *v;
    int64_t k_stride, v_stride;
};

template <class T>
void write_run(const PagedCache &cache, const Run &run, int64_t group, const New &own) {
    T *keys = reinterpret_cast<T *>(cache.key_tile(run.block, group));
    const int64_t pitch = cache.value_pitch();
    if (cache.shared) {
        for (int64_t i = 0; i < run.count; ++i)
            put_row(own.k + i * own.k_stride, cache.key_dim, keys + (run.place + i) * pitch);
        return;
    }
    turn_keys(own.k, own.k_stride, run.count, cache.key_dim, keys + run.place);
    T *values = reinterpret_cast<T *>(cache.value_tile(run.block, group));
    for (int64_t i = 0; i < run.count; ++i)
        put_row(own.v + i * own.v_stride, cache.value_dim, values + (run.place + i) * pitch);
}

template <>
void write_run<int8_t>(const PagedCache &cache, const Run &run, int64_t group, const New &own) {
    const auto scales_behind = [](int8_t *tile, int64_t numbers) { return reinterpret_cast<bf16 *>(tile + numbers); };
    int8_t *keys = reinterpret_cast<int8_t *>(cache.key_tile(run.block, group));
    bf16 *key_scales = scales_behind(keys, cache.key_numbers());
    const int64_t pitch = cache.value_pitch();
    for (int64_t i = 0, place = run.place; i < run.count; ++i, ++place) {
        const float *key = own.k + i * own.k_stride;
        if (cache.shared) put_rounded(key, cache.key_dim, keys + place * pitch, 1, key_scales + place);
        else put_rounded(key, cache.key_dim, keys + place, block_tokens, key_scales + place);
    }
    if (cache.shared) return;
    int8_t *values = reinterpret_cast<int8_t *>(cache.value_tile(run.block, group));
    bf16 *value_scales = scales_behind(values, cache.value_numbers());
    for (int64_t i = 0, place = run.place; i < run.count; ++i, ++place)
        put_rounded(own.v + i * own.v_stride, cache.value_dim, values + place * pitch, 1, value_scales + place);
}

}  // namespace

void write_cache(const PagedCache &cache, const PagedTokens &tokens, const float *k, int64_t k_stride, const float *v,
                 int64_t v_stride, int threads) {
    Run *runs = static_cast<Run *>(scratch(runs_slot, tokens.tokens * static_cast<int64_t>(sizeof(Run))));
    const int64_t count = cut_into_runs(tokens, runs), groups = cache.num_groups;
    const int64_t numbers = tokens.tokens * groups * (cache.key_dim + cache.value_dim);
    parallel_for(count * groups, 1, threads_for(numbers, grain, threads), [&](int64_t i) {
        const Run &run = runs[i / groups];
        const int64_t group = i % groups;
        const New own{k + run.token * k_stride + group * cache.key_dim,
                      v ? v + run.token * v_stride + group * cache.value_dim : nullptr, k_stride, v_stride};
        switch (cache.format) {
            case CacheFormat::fp32: return write_run<float>(cache, run, group, own);
            case CacheFormat::bf16: return write_run<bf16>(cache, run, group, own);
            case CacheFormat::int8: return write_run<int8_t>(cache, run, group, own);
        }
    });
}

}  // namespace moesaic::MOESAIC_ISA
