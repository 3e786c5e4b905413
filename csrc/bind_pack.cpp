// Packing as Python sees it: matrices arrive as a list of arrays [E, rows, I] that stand one below the other.
#include "pack.h"
#include "packed_checks.h"

namespace moesaic {
namespace {

using Arrays = std::vector<Array>;

Kind kind_of_values(const Array &values, Format format) {
    if (format == Format::fp8 || format == Format::mxfp4) return Kind::u8;
    for (Kind kind : {Kind::bf16, Kind::f16})
        if (is(values, kind)) return kind;
    if (format == Format::uneven4 && is(values, Kind::u8)) return Kind::u8;
    return has_groups(format) && is(values, Kind::i8) ? Kind::i8 : Kind::f32;
}

Kind kind_of_scales(Format format) {
    switch (format) {
        case Format::fp8: return Kind::f32;
        case Format::mxfp4: return Kind::u8;
        default: return Kind::f16;
    }
}

Element element_of(Kind kind) {
    switch (kind) {
        case Kind::f32: return Element::f32;
        case Kind::bf16: return Element::b16;
        case Kind::f16: return Element::f16;
        case Kind::i8: return Element::ints;
        default: return Element::codes;
    }
}

// Checks that the arrays are of one kind, for `matrices` matrices of `width` numbers a row; fills `blocks` and returns
// the number of rows.
int64_t check_blocks(const char *name, const Arrays &arrays, Kind kind, int64_t matrices, int64_t width,
                     std::vector<RowBlock> &blocks) {
    int64_t rows = 0;
    for (const Array &array : arrays) {
        check(name, array, {kind}, {matrices, any, width});
        blocks.push_back({data<uint8_t>(array), size(array, 1)});
        rows += size(array, 1);
    }
    return rows;
}

void bound_pack(const Arrays &values, const Arrays &scales, const Array &out, const std::string &format, int64_t group,
                bool paired, int threads) {
    if (values.empty() || values[0].ndim() != 3) refuse("weights", "must be one or more arrays [E, rows, I]");
    const int64_t matrices = size(values[0], 0), inputs = size(values[0], 2);
    const Kind kind = kind_of_values(values[0], check_packed(format, 0, inputs, group, false).format);
    std::vector<RowBlock> value_blocks, scale_blocks;
    const int64_t outputs = check_blocks("weights", values, kind, matrices, inputs, value_blocks);
    const PackedShape shape = check_packed(format, outputs, inputs, group, paired);
    check("out", out, {Kind::u8}, {matrices, shape.bytes()});
    const auto row_bytes = [](const Arrays &arrays) {
        return size(arrays[0], 2) * static_cast<int64_t>(arrays[0].itemsize());
    };
    PackSource source{element_of(kind), {value_blocks.data(), row_bytes(values)}, {}};
    if (kind == Kind::u8 || kind == Kind::i8) {
        if (scales.empty()) refuse("scales", "are missing");
        const bool is_by_block = shape.format == Format::fp8 || shape.format == Format::uneven4;
        const int64_t size_of_group = is_by_block ? shape.block() : shape.row_group();
        const int64_t groups = (inputs + size_of_group - 1) / size_of_group;
        if (check_blocks("scales", scales, kind_of_scales(shape.format), matrices, groups, scale_blocks) != outputs)
            refuse("scales", "have other rows than the weights");
        source.scales = {scale_blocks.data(), row_bytes(scales)};
    }
    nb::gil_scoped_release release;
    chosen().pack(source, shape, matrices, data<uint8_t>(out), threads);
}

}  // namespace

void bind_pack(nb::module_ &m) {
    m.def("pack", &bound_pack, nb::arg("weights"), nb::arg("scales"), nb::arg("out"), nb::arg("format"),
          nb::arg("group"), nb::arg("paired"), nb::arg("threads"));
}

}  // namespace moesaic
