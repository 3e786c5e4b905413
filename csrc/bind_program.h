// What the bindings of a program's steps share.
#pragma once

#include <nanobind/stl/tuple.h>

#include <cstring>
#include <tuple>

#include "packed_checks.h"
#include "program.h"

namespace moesaic {

// E packed matrices of one shape, as Python hands them over.
struct Packed {
    Array data;  // uint8 [E, bytes]
    PackedShape shape;
    int64_t count;

    const uint8_t *bytes() const { return moesaic::data<uint8_t>(data); }
};

// Where in the rows of a buffer something begins.
struct Place {
    int buffer = 0;
    int64_t offset = 0;
};

// What a step is a part of, and in which layer.
struct Label {
    std::string part;
    int64_t layer = -1;
};

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline const float *floats_or_null(const std::optional<Array> &array) {
    return array ? data<float>(*array) : nullptr;
}

// Raises ValueError unless the buffer has `size` floats in each row from the place on.
inline void check_place(const char *name, const Program &program, const Place &place, int64_t size) {
    if (place.offset < 0 || place.offset + size > program.width(place.buffer))
        refuse(name, "reaches past its buffer, whose rows have " + std::to_string(program.width(place.buffer)));
}

inline void check_floats(const char *name, const std::optional<Array> &array, int64_t size) {
    if (array) check(name, *array, {Kind::f32}, {size});
}

// to = W from + bias, or to += multiplier * (W from + bias).
inline void multiply(const Packed &packed, const RowsOf &from, const RowsOf &to, int64_t rows, const float *bias,
                     std::optional<float> multiplier, int threads) {
    const PackedLinear linear = {packed.shape, packed.bytes(), bias,      nullptr,
                                 1,            to.data,        to.stride, multiplier.has_value(),
                                 multiplier.value_or(1.0f)};
    chosen().packed_linear(from.data, from.stride, rows, linear, threads);
}

// Steps of the parts that have a file of their own.
void bind_row_steps(nb::class_<Program> &program);
void bind_attention_steps(nb::class_<Program> &program);
void bind_expert_steps(nb::class_<Program> &program);
void bind_choice_tally(nb::module_ &m);

}  // namespace moesaic

// Both are named tuples in Python.
namespace nanobind::detail {

template <class T, class First>
struct pair_caster {
    NB_TYPE_CASTER(T, const_name("tuple"))

    bool from_python(handle source, uint8_t flags, cleanup_list *cleanup) noexcept {
        make_caster<std::tuple<First, int64_t>> both;
        if (!both.from_python(source, flags, cleanup)) return false;
        const auto found = static_cast<std::tuple<First, int64_t>>(both);
        value = T{std::get<0>(found), std::get<1>(found)};
        return true;
    }
};
template <>
struct type_caster<moesaic::Place> : pair_caster<moesaic::Place, int> {};
template <>
struct type_caster<moesaic::Label> : pair_caster<moesaic::Label, std::string> {};

}  // namespace nanobind::detail
