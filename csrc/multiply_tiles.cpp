// bf16 matrix products on the tile unit (AMX): 32 x 32 blocks of C in four tiles, 32 elements of k a step.
//
// A tile of A is 16 rows of 32 neighbours in k, read where they lie when rows run along k. A tile of B is 16 pairs of k
// by 16 columns, a pair side by side, and always packed. Products and sums are fp32; denormal numbers count as zero.
#include "product.h"

#if defined(__AMX_BF16__)
#include "scratch.h"
#include "tile_unit.h"
#include "transpose.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t side = 16, step = 32, tile_bytes = 1024;
constexpr int64_t max_k = 4096;                // of k in one pass
constexpr int64_t pack_bytes = 1024 << 10;     // B packed at once
constexpr int64_t rows_ahead = 8;              // of B fetched while packing
enum Slot { b_slot, a_slot, sum_slot };

// Tiles 0 to 3 are C (0 and 1 above 2 and 3), 4 and 5 A (upper, lower rows), 6 and 7 B (left, right columns).
void configure(int upper, int lower) {
    TileConfig config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = static_cast<uint8_t>(rows[i] > 0 ? rows[i] : 16);
    }
    written(&config);
    _tile_loadconfig(&config);
}

inline __mmask16 first_lanes(int64_t n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1u);
}
inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u; }

// Lane i: low[i] in its lower half, high[i] in its upper (zeros without it); zeros from n on.
inline __m512i interleave(const bf16 *low, const bf16 *high, int64_t n) {
    const __mmask16 mask = first_lanes(n);
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low));
    if (!high) return a;
    return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high)), 16));
}

inline __m512i interleave_whole(const bf16 *low, const bf16 *high) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(low)));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(high)));
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// The tile of B whose columns run along k, at `b`: pairs of k by columns, of which `ks` and `columns` exist.
void pack_tile(const bf16 *b, int64_t b_col, int64_t ks, int64_t columns, __m512i *to) {
    __m512i square[16];
    if (ks >= step && columns >= side) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < side; ++i) square[i] = _mm512_loadu_si512(b + i * b_col);
    } else {
        for (int64_t i = 0; i < side; ++i)
            square[i] = _mm512_maskz_loadu_epi16(i < columns ? first_halves(ks) : 0, b + i * b_col);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < side; ++i) to[i] = square[i];
}

// A tile of A whose columns run along k: the transpose of a tile of B.
void pack_tile_of_a(const bf16 *a, int64_t a_k, int64_t ks, int64_t rows, __m512i *to) {
    __m512i square[16];
    for (int64_t i = 0; i < side; ++i) {
        const bf16 *low = a + 2 * i * a_k;
        square[i] = 2 * i < ks ? interleave(low, 2 * i + 1 < ks ? low + a_k : nullptr, rows) : _mm512_setzero_si512();
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < side; ++i) to[i] = square[i];
}

// One 32 x 32 block: A by its two tile rows, B by its panel ([step][two tiles]).
struct Operands {
    const char *a[2];
    int64_t a_row, a_step;     // bytes
    const char *a_tail[2];     // the last, partial step of k (64 bytes a row), or null
    const char *b;
    int64_t steps;             // whole ones, without the tail
    const char *next;          // what will be read after this block, fetched a few lines a step; or null
    int64_t next_lines;        // a step
};

template <bool lower, bool right>
void accumulate(const Operands &o, int64_t b_step) {
    const auto one_step = [b_step](const char *a0, const char *a1, int64_t a_row, const char *b) {
        _tile_loadd(4, a0, a_row);
        _tile_loadd(6, b, 64);
        if (lower) _tile_loadd(5, a1, a_row);
        _tile_dpbf16ps(0, 4, 6);
        if (lower) _tile_dpbf16ps(2, 5, 6);
        if (right) {
            _tile_loadd(7, b + tile_bytes, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (lower && right) _tile_dpbf16ps(3, 5, 7);
        (void)a1, (void)b_step;
    };
    const char *b = o.b;
    const char *next = o.next;
    for (int64_t s = 0; s < o.steps; ++s, b += b_step) {
        if (next) {
            prefetch_lines(next, o.next_lines);
            next += 64 * o.next_lines;
        }
        one_step(o.a[0] + s * o.a_step, o.a[1] + s * o.a_step, o.a_row, b);
    }
    if (o.a_tail[0]) one_step(o.a_tail[0], o.a_tail[1], 64, b);
}

void multiply_block(const Operands &o, bool lower, bool right, int64_t b_step) {
    if (lower && right) accumulate<true, true>(o, b_step);
    else if (lower) accumulate<true, false>(o, b_step);
    else if (right) accumulate<false, true>(o, b_step);
    else accumulate<false, false>(o, b_step);
}

void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The four tiles of C from or to sums of 32 columns a row.
void load_sums(const float *sums, bool lower, bool right, int64_t pitch) {
    _tile_loadd(0, sums, pitch * 4);
    if (right) _tile_loadd(1, sums + side, pitch * 4);
    if (lower) _tile_loadd(2, sums + side * pitch, pitch * 4);
    if (lower && right) _tile_loadd(3, sums + side * pitch + side, pitch * 4);
}

void store_sums(float *sums, bool lower, bool right, int64_t pitch) {
    _tile_stored(0, sums, pitch * 4);
    if (right) _tile_stored(1, sums + side, pitch * 4);
    if (lower) _tile_stored(2, sums + side * pitch, pitch * 4);
    if (lower && right) _tile_stored(3, sums + side * pitch + side, pitch * 4);
}

template <class C>
inline void put_row(C *c, Vec sums, int64_t n, bool accumulate) {
    if (n >= side) store(c, accumulate ? load(c) + sums : sums);
    else if (n > 0) store(c, accumulate ? load(c, n) + sums : sums, n);
}

// 32 sums, written past the caches.
inline void stream_row(float *c, const float *sums) {
    stream(c, load(sums));
    stream(c + side, load(sums + side));
}
inline void stream_row(bf16 *c, const float *sums) {
    const __m256i low = narrow(load(sums).v), high = narrow(load(sums + side).v);
    _mm512_stream_si512(reinterpret_cast<__m512i *>(c), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// 32 whole rows of sums [32][32] as columns of C, a cache line of each at once: rows of C a power of two apart share
// few lines of cache, and the first half of one would not wait there for the second.
void put_turned(const float *sums, bf16 *c, int64_t c_col, int64_t columns) {
    for (int64_t n = 0; n < columns; n += side) {
        Vec low[16], high[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < side; ++i) low[i] = load(sums + i * step + n);
        transpose(low);
#pragma GCC unroll 16
        for (int64_t i = 0; i < side; ++i) high[i] = load(sums + (side + i) * step + n);
        transpose(high);
        const int64_t here = at_most(columns - n, side);
        for (int64_t i = 0; i < here; ++i)
            _mm512_storeu_si512(c + (n + i) * c_col, (__m512i)_mm512_cvtne2ps_pbh(high[i].v, low[i].v));
    }
}

// Rounds a block of sums [32][32] into C.
template <class C>
void put_block(const float *sums, C *c, const Product<bf16, C> &p, int64_t rows, int64_t columns) {
    const int64_t c_row = p.c_row, c_col = p.c_col;
    if (c_col == 1 && p.stream && columns == step) {
        for (int64_t m = 0; m < rows; ++m) stream_row(c + m * c_row, sums + m * step);
        return;
    }
    if (c_col == 1) {
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < columns; n += side)
                put_row(c + m * c_row + n, load(sums + m * step + n), columns - n, p.accumulate);
        return;
    }
    if constexpr (sizeof(C) == 2) {
        if (rows == step && !p.accumulate) return put_turned(sums, c, c_col, columns);
    }
    for (int64_t m = 0; m < rows; m += side)
        for (int64_t n = 0; n < columns; n += side) {
            Vec square[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < side; ++i) square[i] = load(sums + (m + i) * step + n);
            transpose(square);
            const int64_t here = at_most(columns - n, side);
            for (int64_t i = 0; i < here; ++i) put_row(c + m + (n + i) * c_col, square[i], rows - m, p.accumulate);
        }
}

// A panel and some lines more: were panels a multiple of 4096 bytes apart, one row of all would share a few lines of
// cache.
constexpr int64_t bytes_of_panel(int64_t steps) { return (steps > 0 ? steps : 1) * 2 * tile_bytes + 192; }

// One stretch of k against some of B's columns, which it packs.
template <class C>
struct Pass {
    const Product<bf16, C> &p;
    int64_t m0, m1, n0, n1, k0, ks;
    bool first, last;
    float *sums;  // [part][m1 - m0, even 32][n1 - n0, even 32], where C is not reached in one pass
    char *b_panels;
    int64_t steps() const { return ceil_div(ks, step); }
    int64_t panel_bytes() const { return bytes_of_panel(steps()); }

    void pack_b(int part) const {
        for (int64_t s = 0; s < steps(); ++s) {
            const bf16 *from = p.b + part * p.b_part + (k0 + s * step) * p.b_k;
            char *to = b_panels + s * 2 * tile_bytes;
            if (p.b_col == 1) pack_step(from, ks - s * step, to);
            else
                for (int64_t n = n0; n < n1; n += side)
                    pack_tile(from + n * p.b_col, p.b_col, ks - s * step, n1 - n,
                              reinterpret_cast<__m512i *>(to + (n - n0) / step * panel_bytes() +
                                                          (n - n0) / side % 2 * tile_bytes));
        }
        written(b_panels);
    }

    // 32 of k whose rows run along n: read along them, two at a time.
    void pack_step(const bf16 *from, int64_t left, char *to) const {
        for (int64_t i = 0; i < side; ++i, to += 64) {
            const bf16 *low = from + 2 * i * p.b_k;
            const bf16 *high = 2 * i + 1 < left ? low + p.b_k : nullptr;
            char *panel = to;
            for (int64_t n = n0; n < n1; n += step, panel += panel_bytes()) {
                const bool whole = high && n1 - n >= step;
                if (whole) prefetch(low + rows_ahead * p.b_k + n), prefetch(high + rows_ahead * p.b_k + n);
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t column = n + half * side;
                    __m512i *row = reinterpret_cast<__m512i *>(panel + half * tile_bytes);
                    if (whole) *row = interleave_whole(low + column, high + column);
                    else *row = 2 * i < left ? interleave(low + column, high ? high + column : nullptr, n1 - column)
                                             : _mm512_setzero_si512();
                }
            }
        }
    }

    // A's rows m to m + rows where the tile unit can read them.
    Operands operands(const bf16 *a, int64_t m, int64_t rows, char *a_tiles) const {
        Operands o{};
        const bf16 *a0 = a + m * p.a_row + k0 * p.a_k;
        if (p.a_k == 1) {
            const int64_t tail = ks % step;
            o.a_row = p.a_row * 2;
            o.a_step = step * 2;
            o.steps = ks / step;
            for (int64_t half = 0; half < 2; ++half) {
                const bf16 *from = a0 + half * side * p.a_row;
                o.a[half] = reinterpret_cast<const char *>(from);
                if (!tail) continue;
                __m512i *to = reinterpret_cast<__m512i *>(a_tiles + half * tile_bytes);
                o.a_tail[half] = reinterpret_cast<const char *>(to);
                for (int64_t i = 0; i < side && half * side + i < rows; ++i)
                    to[i] = _mm512_maskz_loadu_epi16(first_halves(tail), from + i * p.a_row + (ks - tail));
            }
            written(a_tiles);
            return o;
        }
        o.a_row = 64;
        o.a_step = 2 * tile_bytes;
        o.steps = steps();
        for (int64_t half = 0; half < 2; ++half) {
            o.a[half] = a_tiles + half * tile_bytes;
            if (half * side >= rows) continue;
            for (int64_t s = 0; s < steps(); ++s)
                pack_tile_of_a(a0 + half * side + s * step * p.a_k, p.a_k, ks - s * step, rows - half * side,
                               reinterpret_cast<__m512i *>(a_tiles + half * tile_bytes + s * 2 * tile_bytes));
        }
        written(a_tiles);
        return o;
    }

    void run_part(int part, char *a_tiles) const {
        const int64_t pitch = ceil_div(n1 - n0, step) * step, height = ceil_div(m1 - m0, step) * step;
        float *part_sums = sums + part * height * pitch;
        alignas(64) float block[step * step];
        int64_t configured = 0;
        for (int64_t m = m0; m < m1; m += step) {
            const int64_t rows = at_most(m1 - m, step);
            if (rows != configured) {
                configured = rows;
                configure(static_cast<int>(at_most(rows, side)), static_cast<int>(rows - side));
            }
            C *c = p.c + part * p.c_part + m * p.c_row;
            Operands o = operands(p.a + part * p.a_part, m, rows, a_tiles);
            const int64_t panels = ceil_div(n1 - n0, step), lines_a_step = ceil_div(step, panels);
            for (int64_t n = n0; n < n1; n += step) {
                if (p.a_k == 1 && rows == step) {  // the next rows of A, a share of them at each panel
                    o.next = o.a[0] + step * o.a_row + (n - n0) / step * o.steps * lines_a_step * 64;
                    o.next_lines = lines_a_step;
                }
                const bool lower = rows > side, right = n1 - n > side;
                float *kept = part_sums + (m - m0) * pitch + (n - n0);
                o.b = b_panels + (n - n0) / step * panel_bytes();
                if (first) {
                    zero_sums();
                } else {
                    load_sums(kept, lower, right, pitch);
                }
                multiply_block(o, lower, right, 2 * tile_bytes);
                if (!last) {
                    store_sums(kept, lower, right, pitch);
                    continue;
                }
                store_sums(block, lower, right, step);
                if (p.accumulate && p.c_col == 1)  // the next block of C
                    for (int64_t i = 0; i < rows; ++i)
                        prefetch_lines(c + i * p.c_row + n + step, static_cast<int64_t>(step * sizeof(C)) / 64);
                put_block(block, c + n * p.c_col, p, rows, at_most(n1 - n, step));
            }
        }
    }
};

}  // namespace

template <class C>
void multiply_tiles(const Product<bf16, C> &p, const Block &block) {
    const int64_t passes = p.k > 0 ? ceil_div(p.k, max_k) : 1;
    const int64_t steps = ceil_div(at_most(p.k, max_k), step);
    const int64_t panel_bytes = bytes_of_panel(steps);
    const int64_t panels = pack_bytes / panel_bytes > 1 ? pack_bytes / panel_bytes : 1;
    const int64_t wide = panels * step;
    char *b_panels = static_cast<char *>(scratch(b_slot, panels * panel_bytes));
    char *a_tiles = static_cast<char *>(scratch(a_slot, panel_bytes));
    const int64_t height = ceil_div(block.m1 - block.m0, step) * step;
    for (int64_t n0 = block.n0; n0 < block.n1; n0 += wide) {
        const int64_t n1 = at_most(n0 + wide, block.n1);
        float *sums = nullptr;
        if (passes > 1)
            sums = static_cast<float *>(scratch(sum_slot, p.parts * height * ceil_div(n1 - n0, step) * step * 4));
        for (int64_t i = 0; i < passes; ++i) {
            const int64_t k0 = i * max_k;
            const Pass<C> pass{p, block.m0, block.m1, n0, n1, k0, at_most(p.k - k0, max_k), i == 0, i == passes - 1,
                               sums, b_panels};
            for (int part = 0; part < p.parts; ++part) {
                if (part == 0 || p.b_part) pass.pack_b(part);
                pass.run_part(part, a_tiles);
            }
        }
    }
    _tile_release();
    if (p.stream) stream_fence();
}

template void multiply_tiles(const Product<bf16, bf16> &, const Block &);
template void multiply_tiles(const Product<bf16, float> &, const Block &);

}  // namespace moesaic::MOESAIC_ISA
#endif
