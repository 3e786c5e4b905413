#include "packed_tiles.h"

#if defined(MOESAIC_HAS_TILES)
namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t side = 16;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler does not see how much of memory the unit's instructions read: what was stored there must be kept.
inline void written(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Scaled sums of a group added to the totals of M rows.
template <int M>
inline void add_scaled_tile(const int32_t *tile, __m512 scales, const float *row_scales, __m512 (&total)[M]) {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r)
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(tile + r * side)),
                                   _mm512_mul_ps(scales, _mm512_set1_ps(row_scales[r])), total[r]);
}

// Groups of up to M rows and 16 outputs. left: fewer than 16 rows; what is computed past them is never read.
template <int64_t group, int M, bool left>
void tile_of_ints(const uint8_t *wide, int64_t groups, const int8_t *x, int64_t stride, const float *row_scales,
                  int64_t groups_apart, bool begin, float *sums) {
    constexpr int64_t deep = group < 64 ? group : 64, group_bytes = (4 + group) * strip_outputs;
    alignas(64) int32_t tiles[2][side * side];
    __m512 total[M];
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) total[r] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * strip_outputs);
    for (int64_t g = 0; g < groups; ++g, wide += group_bytes, x += group, row_scales += groups_apart) {
        const uint8_t *w = wide + 4 * strip_outputs;
        int32_t *tile = tiles[g % 2];
        if constexpr (left) {
            _tile_zero(4);
            for (int64_t k = 0; k < group; k += deep) {
                _tile_loadd(6, x + k, stride);
                _tile_loadd(3, w + k * strip_outputs, 4 * strip_outputs);
                _tile_dpbssd(4, 6, 3);
            }
            _tile_stored(4, tile, 64);
        } else {
            _tile_zero(0);
            for (int64_t k = 0; k < group; k += deep) {
                _tile_loadd(2, x + k, stride);
                _tile_loadd(3, w + k * strip_outputs, 4 * strip_outputs);
                _tile_dpbssd(0, 2, 3);
            }
            _tile_stored(0, tile, 64);
        }
        add_scaled_tile<M>(tile, _mm512_loadu_ps(wide), row_scales, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) _mm512_storeu_ps(sums + r * strip_outputs, total[r]);
}

}  // namespace

TilesLent::TilesLent(int64_t rows, int64_t a_bytes) {
    TileConfig config;
    const uint8_t left = static_cast<uint8_t>(rows % side ? rows % side : side);
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = i < 3 ? side : i == 3 || i == 7 ? static_cast<uint8_t>(a_bytes / 4) : left;
    }
    config.row_bytes[2] = config.row_bytes[6] = static_cast<uint16_t>(a_bytes);
    written(&config);
    _tile_loadconfig(&config);
}

TilesLent::~TilesLent() { _tile_release(); }

template <int64_t group>
void tiles_of_ints(const uint8_t *wide, int64_t g0, int64_t g1, const PackedShape &shape, const PackedRows &rows,
                   float *sums) {
    const int64_t stride = shape.row_stride(), apart = rows.groups_apart;
    for (int64_t row = 0; row < rows.rows; row += side) {
        const int8_t *x = static_cast<const int8_t *>(rows.values) + row * stride + g0 * group;
        const float *scales = rows.scales + g0 * apart + row;
        for (int64_t half = 0; half < 2; ++half) {
            const uint8_t *w = wide + half * 64;
            float *to = sums + row * strip_outputs + half * side;
            const auto tile = [&](auto one) { one(w, g1 - g0, x, stride, scales, apart, g0 == 0, to); };
            if (rows.rows - row >= side) tile(tile_of_ints<group, 16, false>);
            else if (rows.rows - row > 12) tile(tile_of_ints<group, 16, true>);
            else if (rows.rows - row > 8) tile(tile_of_ints<group, 12, true>);
            else tile(tile_of_ints<group, 8, true>);
        }
    }
}

template void tiles_of_ints<32>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &, float *);
template void tiles_of_ints<64>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &, float *);
template void tiles_of_ints<128>(const uint8_t *, int64_t, int64_t, const PackedShape &, const PackedRows &, float *);

void tiles_of_bf16(const uint8_t *strip, const PackedShape &shape, const PackedRows &rows, float *sums) {
    constexpr int64_t step = 32, piece = 16 * step;  // inputs; the weights of a piece stay in the first cache
    const TilesLent tiles(rows.rows, 64);
    const int64_t stride = shape.row_stride(), whole = shape.inputs / step * step;
    alignas(64) uint8_t tail[step * 2 * strip_outputs] = {};
    const int64_t tail_bytes = shape.strip_bytes() - whole * 2 * strip_outputs;
    std::memcpy(tail, strip + whole * 2 * strip_outputs, static_cast<size_t>(tail_bytes));
    written(tail);
    for (int64_t begin = 0; begin < stride; begin += piece) {
        const int64_t end = begin + piece < stride ? begin + piece : stride;
        for (int64_t row = 0; row < rows.rows; row += side) {
            const bf16 *x = static_cast<const bf16 *>(rows.values) + row * stride;
            float *to = sums + row * strip_outputs;
            const auto weights = [&](int64_t k) { return k < whole ? strip + k * 2 * strip_outputs : tail; };
            if (rows.rows - row >= side) {
                if (begin) {
                    _tile_loadd(0, to, 128);
                    _tile_loadd(1, to + side, 128);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                }
                for (int64_t k = begin; k < end; k += step) {
                    _tile_loadd(2, x + k, stride * 2);
                    _tile_loadd(3, weights(k), 128);
                    _tile_dpbf16ps(0, 2, 3);
                    _tile_loadd(7, weights(k) + 64, 128);
                    _tile_dpbf16ps(1, 2, 7);
                }
                _tile_stored(0, to, 128);
                _tile_stored(1, to + side, 128);
            } else {
                if (begin) {
                    _tile_loadd(4, to, 128);
                    _tile_loadd(5, to + side, 128);
                } else {
                    _tile_zero(4);
                    _tile_zero(5);
                }
                for (int64_t k = begin; k < end; k += step) {
                    _tile_loadd(6, x + k, stride * 2);
                    _tile_loadd(3, weights(k), 128);
                    _tile_dpbf16ps(4, 6, 3);
                    _tile_loadd(7, weights(k) + 64, 128);
                    _tile_dpbf16ps(5, 6, 7);
                }
                _tile_stored(4, to, 128);
                _tile_stored(5, to + side, 128);
            }
        }
    }
}

}  // namespace moesaic::MOESAIC_ISA
#endif
