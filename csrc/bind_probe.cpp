// The bandwidth probe as Python sees it: threads like the engine's that read memory from end to end.
#include <chrono>

#include "array_checks.h"
#include "parallel.h"

namespace moesaic {
namespace {

// What a thread reads at once: one linear stream, long enough that the processor's prefetching runs ahead all the way,
// short enough that a slow core does not keep the others waiting.
constexpr int64_t piece_bytes = 8 << 20;

class ReadProbe {
public:
    explicit ReadProbe(int threads) : pool_(threads) {}

    double seconds(const Array &memory) {
        check("memory", memory, {Kind::u8}, {any});
        const int64_t bytes = size(memory, 0);
        if (bytes % 64) refuse("memory", "is not a multiple of 64 bytes");
        const auto *words = data<uint64_t>(memory);
        const int64_t pieces = (bytes + piece_bytes - 1) / piece_bytes, words_at_once = piece_bytes / 8;
        nb::gil_scoped_release release;
        const Pool::Scope on_own_threads(pool_);
        const auto before = std::chrono::steady_clock::now();
        parallel_for(pieces, 1, pool_.threads(), [&](int64_t piece) {
            const int64_t begin = piece * words_at_once, left = bytes / 8 - begin;
            sum_ += chosen().read_words(words + begin, left < words_at_once ? left : words_at_once);
        });
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    }

private:
    Pool pool_;
    std::atomic<uint64_t> sum_{0};  // nobody reads it; without it the reading could be left out
};

}  // namespace

void bind_probe(nb::module_ &m) {
    nb::class_<ReadProbe>(m, "ReadProbe", "Threads that read memory, as fast as it gives it.")
        .def(nb::init<int>(), nb::arg("threads"))
        .def("seconds", &ReadProbe::seconds, nb::arg("memory"), "To read all of it once.");
}

}  // namespace moesaic
