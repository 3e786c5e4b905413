// Every instruction set that was built and that this processor has, held against the portable one over odd sizes, in
// memory whose ends are guarded. `compare_isas NAME` fails, too, where the instruction set NAME is not among them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"
#include "suite.h"

namespace moesaic {

Floats random_floats(int64_t size, uint32_t seed) {
    Floats x(size);
    uint32_t state = seed * 2654435761u + 12345u;
    for (int64_t i = 0; i < size; ++i) {
        state = state * 1664525u + 1013904223u;
        x[i] = static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
    }
    return x;
}

Halves random_halves(int64_t size, uint32_t seed) {
    const Floats wide = random_floats(size, seed);
    Halves x(size);
    for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &wide[i], 4);
        x[i].bits = static_cast<uint16_t>(bits >> 16);
    }
    return x;
}

template <>
Floats random<float>(int64_t size, uint32_t seed) { return random_floats(size, seed); }
template <>
Halves random<bf16>(int64_t size, uint32_t seed) { return random_halves(size, seed); }

Guarded<int64_t> whole(const std::vector<int64_t> &numbers) {
    Guarded<int64_t> x(static_cast<int64_t>(numbers.size()));
    std::copy(numbers.begin(), numbers.end(), x.data());
    return x;
}

Guarded<int64_t> offsets_of(const std::vector<int64_t> &counts) {
    std::vector<int64_t> offsets = {0};
    for (int64_t count : counts) offsets.push_back(offsets.back() + count);
    return whole(offsets);
}

void Results::expect_same(const Floats &found, const Floats &wanted) {
    expect(found.size() == wanted.size() &&
           !std::memcmp(found.data(), wanted.data(), static_cast<size_t>(found.size()) * sizeof(float)));
}
void Results::add(const Floats &x) { numbers_.insert(numbers_.end(), x.data(), x.data() + x.size()); }
void Results::add(const Bytes &x) { numbers_.insert(numbers_.end(), x.data(), x.data() + x.size()); }
void Results::add(const Halves &x) {
    for (int64_t i = 0; i < x.size(); ++i) {
        const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        numbers_.push_back(value);
    }
}

namespace {

constexpr int several = 3;

Results run(const Operation &operation, int threads) {
    Results results;
    operation(chosen(), threads, results);
    return results;
}

bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

// What is wrong with `found`; empty where nothing is.
std::string compare(const Results &results, const std::vector<float> &wanted, float tolerance) {
    const std::vector<float> &found = results.numbers();
    if (results.broken()) return std::to_string(results.broken()) + " of its own promises are broken";
    float largest = 0.0f;
    for (float x : wanted) largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const float a = found[i], b = wanted[i];
        const bool agree = std::isnan(b)   ? std::isnan(a)
                           : std::isinf(b) ? a == b
                                           : std::abs(a - b) <= tolerance * largest;
        if (!agree)
            return "number " + std::to_string(i) + " is " + std::to_string(a) + ", portable " + std::to_string(b) +
                   ", of at most " + std::to_string(largest);
    }
    return "";
}

}  // namespace

void Suite::begin(const char *group) {
    std::printf("%s\n", group);
    std::fflush(stdout);  // where a guard stops the program, this is the last line
}

void Suite::verdict(const std::string &name, const std::string &fault) {
    ++(fault.empty() ? passed : failed);
    if (!fault.empty()) std::printf("  %s: %s\n", name.c_str(), fault.c_str());
}

void Suite::check(const std::string &name, float tolerance, const Operation &operation) {
    static Pool pool(several);
    use_isa("portable");
    const Results wanted = run(operation, 1);
    for (const std::string &isa : available_isas()) {
        use_isa(isa);
        const Results found = isa == "portable" ? wanted : run(operation, 1);
        verdict(isa + ", " + name, compare(found, wanted.numbers(), tolerance));
        const Pool::Scope scope(pool);
        verdict(isa + ", " + name + ", threads",
                same_bits(run(operation, several).numbers(), found.numbers()) ? "" : "other bits");
    }
}

}  // namespace moesaic

int main(int count, char **arguments) {
    const std::vector<std::string> isas = moesaic::available_isas();
    for (int i = 1; i < count; ++i)
        if (std::find(isas.begin(), isas.end(), arguments[i]) == isas.end()) {
            std::printf("%s was not built, or this processor does not have it\n", arguments[i]);
            return 1;
        }
    for (const std::string &isa : isas) std::printf("%s%s", isa.c_str(), isa == isas.back() ? "\n" : ", ");
    moesaic::Suite suite;
    moesaic::check_packed(suite);
    moesaic::check_packing(suite);
    moesaic::check_rows(suite);
    moesaic::check_attention(suite);
    moesaic::check_company(suite);
    moesaic::check_training(suite);
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(suite.passed),
                static_cast<long long>(suite.failed));
    return suite.failed ? 1 : 0;
}
