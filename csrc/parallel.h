// The one parallel_for, on the threads of the pool that is current or else on OpenMP's. Every item is computed whole by
// one thread, in an order that does not depend on the number of threads: no sum is ever split, so results are bit-equal
// for any thread count.
#pragma once

#include <cstdint>
#include <new>

#include "pool.h"

namespace moesaic {

// Static: this header is compiled for several instruction sets, whose copies the linker must not merge.
//
// Threads worth waking for `work` units when one thread should have at least `grain` of them.
static inline int threads_for(int64_t work, int64_t grain, int threads) {
    const int64_t useful = work / grain;
    return useful < 2 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// f(i) for i in [0, items), in `chunk`s handed out as threads come free (cores are not equally quick). All that `f` may
// throw is std::bad_alloc.
template <class F>
void parallel_for(int64_t items, int64_t chunk, int threads, const F &f) {
    if (threads <= 1 || items <= chunk) {
        for (int64_t i = 0; i < items; ++i) f(i);
        return;
    }
    if (Pool *pool = Pool::current()) {
        const auto piece = [](const void *context, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) (*static_cast<const F *>(context))(i);
        };
        return pool->run(items, chunk, piece, &f);
    }
    bool failed = false;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
#endif
    for (int64_t i = 0; i < items; ++i) {
        try {
            f(i);
        } catch (...) {  // one that left the loop would end the process
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace moesaic
