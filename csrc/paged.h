// Keys and values in blocks of 32 tokens, found through tables; and the tokens of a step, which look for theirs there.
//
// Positions 32 j to 32 j + 31 of a sequence lie in the block that entry j of its table names. A block holds of each of
// its groups
//
//   keys      [key_dim][32]        scores of 32 tokens are sums of vectors
//   values    [32][value_pitch]
//
// and where keys and values are one shared latent (arXiv:2405.04434, sec. 2.1.2), of its only group
//
//   keys      [32][value_pitch]    the first value_dim of these numbers are the values, too
//
// Pitches are whole sixteens, zeros at their end. What a block holds of tokens not yet written is never looked at.
//
// Numbers of 8 bits are whole multiples, at most 127, of a scale in bf16, the highest of 32 numbers of a token over 127;
// so a product of both is exact in fp32. Scales follow the numbers of each tile:
//
//   scales    [size / 32, rounded up][32 tokens]
//
// Where one of the 32 numbers is infinite or none, the scale is NaN.
#pragma once

#include <cstdint>

namespace moesaic {

constexpr int64_t block_tokens = 32;
constexpr int64_t scale_numbers = 32;  // of a token, that share a scale

enum class CacheFormat { fp32, bf16, int8 };

struct PagedCache {
    void *keys, *values;  // values: null where shared
    CacheFormat format;
    int64_t num_blocks, num_groups, key_dim, value_dim;
    bool shared;
    bool taken = false;  // rows of another section, for which it takes them again: never of 8 bits

    // Numbers from one token's values to the next one's.
    int64_t value_pitch() const { return ((shared ? key_dim : value_dim) + 15) / 16 * 16; }
    // Numbers that a group has in a block.
    int64_t key_numbers() const { return block_tokens * (shared ? value_pitch() : key_dim); }
    int64_t value_numbers() const { return shared ? 0 : block_tokens * value_pitch(); }
    // The scales among them, where numbers have 8 bits.
    int64_t key_scales() const { return scales_of(key_dim); }
    int64_t value_scales() const { return shared ? 0 : scales_of(value_dim); }

    int64_t key_tile_bytes() const { return tile_bytes(key_numbers(), key_scales()); }
    int64_t value_tile_bytes() const { return tile_bytes(value_numbers(), value_scales()); }
    int64_t key_block_bytes() const { return num_groups * key_tile_bytes(); }
    int64_t value_block_bytes() const { return num_groups * value_tile_bytes(); }

    // What a group has in a block.
    uint8_t *key_tile(int64_t block, int64_t group) const {
        return static_cast<uint8_t *>(keys) + (block * num_groups + group) * key_tile_bytes();
    }
    uint8_t *value_tile(int64_t block, int64_t group) const {
        return static_cast<uint8_t *>(values) + (block * num_groups + group) * value_tile_bytes();
    }

private:
    static int64_t scales_of(int64_t size) { return (size + scale_numbers - 1) / scale_numbers * block_tokens; }
    int64_t tile_bytes(int64_t numbers, int64_t scales) const {
        if (format == CacheFormat::int8) return numbers + 2 * scales;
        return numbers * (format == CacheFormat::bf16 ? 2 : 4);
    }
};

// The tokens of a step in any order; those next to each other in their sequence are quickest when they are so here.
struct PagedTokens {
    int64_t tokens;
    const int64_t *positions;    // [tokens], each in its sequence
    const int32_t *sequence_of;  // [tokens], a row of the tables
    const int32_t *tables;       // [sequences, table_width], ids of blocks
    int64_t table_width;
};

// What a layer's queries see: a token its own position and earlier ones, of these the last `window` (0: all) or those
// of its own `chunk`, so many positions from the first one on (0: all).
struct PagedSight {
    int64_t num_heads;  // as many for each group
    int64_t window, chunk;
    float scale;
    const float *sinks;  // [num_heads], a further logit of each head that stands for no value; or null

    int64_t first_seen(int64_t position) const {
        if (window > 0) return position < window ? 0 : position - window + 1;
        return chunk > 0 ? position / chunk * chunk : 0;
    }
};

}  // namespace moesaic
