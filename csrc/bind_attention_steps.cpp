// Steps of attention: what each head multiplies for itself, queries that meet what is cached, and rows that are cached
// for another section.
#include "bind_program.h"
#include "scratch.h"

namespace moesaic {
namespace {

constexpr int heads_in_slot = 28, heads_out_slot = 29, offsets_slot = 30;

// Groups, key and value size, whether values are the keys' beginnings, and whether another section takes these rows:
// CacheShape in Python.
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, bool>;

PagedCache cache_of(const ShapeTuple &shape) {
    const auto &[groups, key_dim, value_dim, shared, taken] = shape;
    return {nullptr, nullptr, CacheFormat::fp32, 0, groups, key_dim, value_dim, shared, taken};
}

void hold_in(PagedCache &cache, const std::string &format) {
    if (format != "fp32" && format != "bf16" && format != "int8")
        refuse("format", "is " + format + "; it must be fp32, bf16 or int8");
    if (format == "fp32") cache.format = CacheFormat::fp32;
    else cache.format = format == "bf16" || cache.taken ? CacheFormat::bf16 : CacheFormat::int8;
}

// Program::set_caches hands over the memory of the cache of this number, of which the shape is known from now on.
void add_cache(Program &program, int64_t number, const PagedCache &shape) {
    program.caches().resize(std::max(program.caches().size(), static_cast<size_t>(number) + 1));
    program.caches()[static_cast<size_t>(number)] = shape;
}

PagedTokens tokens_of(const Batch &batch) {
    return {batch.tokens, batch.positions, batch.text_of, batch.tables, batch.table_width};
}

// Each head's matrix times `inputs` floats of each row, every `stride` of them; results every `step` floats.
void per_head(Program &program, const Label &label, Place from, int64_t stride, Place to, int64_t step,
              const Packed &packed) {
    const int64_t heads = packed.count, inputs = packed.shape.inputs, outputs = packed.shape.outputs;
    check_place("source", program, from, (heads - 1) * stride + inputs);
    check_place("target", program, to, (heads - 1) * step + outputs);
    program.add_step({label.part, label.layer, to.buffer, to.offset, outputs, [=](const Batch &batch, Program &p) {
        const int64_t tokens = batch.tokens;
        auto *x = static_cast<float *>(scratch(heads_in_slot, heads * tokens * inputs * 4));
        auto *y = static_cast<float *>(scratch(heads_out_slot, heads * tokens * outputs * 4));
        auto *offsets = static_cast<int64_t *>(scratch(offsets_slot, (heads + 1) * 8));
        const RowsOf source = p.rows(from.buffer, from.offset), target = p.rows(to.buffer, to.offset);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t)
                std::memcpy(x + (h * tokens + t) * inputs, source.row(t) + h * stride, static_cast<size_t>(inputs) * 4);
        for (int64_t h = 0; h <= heads; ++h) offsets[h] = h * tokens;
        const PackedLinear linear = {packed.shape, packed.bytes(), nullptr, offsets, heads, y, outputs, false, 1.0f};
        chosen().packed_linear(x, inputs, heads * tokens, linear, p.threads());
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t)
                std::memcpy(target.row(t) + h * step, y + (h * tokens + t) * outputs, static_cast<size_t>(outputs) * 4);
    }});
}

void copy_heads(Program &program, const Label &label, Place from, int64_t stride, Place to, int64_t step, int64_t heads,
                int64_t size) {
    check_place("source", program, from, (heads - 1) * stride + size);
    check_place("target", program, to, (heads - 1) * step + size);
    program.add_step({label.part, label.layer, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        const RowsOf source = p.rows(from.buffer, from.offset), target = p.rows(to.buffer, to.offset);
        for (int64_t t = 0; t < batch.tokens; ++t)
            for (int64_t h = 0; h < heads; ++h)
                std::memcpy(target.row(t) + h * step, source.row(t) + h * stride, static_cast<size_t>(size) * 4);
    }});
}

// What the batch's tokens bring goes into the cache; then their queries meet all that they see of it.
void attend(Program &program, const Label &label, Place queries, Place keys, Place values, Place to, int64_t number,
            const ShapeTuple &cache_shape, int64_t heads, int64_t window, int64_t chunk, float scale,
            const std::optional<Array> &sinks) {
    const PagedCache shape = cache_of(cache_shape);
    check_place("queries", program, queries, heads * shape.key_dim);
    check_place("keys", program, keys, shape.num_groups * shape.key_dim);
    check_place("values", program, values, shape.num_groups * shape.value_dim);
    check_place("target", program, to, heads * shape.value_dim);
    check_floats("sinks", sinks, heads);
    program.add_step({label.part, label.layer, to.buffer, to.offset, heads * shape.value_dim,
                      [=](const Batch &batch, Program &p) {
        const PagedCache &cache = p.caches().at(static_cast<size_t>(number));
        const PagedTokens tokens = tokens_of(batch);
        const PagedSight sight = {heads, window, chunk, scale, floats_or_null(sinks)};
        const RowsOf q = p.rows(queries.buffer, queries.offset), out = p.rows(to.buffer, to.offset);
        const RowsOf k = p.rows(keys.buffer, keys.offset), v = p.rows(values.buffer, values.offset);
        chosen().write_cache(cache, tokens, k.data, k.stride, shape.shared ? nullptr : v.data, v.stride, p.threads());
        chosen().paged_attention(cache, tokens, sight, q.data, q.stride, out.data, out.stride, p.threads());
    }});
    add_cache(program, number, shape);
}

// A row's first numbers go into a cache that is made as one of shared latents.
void keep(Program &program, const Label &label, Place from, int64_t number, const ShapeTuple &cache_shape) {
    const PagedCache shape = cache_of(cache_shape);
    if (!shape.shared || !shape.taken || shape.num_groups != 1) refuse("shape", "is not one row to take for each token");
    check_place("source", program, from, shape.key_dim);
    program.add_step({label.part, label.layer, -1, 0, 0, [=](const Batch &batch, Program &p) {
        const PagedCache &cache = p.caches().at(static_cast<size_t>(number));
        const RowsOf rows = p.rows(from.buffer, from.offset);
        chosen().write_cache(cache, tokens_of(batch), rows.data, rows.stride, nullptr, 0, p.threads());
    }});
    add_cache(program, number, shape);
}

template <class T>
void take_rows(const PagedCache &cache, const Batch &batch, const RowsOf &to, float multiplier) {
    for (int64_t t = 0; t < batch.tokens; ++t) {
        const int64_t position = batch.positions[t], place = position % block_tokens;
        const int64_t block = batch.tables[batch.text_of[t] * batch.table_width + position / block_tokens];
        const T *row = reinterpret_cast<const T *>(cache.key_tile(block, 0)) + place * cache.value_pitch();
        for (int64_t i = 0; i < cache.key_dim; ++i) to.row(t)[i] = widened(row[i]) * multiplier;
    }
}

// What `keep` kept of the same places, times a multiplier.
void take(Program &program, const Label &label, int64_t number, Place to, float multiplier) {
    const auto caches = static_cast<int64_t>(program.caches().size());
    if (number < 0 || number >= caches || !program.caches()[static_cast<size_t>(number)].taken)
        refuse("cache", "is kept by no step");
    const int64_t size = program.caches()[static_cast<size_t>(number)].key_dim;
    check_place("target", program, to, size);
    program.add_step({label.part, label.layer, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        const PagedCache &cache = p.caches().at(static_cast<size_t>(number));
        const RowsOf rows = p.rows(to.buffer, to.offset);
        if (cache.format == CacheFormat::bf16) take_rows<bf16>(cache, batch, rows, multiplier);
        else take_rows<float>(cache, batch, rows, multiplier);
    }});
}

// (bytes of keys, bytes of values) of one block.
std::tuple<int64_t, int64_t> block_bytes(const ShapeTuple &shape, const std::string &format) {
    PagedCache cache = cache_of(shape);
    hold_in(cache, format);
    return {cache.key_block_bytes(), cache.value_block_bytes()};
}

void set_caches(Program &program, const std::vector<std::tuple<Array, Array>> &layers, const std::string &format) {
    if (layers.size() != program.caches().size()) refuse("layers", "are not as many as there are caches");
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto &[keys, values] = layers[i];
        PagedCache &cache = program.caches()[i];
        hold_in(cache, format);
        cache.num_blocks = size(keys, 0);
        check("keys", keys, {Kind::u8}, {cache.num_blocks, cache.key_block_bytes()});
        check("values", values, {Kind::u8}, {cache.num_blocks, cache.value_block_bytes()});
        cache.keys = keys.data();
        cache.values = cache.shared ? nullptr : values.data();
    }
}

}  // namespace

void bind_attention_steps(nb::class_<Program> &program) {
    program
        .def("per_head", &per_head, nb::arg("label"), nb::arg("source"), nb::arg("stride"), nb::arg("target"),
             nb::arg("step"), nb::arg("packed"))
        .def("copy_heads", &copy_heads, nb::arg("label"), nb::arg("source"), nb::arg("stride"), nb::arg("target"),
             nb::arg("step"), nb::arg("heads"), nb::arg("size"))
        .def("attend", &attend, nb::arg("label"), nb::arg("queries"), nb::arg("keys"), nb::arg("values"),
             nb::arg("target"), nb::arg("cache"), nb::arg("shape"), nb::arg("heads"), nb::arg("window"),
             nb::arg("chunk"), nb::arg("scale"), nb::arg("sinks").none())
        .def("keep", &keep, nb::arg("label"), nb::arg("source"), nb::arg("cache"), nb::arg("shape"))
        .def("take", &take, nb::arg("label"), nb::arg("cache"), nb::arg("target"), nb::arg("multiplier"))
        .def("set_caches", &set_caches, nb::arg("layers"), nb::arg("format"),
             "Keys and values, uint8 [blocks, bytes of one], of every cache. They stay the caller's.")
        .def_static("cache_block_bytes", &block_bytes, nb::arg("shape"), nb::arg("format"));
    program.attr("block_tokens") = block_tokens;
}

}  // namespace moesaic
