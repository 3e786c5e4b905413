// What bindings check of packed weights and of what stands between them.
#pragma once

#include "array_checks.h"
#include "packed_experts.h"

namespace moesaic {

// Raises ValueError for an unknown format, a group that it does not have, or odd paired outputs.
inline PackedShape check_packed(const std::string &format, int64_t outputs, int64_t inputs, int64_t group, bool paired) {
    const std::array<std::pair<const char *, Format>, 8> known = {{{"fp32", Format::f32},
                                                                   {"bf16", Format::b16},
                                                                   {"fp8", Format::fp8},
                                                                   {"int8", Format::int8},
                                                                   {"int6", Format::int6},
                                                                   {"int4", Format::int4},
                                                                   {"mxfp4", Format::mxfp4},
                                                                   {"uneven4", Format::uneven4}}};
    if (outputs < 0 || inputs < 0) refuse("weights", "have a negative size");
    if (paired && outputs % 2) refuse("outputs", "are odd in number; paired ones are gate and up, equally many");
    for (const auto &[name, value] : known) {
        if (format != name) continue;
        if (has_groups(value) && group != 32 && group != 64 && group != 128) refuse("group", "must be 32, 64 or 128");
        return {value, outputs, inputs, group, paired};
    }
    refuse("format", "is not known; use fp32, bf16, fp8, int8, int6, int4, mxfp4 or uneven4");
}

// Raises ValueError for an unknown name.
inline PackedActivation check_activation(const std::string &name, float limit, float alpha, float shift) {
    const std::array<std::pair<const char *, ActivationKind>, 5> known = {{{"silu", ActivationKind::silu},
                                                                           {"gelu", ActivationKind::gelu},
                                                                           {"gelu_new", ActivationKind::gelu_tanh},
                                                                           {"relu", ActivationKind::relu},
                                                                           {"relu2", ActivationKind::relu2}}};
    for (const auto &[each, kind] : known)
        if (name == each) return {kind, limit, alpha, shift};
    refuse("activation", "is not known; use silu, gelu, gelu_new, relu or relu2");
}

}  // namespace moesaic
