// The paged cache as Python sees it: arrays whose shapes are the layout of paged.h, and rows that may lie inside wider
// ones.
#include "array_checks.h"
#include "paged.h"

namespace moesaic {
namespace {

using Optional = std::optional<Array>;

// Numbers of 8 bits, and their scales behind them, come as bytes: [blocks, groups, bytes], or [blocks, bytes] of a
// shared latent.
void check_rounded(PagedCache &cache, const Array &keys, const Optional &values) {
    if (cache.shared) return check("keys", keys, {Kind::u8}, {any, cache.key_tile_bytes()});
    check("keys", keys, {Kind::u8}, {any, any, cache.key_tile_bytes()});
    cache.num_groups = size(keys, 1);
    check("values", *values, {Kind::u8}, {size(keys, 0), cache.num_groups, cache.value_tile_bytes()});
}

void check_floats(PagedCache &cache, const Array &keys, const Optional &values) {
    if (cache.shared) return check("keys", keys, floats, {any, block_tokens, cache.value_pitch()});
    check("keys", keys, floats, {any, any, cache.key_dim, block_tokens});
    cache.num_groups = size(keys, 1);
    check("values", *values, {kind_of(keys)}, {size(keys, 0), cache.num_groups, block_tokens, cache.value_pitch()});
}

PagedCache check_cache(const Array &keys, const Optional &values, int64_t key_dim, int64_t value_dim) {
    const CacheFormat format = is(keys, Kind::u8)     ? CacheFormat::int8
                               : is(keys, Kind::bf16) ? CacheFormat::bf16
                                                      : CacheFormat::fp32;
    PagedCache cache{keys.data(), nullptr, format, 0, 1, key_dim, value_dim, !values.has_value()};
    if (key_dim < 1 || value_dim < 1) refuse("key_dim", "and value_dim must be 1 or more");
    if (cache.shared && value_dim > key_dim)
        refuse("value_dim", "is more than key_dim; shared values are a part of the keys");
    if (format == CacheFormat::int8) check_rounded(cache, keys, values);
    else check_floats(cache, keys, values);
    if (values) cache.values = values->data();
    cache.num_blocks = size(keys, 0);
    return cache;
}

PagedTokens check_tokens(const Array &positions, const Array &sequence_of, const Array &tables) {
    check("positions_T", positions, {Kind::i64}, {any});
    check("sequence_of_T", sequence_of, {Kind::i32}, {size(positions, 0)});
    check("tables_SW", tables, {Kind::i32}, {any, any});
    const PagedTokens tokens{size(positions, 0), data<int64_t>(positions), data<int32_t>(sequence_of),
                             data<int32_t>(tables), size(tables, 1)};
    for (int64_t t = 0; t < tokens.tokens; ++t) {
        const int64_t position = tokens.positions[t], sequence = tokens.sequence_of[t];
        if (sequence < 0 || sequence >= size(tables, 0)) refuse("sequence_of_T", "holds a row that tables_SW has not");
        if (position < 0 || position / block_tokens >= tokens.table_width)
            refuse("positions_T", "holds " + std::to_string(position) + "; tables_SW reach to " +
                                      std::to_string(tokens.table_width * block_tokens - 1));
    }
    return tokens;
}

// Blocks of the positions from `first` to that of each token.
template <class F>
void check_blocks(const PagedCache &cache, const PagedTokens &tokens, const F &first) {
    for (int64_t t = 0; t < tokens.tokens; ++t) {
        const int32_t *table = tokens.tables + tokens.sequence_of[t] * tokens.table_width;
        const int64_t position = tokens.positions[t];
        for (int64_t tile = first(position) / block_tokens; tile <= position / block_tokens; ++tile)
            if (table[tile] < 0 || table[tile] >= cache.num_blocks)
                refuse("tables_SW", "name block " + std::to_string(table[tile]) + " of " +
                                        std::to_string(cache.num_blocks));
    }
}

// Floats from one token to the next one of rows [tokens, parts, width], whose tokens may lie apart.
int64_t check_rows(const char *name, const Array &rows, int64_t tokens, int64_t parts, int64_t width) {
    const bool fits = is(rows, Kind::f32) && rows.ndim() == 3 && size(rows, 0) == tokens && size(rows, 1) == parts &&
                      size(rows, 2) == width;
    if (!fits)
        refuse(name, "has shape " + shape_text(rows) + "; it must be float32 [" + std::to_string(tokens) + ", " +
                         std::to_string(parts) + ", " + std::to_string(width) + "]");
    const bool dense = (width == 1 || rows.stride(2) == 1) && (parts == 1 || rows.stride(1) == width) &&
                       (tokens <= 1 || rows.stride(0) >= 0);
    if (!dense) refuse(name, "has gaps within a token; call .contiguous() first");
    return tokens <= 1 ? parts * width : rows.stride(0);
}

void bound_write_cache(const Array &keys, const Optional &values, int64_t key_dim, int64_t value_dim,
                       const Array &positions, const Array &sequence_of, const Array &tables, const Array &k,
                       const Optional &v, int threads) {
    const PagedCache cache = check_cache(keys, values, key_dim, value_dim);
    const PagedTokens tokens = check_tokens(positions, sequence_of, tables);
    check_blocks(cache, tokens, [](int64_t position) { return position; });
    const int64_t k_stride = check_rows("k_TGA", k, tokens.tokens, cache.num_groups, key_dim);
    if (v.has_value() == cache.shared) refuse("v_TGV", "and values belong together");
    const int64_t v_stride = v ? check_rows("v_TGV", *v, tokens.tokens, cache.num_groups, value_dim) : 0;
    nb::gil_scoped_release release;
    chosen().write_cache(cache, tokens, data<float>(k), k_stride, v ? data<float>(*v) : nullptr, v_stride, threads);
}

void bound_paged_attention(const Array &keys, const Optional &values, int64_t key_dim, int64_t value_dim,
                           const Array &positions, const Array &sequence_of, const Array &tables, const Array &q,
                           const Array &out, int64_t window, int64_t chunk, float scale, const Optional &sinks,
                           int threads) {
    const PagedCache cache = check_cache(keys, values, key_dim, value_dim);
    const PagedTokens tokens = check_tokens(positions, sequence_of, tables);
    const int64_t num_heads = q.ndim() == 3 ? size(q, 1) : 0;
    const int64_t q_stride = check_rows("q_THA", q, tokens.tokens, num_heads, key_dim);
    const int64_t out_stride = check_rows("out_THV", out, tokens.tokens, num_heads, value_dim);
    if (num_heads < 1 || cache.num_groups < 1 || num_heads % cache.num_groups)
        refuse("q_THA", "has " + std::to_string(num_heads) + " heads for " + std::to_string(cache.num_groups) +
                            " groups; each serves as many");
    if (window < 0 || chunk < 0) refuse("window", "and chunk must be 0 or more");
    if (sinks) check("sinks_H", *sinks, {Kind::f32}, {num_heads});
    const PagedSight sight{num_heads, window, chunk, scale, sinks ? data<float>(*sinks) : nullptr};
    check_blocks(cache, tokens, [&](int64_t position) { return sight.first_seen(position); });
    nb::gil_scoped_release release;
    chosen().paged_attention(cache, tokens, sight, data<float>(q), q_stride, data<float>(out), out_stride, threads);
}

}  // namespace

void bind_paged_attention(nb::module_ &m) {
    m.def("write_cache", &bound_write_cache, nb::arg("keys"), nb::arg("values").none(), nb::arg("key_dim"),
          nb::arg("value_dim"), nb::arg("positions_T"), nb::arg("sequence_of_T"), nb::arg("tables_SW"),
          nb::arg("k_TGA"), nb::arg("v_TGV").none(), nb::arg("threads"));
    m.def("paged_attention", &bound_paged_attention, nb::arg("keys"), nb::arg("values").none(), nb::arg("key_dim"),
          nb::arg("value_dim"), nb::arg("positions_T"), nb::arg("sequence_of_T"), nb::arg("tables_SW"),
          nb::arg("q_THA"), nb::arg("out_THV"), nb::arg("window"), nb::arg("chunk"), nb::arg("scale"),
          nb::arg("sinks_H").none(), nb::arg("threads"));
}

}  // namespace moesaic
