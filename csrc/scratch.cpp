#include "scratch.h"

#include <cstddef>
#include <new>

namespace moesaic {
namespace {

constexpr std::align_val_t line{64};

struct Buffer {
    void *memory = nullptr;
    int64_t bytes = 0;

    ~Buffer() { ::operator delete(memory, line); }

    void *at_least(int64_t wanted) {
        if (wanted <= bytes) return memory;
        ::operator delete(memory, line);
        memory = nullptr;
        bytes = 0;
        memory = ::operator new(static_cast<size_t>(wanted), line);
        bytes = wanted;
        return memory;
    }
};

thread_local Buffer buffers[scratch_slots];

}  // namespace

void *scratch(int slot, int64_t bytes) { return buffers[slot].at_least(bytes); }

}  // namespace moesaic
