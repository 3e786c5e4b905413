// Tokens drawn from rows of logits, and their log probabilities, on the threads of a program.
#include "bind_program.h"
#include "draw.h"
#include "parallel.h"

namespace moesaic {
namespace {

constexpr int64_t grain = 1 << 15;  // logits below which waking a second thread costs more than it saves

// f(row) for all rows, on a program's threads, or on this one alone.
template <class F>
void for_each_row(int64_t rows, int64_t vocab, Program *program, const F &f) {
    if (!program) return parallel_for(rows, rows, 1, f);
    const Pool::Scope on_its_threads(program->pool());
    parallel_for(rows, 1, threads_for(rows * vocab, grain, program->threads()), f);
}

// Each row by itself: rules may have made copies of some.
std::vector<const float *> check_rows(const std::vector<Array> &rows_V) {
    std::vector<const float *> rows;
    for (const Array &row : rows_V) {
        check("row", row, {Kind::f32}, {size(rows_V.front(), 0)});
        rows.push_back(data<float>(row));
    }
    if (!rows.empty() && size(rows_V.front(), 0) < 1) refuse("row", "has no tokens");
    return rows;
}

// Temperature, top_k, top_p, min_p and number of each row.
using RuleTuple = std::tuple<double, int64_t, double, double, double>;

// The bits of each row's tokens; none where all may be drawn.
using Mask = std::optional<Array>;

std::vector<const uint8_t *> check_masks(const std::vector<Mask> &masks, size_t rows, int64_t vocab) {
    if (masks.size() != rows) refuse("masks", "are not as many as there are rows");
    std::vector<const uint8_t *> found;
    for (const Mask &mask : masks) {
        if (mask) check("mask", *mask, {Kind::u8}, {(vocab + 7) / 8});
        found.push_back(mask ? data<uint8_t>(*mask) : nullptr);
    }
    return found;
}

std::vector<int64_t> draw_rows(const std::vector<Array> &rows_V, const std::vector<RuleTuple> &given,
                               const std::vector<Mask> &masks, Program *program) {
    const std::vector<const float *> rows = check_rows(rows_V);
    if (given.size() != rows.size()) refuse("rules", "are not as many as there are rows");
    std::vector<DrawRule> rules;
    for (const auto &[temperature, top_k, top_p, min_p, number] : given) {
        if (!(temperature >= 0) || top_k < 0 || !(top_p > 0 && top_p <= 1) || !(min_p >= 0 && min_p <= 1) ||
            !(number >= 0 && number < 1))
            refuse("rules", "are out of their ranges");
        rules.push_back({temperature, top_k, top_p, min_p, number});
    }
    std::vector<int64_t> tokens(rows.size());
    const int64_t vocab = rows.empty() ? 0 : size(rows_V.front(), 0);
    const std::vector<const uint8_t *> allowed = check_masks(masks, rows.size(), vocab);
    nb::gil_scoped_release release;
    for_each_row(static_cast<int64_t>(rows.size()), vocab, program, [&](int64_t i) {
        const auto row = static_cast<size_t>(i);
        tokens[row] = draw_row(rows[row], vocab, rules[row], allowed[row]);
    });
    return tokens;
}

// A token, and how many of the likeliest.
using WantedTuple = std::tuple<int64_t, int64_t>;
// The token's log probability; ids and log probabilities of the likeliest.
using Scored = std::tuple<double, std::vector<int64_t>, std::vector<double>>;

std::vector<Scored> score_rows(const std::vector<Array> &rows_V, const std::vector<WantedTuple> &wanted,
                               Program *program) {
    const std::vector<const float *> rows = check_rows(rows_V);
    const int64_t vocab = rows.empty() ? 0 : size(rows_V.front(), 0);
    if (wanted.size() != rows.size()) refuse("wanted", "are not as many as there are rows");
    for (const auto &[token, count] : wanted)
        if (token < 0 || token >= vocab || count < 0) refuse("wanted", "are tokens or counts that there are not");
    std::vector<Scored> found(rows.size());
    nb::gil_scoped_release release;
    for_each_row(static_cast<int64_t>(rows.size()), vocab, program, [&](int64_t i) {
        const auto row = static_cast<size_t>(i);
        const auto &[token, count] = wanted[row];
        auto &[own, ids, others] = found[row];
        const double log_sum = score_row(rows[row], vocab, count, ids);
        own = rows[row][token] - log_sum;
        for (const int64_t id : ids) others.push_back(rows[row][id] - log_sum);
    });
    return found;
}

}  // namespace

void bind_draw(nb::module_ &m) {
    m.def("draw_rows", &draw_rows, nb::arg("rows_V"), nb::arg("rules"), nb::arg("masks"), nb::arg("program").none());
    m.def("score_rows", &score_rows, nb::arg("rows_V"), nb::arg("wanted"), nb::arg("program").none());
}

}  // namespace moesaic
