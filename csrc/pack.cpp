// From matrices as files hold them to packed strips, each row read once. Strips are independent of each other.
#include "pack.h"

#include "parallel.h"
#include "round_uneven.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 1 << 16;   // bytes below which waking a second thread costs more than it saves
constexpr int64_t most_inputs = 128;  // of a block
constexpr int64_t unit_bytes = 4 * strip_outputs;

struct Strip {
    const PackedShape &shape;
    Element element;
    StripRows values, scales;
    uint8_t *out;
};

void pack_f32(const Strip &strip) {
    if (strip.element == Element::f32) return turn(strip.values, 0, strip.shape.inputs, strip.out);
    constexpr int64_t step = 2 * square;
    Columns x[step];
    for (int64_t start = 0; start < strip.shape.inputs; start += step) {
        const int64_t left = strip.shape.inputs - start;
        columns(strip.element, strip.values, start, step, x);
        std::memcpy(strip.out + start * unit_bytes, x, static_cast<size_t>((left < step ? left : step) * unit_bytes));
    }
}

// Two inputs of each output, rounded to bf16.
void put_pairs(const float *even, const float *odd, uint8_t *out) {
    bf16 first[strip_outputs], second[strip_outputs], pairs[2 * strip_outputs];
    for (int64_t o = 0; o < strip_outputs; o += Vec::lanes) {
        store_exactly(first + o, load(even + o));
        store_exactly(second + o, load(odd + o));
    }
    for (int o = 0; o < strip_outputs; ++o) {
        pairs[2 * o] = first[o];
        pairs[2 * o + 1] = second[o];
    }
    std::memcpy(out, pairs, sizeof pairs);
}

void pack_b16(const Strip &strip) {
    const int64_t units = strip.shape.blocks();
    if (strip.element == Element::b16) return turn(strip.values, 0, units, strip.out);
    Columns x[2 * square];
    for (int64_t start = 0; start < units; start += square) {
        columns(strip.element, strip.values, 2 * start, 2 * square, x);
        for (int64_t unit = start; unit < units && unit < start + square; ++unit) {
            const Columns *both = x + 2 * (unit - start);
            put_pairs(both[0], both[1], strip.out + unit * unit_bytes);
        }
    }
}

// Four numbers of a byte for each output.
void put_quads(const int32_t (&numbers)[8][strip_outputs], int first, uint8_t *out) {
    uint32_t words[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(numbers[first + i][o]) << 8 * i;
        words[o] = word;
    }
    std::memcpy(out, words, sizeof words);
}

// The lower four bits of eight numbers for each output.
void put_halves(const int32_t (&numbers)[8][strip_outputs], uint8_t *out) {
    uint32_t words[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i)
            word |= static_cast<uint32_t>((numbers[i][o] & 15) | (numbers[i + 4][o] & 15) << 4) << 8 * i;
        words[o] = word;
    }
    std::memcpy(out, words, sizeof words);
}

// The upper two bits of eight numbers of six, in the quarters `quarter` and the next of each byte; the first quarter
// begins the bytes.
void put_upper(const int32_t (&numbers)[8][strip_outputs], int64_t quarter, uint8_t *out) {
    uint32_t words[strip_outputs] = {};
    if (quarter) std::memcpy(words, out, sizeof words);
    for (int o = 0; o < strip_outputs; ++o)
        for (int i = 0; i < 8; ++i)
            words[o] |= static_cast<uint32_t>(numbers[i][o] >> 4) << (8 * (i % 4) + 2 * (quarter + i / 4));
    std::memcpy(out, words, sizeof words);
}

void round_block(const Strip &strip, int64_t start, uint8_t *out) {
    const Format format = strip.shape.format;
    const int bits = format == Format::int8 ? 8 : format == Format::int6 ? 6 : 4;
    const int64_t group = strip.shape.group;
    Columns x[most_inputs];
    Scales scales;
    columns(strip.element, strip.values, start, group, x);
    find_scales(x, group, bits, scales);
    uint16_t halves[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o) halves[o] = half_of(scales.scale[o]);
    for (int o = 0; o < strip_outputs; ++o)
        if (!strip.values.row[o]) halves[o] = 0;  // 0 over the lowest would leave a sign
    std::memcpy(out, halves, sizeof halves);
    out += sizeof halves;
    for (int64_t i = 0; i < group; i += 8) {
        int32_t numbers[8][strip_outputs];
        for (int part = 0; part < 8; ++part)
            whole_numbers(x[i + part], scales, range_of(bits), 1 << (bits - 1), numbers[part]);
        if (format == Format::int8) {
            put_quads(numbers, 0, out + i / 4 * unit_bytes);
            put_quads(numbers, 4, out + (i / 4 + 1) * unit_bytes);
            continue;
        }
        put_halves(numbers, out + i / 8 * unit_bytes);
        if (format == Format::int6) put_upper(numbers, i % 16 / 4, out + (group / 8 + i / 16) * unit_bytes);
    }
}

void round_uneven_block(const Strip &strip, int64_t start, uint8_t *out) {
    Columns x[uneven_block];
    uint16_t words[strip_outputs];
    int32_t codes[uneven_block][strip_outputs];
    columns(strip.element, strip.values, start, uneven_block, x);
    round_uneven(x, words, codes);
    for (int o = 0; o < strip_outputs; ++o)
        if (!strip.values.row[o]) words[o] = 0;
    std::memcpy(out, words, sizeof words);
    out += sizeof words;
    for (int64_t i = 0; i < uneven_block; i += 8) {
        int32_t eight[8][strip_outputs];
        std::memcpy(eight, codes + i, sizeof eight);
        put_halves(eight, out + i / 8 * unit_bytes);
    }
}

using Word = uint32_t[strip_outputs];  // four numbers of each output

// Two words of numbers in the low halves of their bytes, as one; `flip` is what each byte is xored with.
void put_both(const Word *pair, uint32_t flip, uint8_t *out) {
    uint32_t words[strip_outputs];
    for (int o = 0; o < strip_outputs; ++o)
        words[o] = ((pair[0][o] & 0x0f0f0f0fu) ^ flip) | ((pair[1][o] & 0x0f0f0f0fu) ^ flip) << 4;
    std::memcpy(out, words, sizeof words);
}

// The upper two bits of four words of numbers of six bits, 32 added.
void put_quarters(const Word *four, uint8_t *out) {
    uint32_t words[strip_outputs] = {};
    for (int o = 0; o < strip_outputs; ++o)
        for (int j = 0; j < 4; ++j) words[o] |= ((four[j][o] >> 4 & 0x03030303u) ^ 0x02020202u) << 2 * j;
    std::memcpy(out, words, sizeof words);
}

// The column of scales at `index` of their rows, zeros past their ends; T of what a scale is kept in.
template <class T>
void scales_at(const Strip &strip, int64_t index, T *out) {
    for (int o = 0; o < strip_outputs; ++o) {
        out[o] = T{};
        if (strip.scales.row[o] && (index + 1) * static_cast<int64_t>(sizeof(T)) <= strip.scales.bytes)
            std::memcpy(out + o, strip.scales.row[o] + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    }
}

void pack_ints(const Strip &strip, int64_t block, uint8_t *out) {
    const int64_t group = strip.shape.group;
    Word words[most_inputs / 4];
    turn(strip.values, block * group, group / 4, words);
    uint16_t halves[strip_outputs];
    scales_at(strip, block, halves);
    std::memcpy(out, halves, sizeof halves);
    out += sizeof halves;
    if (strip.shape.format == Format::int4) {  // a negative number plus 8 is its low half with the upper bit flipped
        for (int64_t j = 0; j < group / 8; ++j) put_both(words + 2 * j, 0x08080808u, out + j * unit_bytes);
        return;
    }
    if (strip.shape.format == Format::int6) {
        for (int64_t j = 0; j < group / 8; ++j) put_both(words + 2 * j, 0, out + j * unit_bytes);
        for (int64_t j = 0; j < group / 16; ++j) put_quarters(words + 4 * j, out + (group / 8 + j) * unit_bytes);
        return;
    }
    for (int64_t j = 0; j < group / 4; ++j)
        for (int o = 0; o < strip_outputs; ++o) words[j][o] ^= 0x80808080u;
    std::memcpy(out, words, static_cast<size_t>(group / 4 * unit_bytes));
}

void pack_mxfp4(const Strip &strip, int64_t block, uint8_t *out) {
    Word words[square];
    turn(strip.values, block * 64, square, words);
    scales_at(strip, 2 * block, out);
    scales_at(strip, 2 * block + 1, out + strip_outputs);
    for (int64_t j = 0; j < square / 2; ++j) put_both(words + 2 * j, 0, out + 64 + j * unit_bytes);
}

void pack_uneven4(const Strip &strip, int64_t block, uint8_t *out) {
    Word words[square / 2];
    turn(strip.values, block * uneven_block, square / 2, words);
    uint16_t scales[strip_outputs];
    scales_at(strip, block, scales);
    std::memcpy(out, scales, sizeof scales);
    for (int64_t j = 0; j < square / 4; ++j) put_both(words + 2 * j, 0, out + 64 + j * unit_bytes);
}

void pack_fp8(const Strip &strip, int64_t block, uint8_t *out) {
    constexpr int64_t quads = most_inputs / 4, pair_bytes = 2 * strip_outputs;
    Word words[quads], none = {};
    turn(strip.values, block * most_inputs, quads, words);
    float scales[strip_outputs];
    scales_at(strip, block, scales);
    for (int64_t j = 0; j < quads; ++j)  // a magnitude of 0x7f, which alone reaches the upper bit, is no number
        for (int o = 0; o < strip_outputs; ++o) none[o] |= ((words[j][o] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
    for (int o = 0; o < strip_outputs; ++o)
        if (none[o]) scales[o] = float_of(0x7fc00000u);
    std::memcpy(out, scales, sizeof scales);
    out += sizeof scales;
    for (int64_t j = 0; j < 2 * quads; ++j, out += pair_bytes)
        for (int o = 0; o < strip_outputs; ++o) {
            const uint32_t two = words[j / 2][o] >> j % 2 * 16;
            const uint16_t pair = static_cast<uint16_t>((two & 0x0f0f) << 4 | (two >> 4 & 0x0f0f));
            std::memcpy(out + o % 16 / 4 * 16 + o / 16 * 8 + o % 4 * 2, &pair, 2);
        }
}

void pack_block(const Strip &strip, int64_t block, uint8_t *out) {
    switch (strip.shape.format) {
        case Format::fp8: return pack_fp8(strip, block, out);
        case Format::mxfp4: return pack_mxfp4(strip, block, out);
        case Format::uneven4:
            if (strip.element == Element::codes) return pack_uneven4(strip, block, out);
            return round_uneven_block(strip, block * uneven_block, out);
        default: break;
    }
    if (strip.element == Element::ints) pack_ints(strip, block, out);
    else round_block(strip, block * strip.shape.group, out);
}

void pack_strip(const Strip &strip) {
    if (strip.shape.format == Format::f32) return pack_f32(strip);
    if (strip.shape.format == Format::b16) return pack_b16(strip);
    for (int64_t block = 0; block < strip.shape.blocks(); ++block)
        pack_block(strip, block, strip.out + block * strip.shape.block_bytes());
}

}  // namespace

void pack(const PackSource &source, const PackedShape &shape, int64_t matrices, uint8_t *out, int threads) {
    const int64_t strips = shape.strips();
    parallel_for(matrices * strips, 1, threads_for(matrices * shape.bytes(), grain, threads), [&](int64_t item) {
        const int64_t matrix = item / strips, strip = item % strips;
        StripRows scales{};
        if (source.scales.blocks) scales = strip_rows(source.scales, shape, matrix, strip);
        pack_strip({shape, source.element, strip_rows(source.values, shape, matrix, strip), scales,
                    out + item * shape.strip_bytes()});
    });
}

}  // namespace moesaic::MOESAIC_ISA
