#include "dispatch.h"

namespace moesaic {
namespace {

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> tables = {&portable::kernels};
#if defined(MOESAIC_HAS_NEON)
    tables.push_back(&neon::kernels);  // every arm64 processor has it
#endif
#if defined(MOESAIC_HAS_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        tables.push_back(&avx512::kernels);
#endif
    return tables;
}

const Kernels *&current() {
    static const Kernels *table = available().back();
    return table;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels *table : available()) names.emplace_back(table->isa);
    return names;
}

const Kernels &chosen() { return *current(); }

bool use_isa(const std::string &name) {
    for (const Kernels *table : available()) {
        if (name != table->isa) continue;
        current() = table;
        return true;
    }
    return false;
}

}  // namespace moesaic
