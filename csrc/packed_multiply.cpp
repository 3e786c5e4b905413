// A strip of packed weights times rows, on vectors. Many rows take it in pieces that stay in the first cache, where
// numbers of few bits are made bytes once for all of them.
#include "packed_multiply.h"

#include <type_traits>
#include <utility>

#include "packed_numbers.h"
#include "packed_tiles.h"
#include "tiles_of_rows.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// f(0), f(1), ... with numbers that the compiler knows.
template <class F, int64_t... numbers>
MOESAIC_INLINE void for_each_of(std::integer_sequence<int64_t, numbers...>, const F &f) {
    (f(std::integral_constant<int64_t, numbers>()), ...);
}

constexpr int64_t piece_bytes = 8 << 10;  // beside what it is made of, the next piece and the rows that it meets

// Four inputs of a row, the `quad`th of those taken together: the first of those that are summed in halves begins these,
// the last has them added to the sums.
template <class G, int64_t quad>
MOESAIC_INLINE void dot_quad(Ints &sums, Ints &halves, const Bytes &four, const int8_t *x) {
    constexpr int64_t together = dots_in_halves(G::format);
    x += 4 * quad;
    if constexpr (together == 1) add_dot<G::is_signed>(sums, four, x);
    else if constexpr (quad % together == 0) begin_halves(halves, four, x);
    else add_halves(halves, four, x);
    if constexpr (together > 1 && quad % together == together - 1) add_widened(sums, halves);
}

// Quads that are taken together: all of a group of 16 inputs.
template <class G>
constexpr int64_t quads_together = G::size < 32 ? G::size / 4 : 8;

// So many quads from the first on, which is a multiple of them; two at a time, so that halves of two need no register
// for each row.
template <int R, class G>
MOESAIC_INLINE void dot_quads(Ints (&sums)[R], const uint8_t *w, int64_t first, const int8_t *x, int64_t stride) {
    Ints halves[R];
    x += 4 * first;
    for_each_of(std::make_integer_sequence<int64_t, quads_together<G> / 2>(), [&](auto pair) {
        constexpr int64_t place = decltype(pair)::value;
        Bytes even, odd;
        if constexpr (G::eight_bits) {
            even = bytes(w + (first + 2 * place) * 4 * strip_outputs);
            odd = bytes(w + (first + 2 * place + 1) * 4 * strip_outputs);
        } else {
            G::template quads<place % 2 == 1>(w, first / 2 + place, even, odd);
        }
        for (int r = 0; r < R; ++r) {
            dot_quad<G, 2 * place>(sums[r], halves[r], even, x + r * stride);
            dot_quad<G, 2 * place + 1>(sums[r], halves[r], odd, x + r * stride);
        }
    });
}

template <int R, class G>
MOESAIC_INLINE void dot_group(Ints (&sums)[R], const uint8_t *w, const int8_t *x, int64_t stride) {
    for (int64_t first = 0; first < G::size / 4; first += quads_together<G>)
        dot_quads<R, G>(sums, w, first, x, stride);
}

// Rows up to which what takes two passes over a strip (AVX2) takes both group by group, so that weights stream: sums of
// both fit the registers. Of bytes that lie in the cache a pass is the quicker by itself.
constexpr int64_t most_streamed_rows = pass_outputs == strip_outputs ? row_tile : 2;

// Groups g0 to g1 of R rows, added to their sums, or begun where g0 is 0. `strip` is where group `strip_g0` lies. What
// comes next is asked for with each group, in the first pass.
template <int R, class G>
void add_groups(const uint8_t *strip, int64_t strip_g0, int64_t g0, int64_t g1, const PackedShape &shape,
                const PackedRows &rows, int64_t row, FetchInParts &next, float *sums) {
    constexpr int passes = strip_outputs / pass_outputs;
    constexpr int together = G::in_memory && R <= most_streamed_rows ? passes : 1;
    const int64_t stride = shape.row_stride(), apart = rows.groups_apart;
    const int8_t *x = static_cast<const int8_t *>(rows.values) + row * stride;
    const float *row_scales = rows.scales + row;
    const int32_t *starts = rows.starts + row;
    sums += row * strip_outputs;
    for (int64_t begin = 0; begin < strip_outputs; begin += together * pass_outputs) {
        Floats total[together][R];
        for (int pass = 0; pass < together; ++pass)
            for (int r = 0; r < R; ++r)
                total[pass][r] = g0 ? floats_at(sums + r * strip_outputs + begin + pass * pass_outputs) : zeros();
        for (int64_t g = g0; g < g1; ++g) {
            if constexpr (!G::in_memory) {
                if (begin == 0) next.part();
            } else if (begin == 0 && row == 0) {  // later rows find the strip in the cache
                next.ahead_of(G::bytes_of(g), G::bytes_of(1));
            }
            for (int pass = 0; pass < together; ++pass) {
                const int64_t first = begin + pass * pass_outputs;
                Ints group_sums[R];
                for (int r = 0; r < R; ++r) group_sums[r] = ints(starts[g * apart + r]);
                dot_group<R, G>(group_sums, G::numbers(strip, g - strip_g0) + 4 * first, x + g * G::size, stride);
                const Floats scales = G::scales(strip, g - strip_g0, first);
                for (int r = 0; r < R; ++r)
                    add_scaled(total[pass][r], group_sums[r], scales, row_scales[g * apart + r]);
            }
        }
        for (int pass = 0; pass < together; ++pass)
            for (int r = 0; r < R; ++r) store(sums + r * strip_outputs + begin + pass * pass_outputs, total[pass][r]);
    }
}

// Groups g0 to g1 as bytes with scales as floats; signed: without the offset.
template <class G, bool is_signed>
void widen(const uint8_t *strip, int64_t g0, int64_t g1, uint8_t *to) {
    for (int64_t g = g0; g < g1; ++g, to += G::wide_bytes)
        for (int64_t first = 0; first < strip_outputs; first += pass_outputs) {
            store(reinterpret_cast<float *>(to) + first, G::scales(strip, g, first));
            const uint8_t *w = G::numbers(strip, g) + 4 * first;
            uint8_t *numbers = to + 4 * strip_outputs + 4 * first;
            const auto put_quad = [&](int64_t quad, Bytes x) {
#if defined(MOESAIC_HAS_TILES)
                if constexpr (is_signed) x = less(x, static_cast<int8_t>(offset_of(G::format)));
#endif
                store(numbers + quad * 4 * strip_outputs, x);
            };
            if constexpr (G::eight_bits) {
                for (int64_t quad = 0; quad < G::size / 4; ++quad) put_quad(quad, bytes(w + quad * 4 * strip_outputs));
            } else {
                const auto put_pair = [&](int64_t pair, auto odd) {
                    Bytes first, second;
                    G::template quads<decltype(odd)::value>(w, pair, first, second);
                    put_quad(2 * pair, first);
                    put_quad(2 * pair + 1, second);
                };
                for (int64_t pair = 0; pair < G::size / 8; pair += 2) {
                    put_pair(pair, std::false_type());
                    put_pair(pair + 1, std::true_type());
                }
            }
        }
}

// Rows up to which numbers of few bits are multiplied as they are read, and not made bytes before (measured: what takes
// two passes over a strip takes it apart twice).
constexpr int64_t most_narrow_rows = pass_outputs == strip_outputs ? 2 * row_tile : row_tile;

template <Format F, int64_t group>
void ints_times_rows(const Stream &stream, const PackedShape &shape, const PackedRows &rows, float *sums) {
    using Narrow = Groups<F, group, false>;
    using Wide = Groups<F, group, true>;
    constexpr int64_t most = piece_bytes / Narrow::wide_bytes / Narrow::block_groups * Narrow::block_groups;
    static_assert(most > 0, "a piece has a group at least");
    const uint8_t *strip = stream.strip;
    const int64_t groups = shape.row_groups(), tiles = (rows.rows + row_tile - 1) / row_tile;
    const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
    // Pieces as even as they can be.
    const int64_t blocks = groups / Narrow::block_groups, pieces = (groups + most - 1) / most;
    const int64_t piece = (blocks + pieces - 1) / pieces * Narrow::block_groups;
    const auto next_piece = [&](int64_t g, int64_t parts) {
        return FetchInParts(stream, Narrow::bytes_of(g), Narrow::bytes_of(piece), parts);
    };
#if defined(MOESAIC_HAS_TILES)
    if (rows.rows >= rows_for_tiles(group)) {
        uint8_t *wide = static_cast<uint8_t *>(scratch(wide_slot, piece_bytes));
        const TilesLent lent(group);
        for (int64_t g = 0; g < groups; g += piece) {
            const int64_t end = at_most(g + piece, groups);
            widen<Narrow, true>(strip, g, end, wide);
            tiles_of_ints<group>(wide, g, end, shape, rows, next_piece(end, parts_of_ints(rows.rows)), sums);
        }
        return;
    }
#endif
    if (!Narrow::eight_bits && rows.rows > most_narrow_rows) {
        uint8_t *wide = static_cast<uint8_t *>(scratch(wide_slot, piece_bytes));
        for (int64_t g = 0; g < groups; g += piece) {
            const int64_t end = at_most(g + piece, groups);
            widen<Narrow, false>(strip, g, end, wide);
            FetchInParts next = next_piece(end, tiles * (end - g));
            over_tiles(rows.rows, [&](int64_t row, auto count) {
                add_groups<decltype(count)::value, Wide>(wide, g, g, end, shape, rows, row, next, sums);
            });
        }
        return;
    }
    const int64_t step = rows.rows <= most_streamed_rows ? groups : piece;
    for (int64_t g = 0; g < groups; g += step) {
        const int64_t end = at_most(g + step, groups);
        FetchInParts next = next_piece(end, 1);
        over_tiles(rows.rows, [&](int64_t row, auto count) {
            add_groups<decltype(count)::value, Narrow>(strip, 0, g, end, shape, rows, row, next, sums);
        });
    }
}

template <Format F>
void ints_times_rows(const Stream &stream, const PackedShape &shape, const PackedRows &rows, float *sums) {
    switch (shape.group) {
        case 32: return ints_times_rows<F, 32>(stream, shape, rows, sums);
        case 64: return ints_times_rows<F, 64>(stream, shape, rows, sums);
        default: return ints_times_rows<F, 128>(stream, shape, rows, sums);
    }
}

}  // namespace

void multiply_strip(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums,
                    const uint8_t *after) {
    const Stream stream = {strip, shape.strip_bytes(), after};
    switch (shape.format) {
        case Format::int8: return ints_times_rows<Format::int8>(stream, shape, rows, sums);
        case Format::int6: return ints_times_rows<Format::int6>(stream, shape, rows, sums);
        case Format::int4: return ints_times_rows<Format::int4>(stream, shape, rows, sums);
        case Format::mxfp4: return ints_times_rows<Format::mxfp4, 32>(stream, shape, rows, sums);
        case Format::uneven4: return ints_times_rows<Format::uneven4, uneven_group>(stream, shape, rows, sums);
        default: return multiply_strip_of_floats(strip, shape, rows, sums);
    }
}

}  // namespace moesaic::MOESAIC_ISA
