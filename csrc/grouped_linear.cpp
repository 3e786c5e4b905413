// Each expert's rows times its own matrix, and the gradients of that: which products there are, how they are cut into
// blocks and shared out. One list of blocks holds all experts', so neither a hot expert nor many cold ones leave a
// thread idle; each block is computed whole by one thread.
#include "parallel.h"
#include "product.h"
#include "silu.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Multiplications below which waking a second thread costs more than it saves.
constexpr int64_t grain = 1 << 18;
constexpr int64_t blocks_a_thread = 8;      // so that the last ones to finish are short
// Rows of an expert up to which packing them, not its weights, is the cheaper on tiles.
constexpr int64_t turned_rows = 384;
constexpr int64_t stream_bytes = 4 << 20;   // of gradients from which they go past the caches
constexpr int64_t least_m = 64, least_n = 96;  // of a block: packing is worth its while

struct Item {
    int64_t expert;
    Block block;
};

// Which side is cut first: the one whose cutting repeats less packing.
enum class Cut { m_first, n_first };

struct Plan {
    Item *items = nullptr;
    int64_t count = 0, room = 0;
    ~Plan() { delete[] items; }

    void add(const Item &item) {
        if (count == room) {
            room = room ? 2 * room : 64;
            Item *more = new Item[room];
            for (int64_t i = 0; i < count; ++i) more[i] = items[i];
            delete[] items;
            items = more;
        }
        items[count++] = item;
    }

    // An m x n product in about `pieces` blocks.
    void cut(int64_t expert, int64_t m, int64_t n, int64_t pieces, Cut cut) {
        int64_t &first = cut == Cut::m_first ? m_pieces : n_pieces, &second = cut == Cut::m_first ? n_pieces : m_pieces;
        const int64_t most_m = ceil_div(m, least_m), most_n = ceil_div(n, least_n);
        first = at_most(pieces, cut == Cut::m_first ? most_m : most_n);
        second = at_most(ceil_div(pieces, first), cut == Cut::m_first ? most_n : most_m);
        for (int64_t i = 0; i < m_pieces; ++i)
            for (int64_t j = 0; j < n_pieces; ++j)
                add({expert, {bound(m, m_pieces, i), bound(m, m_pieces, i + 1),  //
                              bound(n, n_pieces, j), bound(n, n_pieces, j + 1)}});
    }

  private:
    int64_t m_pieces = 1, n_pieces = 1;
    // Bounds at multiples of 32, so that only the last block has ragged tiles.
    static int64_t bound(int64_t size, int64_t pieces, int64_t i) {
        return at_most(size, even_cut(ceil_div(size, 32), pieces, i) * 32);
    }
};

// product_of(expert) for every expert, cut and shared out: compute(item, product).
template <class ProductOf, class Compute>
void for_blocks(int64_t num_experts, Cut cut, int threads, const ProductOf &product_of, const Compute &compute) {
    const auto work_of = [](const auto &p) { return p.parts * p.m * p.n * (p.k > 8 ? p.k : 8); };
    int64_t total = 0;
    for (int64_t e = 0; e < num_experts; ++e) total += work_of(product_of(e));
    const int useful = threads_for(total, grain, threads);
    const int64_t share = total / (useful * blocks_a_thread) + 1;
    Plan plan;
    for (int64_t e = 0; e < num_experts; ++e) {
        const auto product = product_of(e);
        const int64_t work = work_of(product);
        if (work > 0) plan.cut(e, product.m, product.n, useful > 1 ? ceil_div(work, share) : 1, cut);
    }
    parallel_for(plan.count, 1, useful,
                 [&](int64_t i) { compute(plan.items[i], product_of(plan.items[i].expert)); });
}

// The rows of expert e, or none where the caller keeps them.
inline int64_t rows_of(const Grouped &g, int64_t e) {
    const int64_t rows = g.offsets[e + 1] - g.offsets[e];
    return rows > g.max_rows ? 0 : rows;
}

template <class T, class B>
Product<T, T, B> forward_product(const T *x, const B *weight, T *y, const Grouped &g, int parts, int64_t e) {
    const int64_t start = g.offsets[e], outputs = g.outputs / parts, half = outputs * g.inputs;
    return {x + start * g.inputs, g.inputs, 1, weight + e * g.outputs * g.inputs, 1, g.inputs, y + start * g.outputs,
            g.outputs, 1, rows_of(g, e), outputs, g.inputs, false, false, parts, 0, half, outputs};
}

// The same product with A and B in each other's place: weights are read where they lie, rows of x are packed.
template <class T>
Product<T, T> turned(const Product<T, T> &p) {
    return {p.b, p.b_col, p.b_k, p.a, p.a_k, p.a_row, p.c, p.c_col, p.c_row, p.n, p.m, p.k,
            p.accumulate, p.stream, p.parts, p.b_part, p.a_part, p.c_part};
}

template <class T, class B>
void compute_block(const Product<T, T, B> &p, const Block &b, int64_t few_rows) {
    if (p.m <= few_rows) return multiply_strips(p, b);
    if constexpr (on_tiles<T>)
        if (p.m <= turned_rows) return multiply(turned(p), {b.n0, b.n1, b.m0, b.m1});
    multiply(p, b);
}

// `after(rows and columns of a block)` once they are computed, by the thread that has them in its cache.
template <class T, class B, class After>
void forward(const T *x, const B *weight, T *y, const Grouped &g, int parts, int threads, const After &after) {
    if (g.outputs == 0) return;
    const auto product_of = [&](int64_t e) { return forward_product(x, weight, y, g, parts, e); };
    for_blocks(g.num_experts, Cut::n_first, threads, product_of, [&](const Item &item, const Product<T, T, B> &p) {
        compute_block(p, item.block, g.few_rows);
        after(item);
    });
}

}  // namespace

template <class T, class B>
void grouped_linear(const T *x, const B *weight, T *y, const Grouped &g, int threads) {
    forward(x, weight, y, g, 1, threads, [](const Item &) {});
}

template <class T, class B>
void grouped_gated(const T *x, const B *weight, T *gate_up, T *y, const Grouped &g, int threads) {
    const int64_t inner = g.outputs / 2;
    forward(x, weight, gate_up, g, 2, threads, [=](const Item &item) {
        const Block &b = item.block;
        const int64_t start = g.offsets[item.expert];
        for (int64_t row = start + b.m0; row < start + b.m1; ++row)
            gated_row(gate_up + row * 2 * inner + b.n0, gate_up + row * 2 * inner + inner + b.n0,
                      y + row * inner + b.n0, b.n1 - b.n0);
    });
}

template <class T>
void grouped_linear_input_grad(const T *dy, const T *weight, T *dx, const Grouped &g, int threads) {
    const auto product_of = [&](int64_t e) -> Product<T, T> {
        const int64_t start = g.offsets[e];
        return {dy + start * g.outputs, g.outputs, 1, weight + e * g.outputs * g.inputs, g.inputs, 1,
                dx + start * g.inputs, g.inputs, 1, rows_of(g, e), g.inputs, g.outputs, false, false, 1, 0, 0, 0};
    };
    for_blocks(g.num_experts, Cut::n_first, threads, product_of,
               [](const Item &item, const Product<T, T> &p) { multiply(p, item.block); });
}

namespace {

template <class T, class C>
void weight_grad(const T *dy, const T *x, C *dw, Target target, const Grouped &g, int threads) {
    const int64_t row_bytes = g.inputs * static_cast<int64_t>(sizeof(C));
    const bool whole_lines = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(dw) % 64 == 0;
    const bool large = g.num_experts * g.outputs * row_bytes > stream_bytes;
    const bool accumulate = target == Target::sums;
    const bool stream = can_stream && target == Target::reused && whole_lines && large;
    const auto product_of = [&](int64_t e) -> Product<T, C> {
        const int64_t start = g.offsets[e], rows = g.offsets[e + 1] - start;
        const bool skip = rows > g.max_rows || (rows == 0 && accumulate);
        return {dy + start * g.outputs, 1, g.outputs, x + start * g.inputs, g.inputs, 1,
                dw + e * g.outputs * g.inputs, g.inputs, 1, skip ? 0 : g.outputs, g.inputs, rows, accumulate, stream,
                1, 0, 0, 0};
    };
    for_blocks(g.num_experts, Cut::m_first, threads, product_of,
               [](const Item &item, const Product<T, C> &p) { multiply(p, item.block); });
}

}  // namespace

template <class T>
void grouped_linear_weight_grad(const T *dy, const T *x, T *dw, const Grouped &g, int threads) {
    weight_grad(dy, x, dw, Target::fresh, g, threads);
}

template <class T>
void grouped_linear_weight_grad_wide(const T *dy, const T *x, float *dw, Target target, const Grouped &g,
                                     int threads) {
    weight_grad(dy, x, dw, target, g, threads);
}

#define MOESAIC_FOR(T)                                                                                             \
    template void grouped_linear(const T *, const T *, T *, const Grouped &, int);                                 \
    template void grouped_gated(const T *, const T *, T *, T *, const Grouped &, int);                             \
    template void grouped_linear_input_grad(const T *, const T *, T *, const Grouped &, int);                      \
    template void grouped_linear_weight_grad(const T *, const T *, T *, const Grouped &, int);                     \
    template void grouped_linear_weight_grad_wide(const T *, const T *, float *, Target, const Grouped &, int);
template void grouped_linear(const float *, const bf16 *, float *, const Grouped &, int);
template void grouped_gated(const float *, const bf16 *, float *, float *, const Grouped &, int);
MOESAIC_FOR(float)
MOESAIC_FOR(bf16)

}  // namespace moesaic::MOESAIC_ISA
