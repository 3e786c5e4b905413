// Operations run by every instruction set, and their results held against the portable one's.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "guarded.h"

namespace moesaic {

using Floats = Guarded<float>;
using Halves = Guarded<bf16>;
using Bytes = Guarded<uint8_t>;

// Numbers in [-1, 1), the same for the same seed.
Floats random_floats(int64_t size, uint32_t seed);
Halves random_halves(int64_t size, uint32_t seed);
template <class T>
Guarded<T> random(int64_t size, uint32_t seed);

Guarded<int64_t> whole(const std::vector<int64_t> &numbers);
// [0, counts[0], counts[0] + counts[1], ...]
Guarded<int64_t> offsets_of(const std::vector<int64_t> &counts);

// What an operation wrote, and whether it kept what it promises of itself.
class Results {
public:
    void expect(bool kept) { broken_ += !kept; }
    // The same numbers, bit for bit.
    void expect_same(const Floats &found, const Floats &wanted);
    void add(const Floats &x);
    void add(const Halves &x);
    void add(const Bytes &x);
    void add(float x) { numbers_.push_back(x); }

    const std::vector<float> &numbers() const { return numbers_; }
    int64_t broken() const { return broken_; }

private:
    std::vector<float> numbers_;
    int64_t broken_ = 0;
};

using Operation = std::function<void(const Kernels &kernels, int threads, Results &results)>;

class Suite {
public:
    // Runs the operation with each instruction set, on one thread and on several, which must agree to the bit. No number
    // may differ from the portable one by more than `tolerance` times the largest; what is not finite must be the same;
    // and what the operation expects of itself must hold, of the portable one, too.
    void check(const std::string &name, float tolerance, const Operation &operation);

    void begin(const char *group);
    int64_t passed = 0, failed = 0;

private:
    void verdict(const std::string &name, const std::string &fault);
};

constexpr float of_fp32 = 2e-5f, of_bf16 = 1.0f / 64, exact = 0.0f;

void check_packed(Suite &suite);
void check_packing(Suite &suite);
void check_rows(Suite &suite);
void check_attention(Suite &suite);
void check_training(Suite &suite);
void check_company(Suite &suite);

}  // namespace moesaic
