#include "packed_tiles.h"

#if defined(MOESAIC_HAS_TILES)
#include "packed_multiply.h"
#include "packed_numbers.h"
#include "tile_unit.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t side = 16;

// Lines `apart` bytes apart: what the unit reads of a tile is no stream that the processor would see coming.
inline void prefetch(const void *p, int64_t apart, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(static_cast<const char *>(p) + i * apart, _MM_HINT_T0);
}

// Scaled sums of a group added to the totals of M rows.
template <int M>
inline void add_scaled_tile(const int32_t *tile, __m512 scales, const float *row_scales, __m512 (&total)[M]) {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r)
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(tile + r * side)),
                                   _mm512_mul_ps(scales, _mm512_set1_ps(row_scales[r])), total[r]);
}

// The sums of one group of 16 rows and 16 outputs to memory, by one of two sets of tiles in turn.
template <int64_t group>
inline void sum_group(bool odd, const uint8_t *w, const int8_t *x, int64_t stride, int32_t *to) {
    constexpr int64_t deep = group < 64 ? group : 64;
#define MOESAIC_SUM_GROUP(sums, rows, weights)                          \
    _tile_zero(sums);                                                   \
    for (int64_t k = 0; k < group; k += deep) {                         \
        _tile_loadd(rows, x + k, stride);                               \
        _tile_loadd(weights, w + k * strip_outputs, 4 * strip_outputs); \
        _tile_dpbssd(sums, rows, weights);                              \
    }                                                                   \
    _tile_stored(sums, to, 64)
    if (odd) {
        MOESAIC_SUM_GROUP(1, 5, 7);
    } else {
        MOESAIC_SUM_GROUP(0, 4, 6);
    }
#undef MOESAIC_SUM_GROUP
}

// Groups of up to M rows and 16 outputs. The tile unit is one ahead of the vectors that scale; what it computes past
// the last row is never read.
template <int64_t group, int M>
void tile_of_ints(const uint8_t *wide, int64_t groups, const int8_t *x, int64_t stride, const float *row_scales,
                  int64_t groups_apart, bool begin, float *sums) {
    constexpr int64_t group_bytes = (4 + group) * strip_outputs;
    alignas(64) int32_t tiles[2][side * side];
    __m512 total[M];
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) total[r] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * strip_outputs);
    for (int64_t g = 0; g <= groups; ++g) {
        const uint8_t *record = wide + g * group_bytes;
        if (g < groups) sum_group<group>(g % 2, record + 4 * strip_outputs, x + g * group, stride, tiles[g % 2]);
        if (g == 0) continue;
        add_scaled_tile<M>(tiles[(g - 1) % 2], _mm512_loadu_ps(record - group_bytes),
                           row_scales + (g - 1) * groups_apart, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) _mm512_storeu_ps(sums + r * strip_outputs, total[r]);
}

// 32 inputs of up to 16 rows of bf16 and a strip's outputs, added to both tiles of sums.
inline void add_bf16_step(const uint8_t *w, const bf16 *x, int64_t stride) {
    _tile_loadd(2, x, stride * 2);
    _tile_loadd(3, w, 4 * strip_outputs);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(4, w + 64, 4 * strip_outputs);
    _tile_dpbf16ps(1, 2, 4);
}

inline void store_sums(float *to) {
    _tile_stored(0, to, 4 * strip_outputs);
    _tile_stored(1, to + side, 4 * strip_outputs);
}

}  // namespace

// 0 and 1 are sums, 4 and 5 rows, 6 and 7 weights.
TilesLent::TilesLent(int64_t group) {
    TileConfig config;
    const int64_t deep = group < 64 ? group : 64;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(deep) : 64;
        config.rows[i] = i < 6 ? side : static_cast<uint8_t>(deep / 4);
    }
    written(&config);
    _tile_loadconfig(&config);
}

// 0 and 1 are sums and 2 is rows, as many as there are or whole tiles of them; 3 and 4 are weights.
TilesLent::TilesLent(Rows rows) {
    TileConfig config;
    const uint8_t here = static_cast<uint8_t>(rows.count < side ? rows.count : side);
    for (int i = 0; i < 5; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = i < 3 ? here : side;
    }
    written(&config);
    _tile_loadconfig(&config);
}

TilesLent::~TilesLent() { _tile_release(); }

template <int64_t group>
void tiles_of_ints(const uint8_t *wide, int64_t g0, int64_t g1, const PackedShape &shape, const PackedRows &rows,
                   FetchInParts next, float *sums) {
    const int64_t stride = shape.row_stride(), apart = rows.groups_apart;
    for (int64_t row = 0; row < rows.rows; row += side) {
        const int8_t *x = static_cast<const int8_t *>(rows.values) + row * stride + g0 * group;
        const float *scales = rows.scales + g0 * apart + row;
        for (int64_t half = 0; half < 2; ++half) {
            next.part();
            const uint8_t *w = wide + half * 64;
            float *to = sums + row * strip_outputs + half * side;
            const auto tile = [&](auto one) { one(w, g1 - g0, x, stride, scales, apart, g0 == 0, to); };
            if (rows.rows - row > 12) tile(tile_of_ints<group, 16>);
            else if (rows.rows - row > 8) tile(tile_of_ints<group, 12>);
            else tile(tile_of_ints<group, 8>);
        }
    }
}

template void tiles_of_ints<16>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &,
                                FetchInParts, float *);
template void tiles_of_ints<32>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &,
                                FetchInParts, float *);
template void tiles_of_ints<64>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &,
                                FetchInParts, float *);
template void tiles_of_ints<128>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &,
                                FetchInParts, float *);

void tiles_of_bf16(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    constexpr int64_t step = 32, piece = 8 * step;  // inputs; the weights of a piece stay in the first cache
    constexpr int64_t step_bytes = step * 2 * strip_outputs;
    const TilesLent tiles(TilesLent::Rows{rows.rows});
    const int64_t stride = shape.row_stride(), whole = shape.inputs / step * step;
    alignas(64) uint8_t tail[step_bytes] = {};
    const int64_t tail_bytes = shape.strip_bytes() - whole * 2 * strip_outputs;
    std::memcpy(tail, strip + whole * 2 * strip_outputs, static_cast<size_t>(tail_bytes));
    written(tail);
    const int64_t inputs = shape.row_inputs(), here = rows.rows < side ? rows.rows : side;
    for (int64_t begin = 0; begin < inputs; begin += piece) {
        const int64_t end = begin + piece < inputs ? begin + piece : inputs;
        for (int64_t row = 0; row < rows.rows; row += side) {
            const bf16 *x = static_cast<const bf16 *>(rows.values) + row * stride;
            float *to = sums + row * strip_outputs;
            if (begin) {
                _tile_loadd(0, to, 4 * strip_outputs);
                _tile_loadd(1, to + side, 4 * strip_outputs);
            } else {
                _tile_zero(0);
                _tile_zero(1);
            }
            for (int64_t k = begin; k < end; k += step) {
                const uint8_t *w = k < whole ? strip + k * 2 * strip_outputs : tail;
                if (row == 0) prefetch(w + 2 * step_bytes, 64, step_bytes / 64);
                prefetch(x + k + 2 * step, stride * 2, here);
                add_bf16_step(w, x + k, stride);
            }
            store_sums(to);
        }
    }
}

namespace {

constexpr int64_t block_inputs = 128, block_pairs = block_inputs * 2 * strip_outputs;

// The sums of one block of fp8, made bf16, of up to 16 rows: to memory.
inline void sum_block(const uint8_t *pairs, const bf16 *x, int64_t stride, float *to) {
    constexpr int64_t step = 32;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < block_inputs; k += step) {
        add_bf16_step(pairs + k * 2 * strip_outputs, x + k, stride);
    }
    store_sums(to);
}

inline void add_scaled_block(const float *of_block, const float *scales, int64_t count, bool begin, float *sums) {
    for (int64_t half = 0; half < strip_outputs; half += side) {
        const __m512 scale = _mm512_loadu_ps(scales + half);
        for (int64_t at = half; at < count * strip_outputs; at += strip_outputs) {
            const __m512 total = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + at);
            _mm512_storeu_ps(sums + at, _mm512_fmadd_ps(_mm512_load_ps(of_block + at), scale, total));
        }
    }
}

}  // namespace

void tiles_of_fp8(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    const TilesLent tiles(TilesLent::Rows{rows.rows});
    const int64_t stride = shape.row_stride(), blocks = shape.blocks();
    uint8_t *pairs = static_cast<uint8_t *>(scratch(wide_slot, 2 * block_pairs));
    alignas(64) float of_block[side * strip_outputs];
    bf16_of_block(strip, pairs);
    for (int64_t block = 0; block < blocks; ++block, strip += shape.block_bytes()) {
        const uint8_t *now = pairs + block % 2 * block_pairs;
        written(now);
        for (int64_t row = 0; row < rows.rows; row += side) {
            const bf16 *x = static_cast<const bf16 *>(rows.values) + row * stride + block * block_inputs;
            sum_block(now, x, stride, of_block);
            // While the unit sums, vectors make the next block ready.
            if (row == 0 && block + 1 < blocks)
                bf16_of_block(strip + shape.block_bytes(), pairs + (block + 1) % 2 * block_pairs);
            const int64_t left = rows.rows - row;
            add_scaled_block(of_block, reinterpret_cast<const float *>(strip), left < side ? left : side, block == 0,
                             sums + row * strip_outputs);
        }
    }
}

}  // namespace moesaic::MOESAIC_ISA
#endif
