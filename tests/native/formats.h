// The formats of packed weights, and matrices in them.
#pragma once

#include "packed.h"
#include "suite.h"

namespace moesaic {

struct Kind {
    const char *name;
    Format format;
    int64_t group;
};
constexpr Kind kinds[] = {{"fp32", Format::f32, 0},     {"bf16", Format::b16, 0},      {"fp8", Format::fp8, 0},
                          {"int8/32", Format::int8, 32}, {"int8/64", Format::int8, 64}, {"int8/128", Format::int8, 128},
                          {"int4/32", Format::int4, 32}, {"int4/64", Format::int4, 64}, {"int4/128", Format::int4, 128},
                          {"int6/32", Format::int6, 32}, {"int6/64", Format::int6, 64}, {"int6/128", Format::int6, 128},
                          {"mxfp4", Format::mxfp4, 0},   {"uneven4", Format::uneven4, 0}};

constexpr int64_t num_experts = 3;

// Random matrices, one for each expert, packed by the kernels given.
Bytes packed(const Kernels &kernels, const PackedShape &shape, int threads, uint32_t seed = 1);

}  // namespace moesaic
