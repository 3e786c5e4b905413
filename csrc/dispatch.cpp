#include "dispatch.h"

#if defined(MOESAIC_HAS_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moesaic {
namespace {

#if defined(MOESAIC_HAS_AMX)
// Whether the processor has the tile unit and the system lends it to this process (Linux asks for it, per process).
bool has_tiles() {
#if defined(__linux__)
    constexpr unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25;  // of bf16, the unit, of int8
    constexpr int request_permission = 0x1023, tile_data = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tiles) != tiles) return false;
    static const bool lent = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return lent;
#else
    return false;
#endif
}
#endif

#if defined(__x86_64__) && defined(__GNUC__)
[[maybe_unused]] bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> tables = {&portable::kernels};
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#endif
#if defined(MOESAIC_HAS_NEON)
    tables.push_back(&neon::kernels);  // every arm64 processor has it
#endif
#if defined(MOESAIC_HAS_AVX2)
    if (has_avx2()) tables.push_back(&avx2::kernels);
#endif
#if defined(MOESAIC_HAS_AVX512)
    if (has_avx512()) tables.push_back(&avx512::kernels);
#endif
#if defined(MOESAIC_HAS_AVX512_VNNI)
    if (has_avx512() && __builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512_vnni::kernels);
#endif
#if defined(MOESAIC_HAS_AVX512_BF16)  // every processor with bf16 has VNNI
    if (has_avx512() && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::kernels);
#endif
#if defined(MOESAIC_HAS_AMX)
    if (has_avx512() && __builtin_cpu_supports("avx512bf16") && has_tiles()) tables.push_back(&amx::kernels);
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
