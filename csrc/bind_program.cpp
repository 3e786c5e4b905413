// Programs as Python sees them: built step by step, then run batch by batch.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "bind_program.h"

namespace moesaic {
namespace {

Batch check_batch(const Program &program, const Array &token_ids, const Array &positions, const Array &text_of,
                  const Array &tables, const Array &output_rows, const Array &logits, int section) {
    if (section < 0 || section >= program.sections()) refuse("section", "is one that the program does not have");
    check("token_ids", token_ids, {Kind::i64}, {any});
    const int64_t tokens = size(token_ids, 0);
    check("positions", positions, {Kind::i64}, {tokens});
    check("text_of", text_of, {Kind::i32}, {tokens});
    check("tables", tables, {Kind::i32}, {any, any});
    check("output_rows", output_rows, {Kind::i64}, {any});
    check("logits", logits, {Kind::f32}, {size(output_rows, 0), any});
    check_indices("output_rows", output_rows, tokens);
    const Batch batch = {tokens, data<int64_t>(token_ids), data<int64_t>(positions), data<int32_t>(text_of),
                         data<int32_t>(tables), size(tables, 1), data<int64_t>(output_rows), size(output_rows, 0),
                         data<float>(logits)};
    program.check(batch, size(tables, 0), size(logits, 1));
    return batch;
}

bool run(Program &program, const Array &token_ids, const Array &positions, const Array &text_of, const Array &tables,
         const Array &output_rows, const Array &logits, int section) {
    const Batch batch = check_batch(program, token_ids, positions, text_of, tables, output_rows, logits, section);
    nb::gil_scoped_release release;
    return program.run(batch, section);
}

using Found = std::tuple<std::string, int64_t, int64_t, std::vector<int64_t>>;

std::optional<Found> run_checked(Program &program, const Array &token_ids, const Array &positions, const Array &text_of,
                                 const Array &tables, const Array &output_rows, const Array &logits, int section) {
    const Batch batch = check_batch(program, token_ids, positions, text_of, tables, output_rows, logits, section);
    nb::gil_scoped_release release;
    const NotFinite found = program.run_checked(batch, section);
    if (found.row < 0) return {};
    return Found{found.part, found.layer, found.row, found.experts};
}

// Copies what the newest batch's first tokens have in a buffer, as wide as `out` is.
void read_rows(Program &program, const Place &from, const Array &out) {
    check("out", out, {Kind::f32}, {any, any});
    check_place("source", program, from, size(out, 1));
    if (size(out, 0) > program.room()) refuse("out", "has more rows than the newest batch had");
    const RowsOf rows = program.rows(from.buffer, from.offset);
    for (int64_t t = 0; t < size(out, 0); ++t)
        std::memcpy(data<float>(out) + t * size(out, 1), rows.row(t), static_cast<size_t>(size(out, 1)) * 4);
}

std::vector<std::tuple<std::string, int64_t, double>> times(const Program &program) {
    std::vector<std::tuple<std::string, int64_t, double>> all;
    for (const Step &step : program.steps()) all.emplace_back(step.part, step.layer, step.seconds);
    return all;
}

void init_packed(Packed *self, const Array &data, const std::string &format, int64_t outputs, int64_t inputs,
                 int64_t group, bool paired) {
    const PackedShape shape = check_packed(format, outputs, inputs, group, paired);
    check("data", data, {Kind::u8}, {any, shape.bytes()});
    new (self) Packed{data, shape, size(data, 0)};
}

}  // namespace

void bind_program(nb::module_ &m) {
    nb::class_<Packed>(m, "Packed", "Packed matrices of one shape, as steps take them; the memory stays Python's.")
        .def("__init__", &init_packed, nb::arg("data"), nb::arg("format"), nb::arg("outputs"), nb::arg("inputs"),
             nb::arg("group"), nb::arg("paired"));
    nb::class_<Program> program(m, "Program", "A model as native steps over buffers of rows, on threads of its own.");
    program.def(nb::init<int>(), nb::arg("threads"))
        .def("buffer", &Program::add_buffer, nb::arg("width"), "A buffer of rows; its number.")
        .def("widen", &Program::widen, nb::arg("buffer"), nb::arg("width"), "Make its rows no narrower than this.")
        .def("begin_section", &Program::begin_section,
             "Steps belong to a new section from now on, which runs by itself; its number. The first is 0.")
        .def("run", &run, nb::arg("token_ids"), nb::arg("positions"), nb::arg("text_of"), nb::arg("tables"),
             nb::arg("output_rows"), nb::arg("logits"), nb::arg("section") = 0,
             "Writes the logits; whether all of them are finite.")
        .def("run_checked", &run_checked, nb::arg("token_ids"), nb::arg("positions"), nb::arg("text_of"),
             nb::arg("tables"), nb::arg("output_rows"), nb::arg("logits"), nb::arg("section") = 0,
             "As run; the part, layer, row and experts of the first number that is not finite, or None.")
        .def("read_rows", &read_rows, nb::arg("source"), nb::arg("out"),
             "Copy what the newest batch's tokens have in a buffer.")
        .def("times", &times, "Part, layer and seconds of every step since `reset_times`.")
        .def("reset_times", &Program::reset_times)
        .def_prop_ro("threads", &Program::threads)
        .def_prop_ro("buffer_bytes", &Program::bytes);
    bind_row_steps(program);
    bind_attention_steps(program);
    bind_expert_steps(program);
    bind_choice_tally(m);
}

}  // namespace moesaic
