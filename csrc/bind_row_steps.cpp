// Steps that read and write rows one by one: embedding, norms, projections, positions, sums, logits.
#include <cmath>
#include <cstring>

#include "bind_program.h"
#include "scratch.h"

namespace moesaic {
namespace {

constexpr int wanted_slot = 26, gates_slot = 27;

template <class T>
void look_up(const T *table, const int64_t *ids, const RowsOf &to, int64_t tokens, int64_t size, float multiplier) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < size; ++i) to.row(t)[i] = widened(table[ids[t] * size + i]) * multiplier;
}

void embed(Program &program, const Array &table, Place to, float multiplier) {
    check("table", table, floats, {any, any});
    const int64_t size = moesaic::size(table, 1);
    check_place("to", program, to, size);
    program.limit_vocab(moesaic::size(table, 0));
    program.add_step({"embedding", -1, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        for_type(table, [&](auto *type) {
            using T = std::remove_pointer_t<decltype(type)>;
            look_up(data<T>(table), batch.token_ids, p.rows(to.buffer, to.offset), batch.tokens, size, multiplier);
        });
    }});
}

void norm(Program &program, const Label &label, Place from, Place to, int64_t count, int64_t size,
          const std::optional<Array> &weight, const std::optional<Array> &bias, float eps, bool centered) {
    check_place("from", program, from, count * size);
    check_place("to", program, to, count * size);
    check_floats("weight", weight, size);
    check_floats("bias", bias, size);
    program.add_step({label.part, label.layer, to.buffer, to.offset, count * size, [=](const Batch &batch, Program &p) {
        const NormRows norm = {p.rows(from.buffer, from.offset), p.rows(to.buffer, to.offset), batch.tokens, count,
                               size, floats_or_null(weight), floats_or_null(bias), eps, centered};
        chosen().norm_rows(norm, p.threads());
    }});
}

// to = W from + bias, or to += multiplier * (W from + bias).
void linear(Program &program, const Label &label, Place from, Place to, const Packed &packed,
            const std::optional<Array> &bias, std::optional<float> adding) {
    const PackedShape shape = packed.shape;
    check_place("from", program, from, shape.inputs);
    check_place("to", program, to, shape.outputs);
    check_floats("bias", bias, shape.outputs);
    program.add_step({label.part, label.layer, to.buffer, to.offset, shape.outputs, [=](const Batch &batch, Program &p) {
        multiply(packed, p.rows(from.buffer, from.offset), p.rows(to.buffer, to.offset), batch.tokens,
                      floats_or_null(bias), adding, p.threads());
    }});
}

void rotate(Program &program, const Label &label, Place at, int64_t heads, int64_t head_stride, const Array &cos,
            const Array &sin, bool interleaved) {
    check("cos", cos, {Kind::f32}, {any, any});
    check("sin", sin, {Kind::f32}, {size(cos, 0), size(cos, 1)});
    const int64_t turning = 2 * size(cos, 1);
    program.limit_positions(size(cos, 0));
    check_place("at", program, at, (heads - 1) * head_stride + turning);
    program.add_step({label.part, label.layer, at.buffer, at.offset, turning, [=](const Batch &batch, Program &p) {
        const RotateRows turn = {p.rows(at.buffer, at.offset), batch.tokens, heads, head_stride, turning,
                                 batch.positions, data<float>(cos), data<float>(sin), interleaved};
        chosen().rotate_rows(turn, p.threads());
    }});
}

void clip(Program &program, const Label &label, Place at, int64_t size, float limit) {
    check_place("at", program, at, size);
    program.add_step({label.part, label.layer, at.buffer, at.offset, size, [=](const Batch &batch, Program &p) {
        const RowsOf rows = p.rows(at.buffer, at.offset);
        for (int64_t t = 0; t < batch.tokens; ++t)
            for (int64_t i = 0; i < size; ++i) {
                float &x = rows.row(t)[i];
                x = x > limit ? limit : x < -limit ? -limit : x;
            }
    }});
}

// Llama 4: times 1 + scale * ln(1 + floor((position + 1) / interval)).
void temperature(Program &program, const Label &label, Place at, int64_t size, int64_t interval, float scale) {
    check_place("at", program, at, size);
    program.add_step({label.part, label.layer, at.buffer, at.offset, size, [=](const Batch &batch, Program &p) {
        const RowsOf rows = p.rows(at.buffer, at.offset);
        for (int64_t t = 0; t < batch.tokens; ++t) {
            const float steps = static_cast<float>((batch.positions[t] + 1) / interval);
            const float by = 1.0f + scale * std::log1p(steps);
            for (int64_t i = 0; i < size; ++i) rows.row(t)[i] *= by;
        }
    }});
}

// to += multiplier * sigmoid(weight . seen) * from; without a weight, multiplier * from.
void add(Program &program, const Label &label, Place from, Place to, int64_t size, float multiplier,
         const std::optional<Packed> &gate, Place seen) {
    check_place("from", program, from, size);
    check_place("to", program, to, size);
    if (gate) check_place("seen", program, seen, gate->shape.inputs);
    program.add_step({label.part, label.layer, to.buffer, to.offset, size, [=](const Batch &batch, Program &p) {
        AddRows rows = {p.rows(from.buffer, from.offset), p.rows(to.buffer, to.offset), batch.tokens, size, multiplier,
                        nullptr};
        if (gate) {
            auto *gates = static_cast<float *>(scratch(gates_slot, batch.tokens * 4));
            multiply(*gate, p.rows(seen.buffer, seen.offset), {gates, 1}, batch.tokens, nullptr, {}, p.threads());
            for (int64_t t = 0; t < batch.tokens; ++t) gates[t] = 1.0f / (1.0f + std::exp(-gates[t]));
            rows.gates = gates;
        }
        chosen().add_rows(rows, p.threads());
    }});
}

void clear(Program &program, const Label &label, Place at, int64_t size) {
    check_place("at", program, at, size);
    program.add_step({label.part, label.layer, at.buffer, at.offset, size, [=](const Batch &batch, Program &p) {
        const RowsOf rows = p.rows(at.buffer, at.offset);
        for (int64_t t = 0; t < batch.tokens; ++t) std::memset(rows.row(t), 0, static_cast<size_t>(size) * 4);
    }});
}

void output(Program &program, Place from, const Packed &packed, const std::optional<Array> &bias, float divisor) {
    const PackedShape shape = packed.shape;
    check_place("from", program, from, shape.inputs);
    check_floats("bias", bias, shape.outputs);
    program.set_logits(shape.outputs);
    program.add_step({"head", -1, -1, 0, 0, [=](const Batch &batch, Program &p) {
        auto *wanted = static_cast<float *>(scratch(wanted_slot, batch.outputs * shape.inputs * 4));
        const RowsOf rows = p.rows(from.buffer, from.offset);
        for (int64_t n = 0; n < batch.outputs; ++n)
            std::memcpy(wanted + n * shape.inputs, rows.row(batch.output_rows[n]), static_cast<size_t>(shape.inputs) * 4);
        multiply(packed, {wanted, shape.inputs}, {batch.logits, shape.outputs}, batch.outputs,
                      floats_or_null(bias), {}, p.threads());
        if (divisor == 1.0f) return;
        for (int64_t i = 0; i < batch.outputs * shape.outputs; ++i) batch.logits[i] /= divisor;
    }});
}

}  // namespace

void bind_row_steps(nb::class_<Program> &program) {
    program
        .def("embed", &embed, nb::arg("table"), nb::arg("to"), nb::arg("multiplier"))
        .def("norm", &norm, nb::arg("label"), nb::arg("source"), nb::arg("target"), nb::arg("count"), nb::arg("size"),
             nb::arg("weight").none(), nb::arg("bias").none(), nb::arg("eps"), nb::arg("centered"))
        .def("linear", &linear, nb::arg("label"), nb::arg("source"), nb::arg("target"), nb::arg("packed"),
             nb::arg("bias").none(), nb::arg("adding").none())
        .def("rotate", &rotate, nb::arg("label"), nb::arg("place"), nb::arg("heads"), nb::arg("stride"),
             nb::arg("cos"), nb::arg("sin"), nb::arg("interleaved"))
        .def("clip", &clip, nb::arg("label"), nb::arg("place"), nb::arg("size"), nb::arg("limit"))
        .def("temperature", &temperature, nb::arg("label"), nb::arg("place"), nb::arg("size"), nb::arg("interval"),
             nb::arg("scale"))
        .def("add", &add, nb::arg("label"), nb::arg("source"), nb::arg("target"), nb::arg("size"),
             nb::arg("multiplier"), nb::arg("gate").none(), nb::arg("seen"))
        .def("clear", &clear, nb::arg("label"), nb::arg("place"), nb::arg("size"))
        .def("output", &output, nb::arg("source"), nb::arg("packed"), nb::arg("bias").none(), nb::arg("divisor"));
}

}  // namespace moesaic
