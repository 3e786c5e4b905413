// Packing from every kind of source that files hold, beside the fp32 and the codes that packed.cpp packs.
#include "pack.h"

#include "formats.h"

namespace moesaic {
namespace {

constexpr int64_t outputs = 38, inputs = 201;

// Bytes of any value, or with the bits of `mask` in each two of them.
Bytes bits(int64_t size, uint32_t seed, uint16_t mask = 0xffff) {
    const Floats x = random_floats(size, seed);
    Bytes y(size);
    for (int64_t i = 0; i < size; ++i)
        y[i] = static_cast<uint8_t>(static_cast<int>((x[i] + 1.0f) * 128.0f) & (i % 2 ? mask >> 8 : mask));
    return y;
}

struct Source {
    Element element;
    int64_t value_bytes, scale_bytes, inputs_a_scale;  // scale_bytes: 0 where there are none
    uint16_t mask, scale_mask;
};

// fp16 without the highest exponents: what is packed is finite.
constexpr uint16_t small_fp16 = 0xbfff;

void pack_from(const Source &source, const PackedShape &shape, const Kernels &kernels, int threads, Results &results) {
    const int64_t row_bytes = inputs * source.value_bytes;
    const Bytes values = bits(num_experts * outputs * row_bytes, 1, source.mask);
    const RowBlock rows[2] = {{values.data(), 5}, {values.data() + num_experts * 5 * row_bytes, outputs - 5}};
    const Bytes out(num_experts * shape.bytes());
    if (!source.scale_bytes) {
        kernels.pack({source.element, {rows, row_bytes}, {}}, shape, num_experts, out.data(), threads);
    } else {
        const int64_t groups = (inputs + source.inputs_a_scale - 1) / source.inputs_a_scale;
        const int64_t scale_row = groups * source.scale_bytes;
        const Bytes scales = bits(num_experts * outputs * scale_row, 2, source.scale_mask);
        const RowBlock of[2] = {{scales.data(), 5}, {scales.data() + num_experts * 5 * scale_row, outputs - 5}};
        kernels.pack({source.element, {rows, row_bytes}, {of, scale_row}}, shape, num_experts, out.data(), threads);
    }
    results.add(out);
}

}  // namespace

void check_packing(Suite &suite) {
    suite.begin("packing");
    const auto check = [&](const char *from, const Kind &kind, const Source &source) {
        for (bool paired : {false, true}) {
            const PackedShape shape{kind.format, outputs, inputs, kind.group, paired};
            suite.check("pack " + std::string(kind.name) + " from " + from, exact,
                        [&](const Kernels &kernels, int threads, Results &results) {
                            pack_from(source, shape, kernels, threads, results);
                        });
        }
    };
    for (const Kind &kind : kinds) {
        if (kind.format == Format::fp8 || kind.format == Format::mxfp4) continue;
        check("fp16", kind, {Element::f16, 2, 0, 0, small_fp16, 0});
        check("bf16", kind, {Element::b16, 2, 0, 0, small_fp16, 0});
        if (has_groups(kind.format))
            check("whole numbers", kind, {Element::ints, 1, 2, kind.group, 0xffff, small_fp16});
        if (kind.format == Format::uneven4)
            check("codes", kind, {Element::codes, 1, 2, uneven_block, 0x0f0f, 0xffff});
    }
}

}  // namespace moesaic
