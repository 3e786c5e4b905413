// Rows of queries and one tile of a paged cache: keys and values of 32 tokens.
//
// A row's sums run along the key's numbers, or along the tokens, in order and by one fma each, whatever rows share the
// call: its bits are those that it has alone.
#pragma once

#include "paged.h"
#include "simd.h"
#include "transpose.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int tile_vectors = block_tokens / Vec::lanes;
constexpr int sums_in_registers = Vec::registers * 3 / 4;  // beside what is added to them
constexpr int row_tile = sums_in_registers / tile_vectors;

template <int R>
struct Rows {
    static constexpr int count = R;
};

// f(row, Rows<count>) for the rows before `end`: as many at a time as there are registers for, then fewer.
template <int R = row_tile, class F>
inline void by_rows(int64_t row, int64_t end, const F &f) {
    for (; row + R <= end; row += R) f(row, Rows<R>{});
    if constexpr (R > 1) by_rows<R == 12 ? 8 : R / 2 + R % 2>(row, end, f);
}

// Keys [size][32] and values [32][pitch] of a tile, read as floats. Those of 8 bits have the scales of paged.h beside
// them, as floats; their product with these is exact, so that it does not matter where it is taken.
template <class T>
struct Keys {
    const T *numbers;

    Vec at(int64_t a, int64_t token) const { return load(numbers + a * block_tokens + token); }
};
template <>
struct Keys<int8_t> {
    const int8_t *numbers;
    const float *scales;

    Vec at(int64_t a, int64_t token) const {
        return load(numbers + a * block_tokens + token) * load(scales + a / scale_numbers * block_tokens + token);
    }
};

template <class T>
struct Values {
    const T *numbers;
    int64_t pitch;

    Vec at(int64_t token, int64_t column) const { return load(numbers + token * pitch + column); }
};
template <>
struct Values<int8_t> {
    const int8_t *numbers;
    int64_t pitch;
    const float *scales;

    Vec at(int64_t token, int64_t column) const {
        return load(numbers + token * pitch + column) * set(scales[column / scale_numbers * block_tokens + token]);
    }
};

// scores [R][32] = queries [R][size] times keys.
template <int R, class T>
inline void score_tile(const float *q, int64_t size, const Keys<T> &keys, float *scores) {
    Vec sums[R][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) sums[r][i] = set(0.0f);
    for (int64_t a = 0; a < size; ++a) {
        Vec k[tile_vectors];
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) k[i] = keys.at(a, i * Vec::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = set(q[r * size + a]);
#pragma GCC unroll 8
            for (int i = 0; i < tile_vectors; ++i) sums[r][i] = fma(x, k[i], sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) store(scores + r * block_tokens + i * Vec::lanes, sums[r][i]);
}

// The tokens of a tile that a row sees.
struct Span {
    int64_t first, end;

    bool operator==(const Span &other) const { return first == other.first && end == other.end; }
};

// Values of a tile, and what is made of them: out [R][columns].
template <class T>
struct Weighing {
    const Values<T> &values;
    int64_t columns;
    Span seen;
};

// out = out * factor + weights [R][32] times values, C vectors of columns.
template <int R, int C, class T>
inline void weigh_columns(const Weighing<T> &w, int64_t column, const float *weights, const float *factors,
                          float *out) {
    Vec sums[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            sums[r][c] = load(out + r * w.columns + column + c * Vec::lanes) * set(factors[r]);
    for (int64_t t = w.seen.first; t < w.seen.end; ++t) {
        Vec v[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) v[c] = w.values.at(t, column + c * Vec::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = set(weights[r * block_tokens + t]);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[r][c] = fma(x, v[c], sums[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(out + r * w.columns + column + c * Vec::lanes, sums[r][c]);
}

constexpr int columns_for(int rows) {
    int columns = 8;
    while (columns * rows > sums_in_registers && columns > 1) columns /= 2;
    return columns;
}

// All columns, of which there are whole vectors.
template <int R, int C = columns_for(R), class T>
inline void weigh_tile(const Weighing<T> &w, const float *weights, const float *factors, float *out,
                       int64_t column = 0) {
    for (; column + C * Vec::lanes <= w.columns; column += C * Vec::lanes)
        weigh_columns<R, C>(w, column, weights, factors, out);
    if constexpr (C > 1) weigh_tile<R, C / 2>(w, weights, factors, out, column);
}

// Tokens [32][pitch], from number `a` on, as keys [pitch][32].
template <class T>
inline Keys<float> turned(const Values<T> &from, float *to, int64_t a = 0) {
    for (; a < from.pitch; a += Vec::lanes)
        for (int64_t t = 0; t < block_tokens; t += Vec::lanes) {
            Vec square[Vec::lanes];
            for (int i = 0; i < Vec::lanes; ++i) square[i] = from.at(t + i, a);
            transpose(square);
            for (int i = 0; i < Vec::lanes; ++i) store(to + (a + i) * block_tokens + t, square[i]);
        }
    return {to};
}

#if defined(__AVX512F__)
// Two numbers of a token turn as one lane: half the shuffles.
inline Keys<float> turned(const Values<bf16> &from, float *to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    int64_t a = 0;
    for (; a + 32 <= from.pitch; a += 32)
        for (int64_t t = 0; t < block_tokens; t += 16) {
            __m512i square[16];
            for (int i = 0; i < 16; ++i) square[i] = _mm512_loadu_si512(from.numbers + (t + i) * from.pitch + a);
            transpose(square);
            float *at = to + a * block_tokens + t;
            for (int i = 0; i < 16; ++i, at += 2 * block_tokens) {
                store(at, Vec{_mm512_castsi512_ps(_mm512_slli_epi32(square[i], 16))});
                store(at + block_tokens, Vec{_mm512_castsi512_ps(_mm512_and_si512(square[i], upper))});
            }
        }
    return turned<bf16>(from, to, a);
}
#endif

// Keys of `size` numbers, and values, as floats: what many rows read is widened once.
inline Keys<float> widened(const Keys<float> &keys, int64_t, float *) { return keys; }
template <class T>
inline Keys<float> widened(const Keys<T> &keys, int64_t size, float *to) {
    for (int64_t a = 0; a < size; ++a)
        for (int64_t t = 0; t < block_tokens; t += Vec::lanes) store(to + a * block_tokens + t, keys.at(a, t));
    return {to};
}
inline Values<float> widened(const Values<float> &values, float *) { return values; }
template <class T>
inline Values<float> widened(const Values<T> &values, float *to) {
    for (int64_t t = 0; t < block_tokens; ++t)
        for (int64_t i = 0; i < values.pitch; i += Vec::lanes) store(to + t * values.pitch + i, values.at(t, i));
    return {to, values.pitch};
}

}  // namespace
}  // namespace moesaic::MOESAIC_ISA
