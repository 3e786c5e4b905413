// Threads that share the items of one loop after another: the engine's own, beside torch's OpenMP.
//
// Each thread has a share of its own, consecutive items that it takes from the front, so that what they read is one
// stream; who has done with its share takes from the backs of the others'. A worker looks for work for a short while
// and then sleeps, so an engine between two steps takes no processor. Nobody waits for a worker that holds no item:
// where another process has taken a core, the others go on without it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moesaic {

class Pool {
public:
    // f(context, begin, end) for a piece of the items.
    using Body = void (*)(const void *context, int64_t begin, int64_t end);

    // threads: with the one that calls `run`, at least 1.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // All items, `chunk` at a time, in whatever order. All that `body` may throw is std::bad_alloc. One caller at a
    // time, and no loop within a loop.
    void run(int64_t items, int64_t chunk, Body body, const void *context);

    // The pool that the loops of this thread run on; null: OpenMP's.
    static Pool *current();

    // Makes a pool the current one of this thread while it lives.
    class Scope {
    public:
        explicit Scope(Pool &pool);
        ~Scope();

    private:
        Pool *before_;
    };

private:
    // Pieces of one thread that nobody has taken yet, of the loop with this number: 24 bits, and 20 for the first and for
    // what is behind the last. Whoever takes one changes all three in one go, so that a share of another loop is never
    // taken for this one's.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };

    void work(int thread);
    bool take(int thread, uint64_t loop);
    bool take_from(Share &share, uint64_t loop, bool own);
    void sleep(uint64_t seen);

    // What to do in the loop of this number.
    std::atomic<Body> body_{nullptr};
    std::atomic<const void *> context_{nullptr};
    std::atomic<int64_t> items_{0}, chunk_{1};
    std::vector<Share> shares_;
    alignas(64) std::atomic<uint64_t> loop_{0};
    alignas(64) std::atomic<int64_t> finished_{0};  // pieces
    std::atomic<bool> failed_{false};
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace moesaic
