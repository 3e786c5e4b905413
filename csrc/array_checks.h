// What bindings check of arrays before they hand them on: dtype, shape, contiguity, indices.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "dispatch.h"

namespace nb = nanobind;

namespace moesaic {

using Array = nb::ndarray<nb::device::cpu>;


enum class Kind { f32, bf16, f16, i8, i32, i64, u8 };
constexpr auto floats = {Kind::f32, Kind::bf16};

inline const char *name_of(Kind kind) {
    switch (kind) {
        case Kind::f32: return "float32";
        case Kind::bf16: return "bfloat16";
        case Kind::f16: return "float16";
        case Kind::i8: return "int8";
        case Kind::i32: return "int32";
        case Kind::i64: return "int64";
        default: return "uint8";
    }
}

inline bool is(const Array &array, Kind kind) {
    const nb::dlpack::dtype type = array.dtype();
    if (type.lanes != 1) return false;
    switch (kind) {
        case Kind::f32: return type == nb::dtype<float>();
        case Kind::i8: return type == nb::dtype<int8_t>();
        case Kind::i32: return type == nb::dtype<int32_t>();
        case Kind::i64: return type == nb::dtype<int64_t>();
        case Kind::u8: return type == nb::dtype<uint8_t>();
        case Kind::f16: return type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16;
        case Kind::bf16: return type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
    }
    return false;
}

inline std::string shape_text(const Array &array) {
    std::string text = "[";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

[[noreturn]] inline void refuse(const char *name, const std::string &what) {
    throw nb::value_error((name + (" " + what)).c_str());
}

constexpr int64_t any = -1;

// Raises ValueError unless `array` is contiguous, of one of `kinds` and of this shape (`any` fits every size).
inline void check(const char *name, const Array &array, std::initializer_list<Kind> kinds,
           std::initializer_list<int64_t> shape) {
    bool known = false;
    std::string allowed;
    for (Kind kind : kinds) {
        known = known || is(array, kind);
        allowed += std::string(allowed.empty() ? "" : " or ") + name_of(kind);
    }
    if (!known) refuse(name, "has a dtype that this operation does not take; use " + allowed);
    bool fits = array.ndim() == shape.size();
    std::string wanted;
    size_t axis = 0;
    for (int64_t size : shape) {
        fits = fits && (size == any || static_cast<int64_t>(array.shape(axis)) == size);
        wanted += (axis++ ? ", " : "") + (size == any ? std::string("*") : std::to_string(size));
    }
    if (!fits) refuse(name, "has shape " + shape_text(array) + "; it must be [" + wanted + "]");
    if (array.size() == 0) return;
    int64_t stride = 1;
    for (size_t i = array.ndim(); i-- > 0; stride *= static_cast<int64_t>(array.shape(i)))
        if (array.shape(i) > 1 && array.stride(i) != stride)
            refuse(name, "is not contiguous; call .contiguous() first");
}

inline int64_t size(const Array &array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

inline Kind kind_of(const Array &array) { return is(array, Kind::f32) ? Kind::f32 : Kind::bf16; }

// f(pointer) with a null pointer of the element type that `array` has.
template <class F>
void for_type(const Array &array, const F &f) {
    if (kind_of(array) == Kind::f32) f(static_cast<float *>(nullptr));
    else f(static_cast<bf16 *>(nullptr));
}

template <class T>
T *data(const Array &array) { return static_cast<T *>(array.data()); }

// Raises ValueError unless every index is in [0, limit).
inline void check_indices(const char *name, const Array &array, int64_t limit) {
    const int64_t *ids = data<int64_t>(array);
    bool inside = true;
    for (int64_t i = 0; i < size(array, 0); ++i) inside = inside && ids[i] >= 0 && ids[i] < limit;
    if (!inside) refuse(name, "holds an index outside 0 to " + std::to_string(limit - 1));
}

// Raises ValueError unless the offsets rise from 0 to `end`.
inline void check_offsets(const char *name, const Array &array, int64_t end) {
    const int64_t *bounds = data<int64_t>(array), last = size(array, 0) - 1;
    bool rises = last >= 0 && bounds[0] == 0 && bounds[last] == end;
    for (int64_t i = 0; i < last; ++i) rises = rises && bounds[i] <= bounds[i + 1];
    if (!rises) refuse(name, "must rise from 0 to the number of rows, " + std::to_string(end));
}

inline void check_rank_2(const char *name, const Array &array) { check(name, array, floats, {any, any}); }

// Raises ValueError for an unknown format, a group that it does not have, or odd paired outputs.
inline PackedShape check_packed(const std::string &format, int64_t outputs, int64_t inputs, int64_t group, bool paired) {
    const std::array<std::pair<const char *, Format>, 6> known = {{{"fp32", Format::f32},
                                                                   {"bf16", Format::b16},
                                                                   {"fp8", Format::fp8},
                                                                   {"int8", Format::int8},
                                                                   {"int4", Format::int4},
                                                                   {"mxfp4", Format::mxfp4}}};
    if (outputs < 0 || inputs < 0) refuse("weights", "have a negative size");
    if (paired && outputs % 2) refuse("outputs", "are odd in number; paired ones are gate and up, equally many");
    for (const auto &[name, value] : known) {
        if (format != name) continue;
        const bool grouped = value == Format::int8 || value == Format::int4;
        if (grouped && group != 32 && group != 64 && group != 128) refuse("group", "must be 32, 64 or 128");
        return {value, outputs, inputs, group, paired};
    }
    refuse("format", "is not known; use fp32, bf16, fp8, int8, int4 or mxfp4");
}

}  // namespace moesaic
