// Asking for weights before they are read: left alone the processor looks ahead to the end of 4 KB, and not while it
// computes from its first cache. What lies behind the last weights is asked for in vain, which is allowed.
#pragma once

#include <cstdint>

#include "always_inline.h"

namespace moesaic {

// Inlined: GCC takes a function that does only this for one without effect, and drops its calls.
static MOESAIC_INLINE void fetch(const uint8_t *p, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
#else
    (void)p, (void)bytes;
#endif
}

// While weights stream past once.
static MOESAIC_INLINE void fetch_ahead(const uint8_t *p, int64_t bytes) { fetch(p + 4096, bytes); }

// While a piece meets many rows: the next piece, a part at a time.
class FetchInParts {
public:
    FetchInParts(const uint8_t *next, int64_t bytes, int64_t parts)
        : next_(next), part_bytes_((bytes / parts + 63) / 64 * 64) {}

    void part() {
        fetch(next_, part_bytes_);
        next_ += part_bytes_;
    }

private:
    const uint8_t *next_;
    int64_t part_bytes_;
};

}  // namespace moesaic
