#include "pool.h"

#include <chrono>
#include <new>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace moesaic {
namespace {

using Clock = std::chrono::steady_clock;
// Longer than what lies between two loops of a step, shorter than what lies between two steps of a busy server.
constexpr auto looking = std::chrono::microseconds(100);
constexpr int looks_between_clocks = 64;
constexpr int bits_of_piece = 20;
constexpr int64_t most_pieces = (1 << bits_of_piece) - 1;
constexpr uint64_t most_loops = 1ull << (64 - 2 * bits_of_piece);

uint64_t share_of(uint64_t loop, int64_t begin, int64_t end) {
    return (loop << bits_of_piece | static_cast<uint64_t>(begin)) << bits_of_piece | static_cast<uint64_t>(end);
}

thread_local Pool *current_pool = nullptr;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks until `found` or for a while; whether it found.
template <class F>
bool look(const F &found) {
    const auto until = Clock::now() + looking;
    do {
        for (int i = 0; i < looks_between_clocks; ++i) {
            if (found()) return true;
            pause();
        }
    } while (Clock::now() < until);
    return found();
}

}  // namespace

Pool *Pool::current() { return current_pool; }
Pool::Scope::Scope(Pool &pool) : before_(current_pool) { current_pool = &pool; }
Pool::Scope::~Scope() { current_pool = before_; }

Pool::Pool(int threads) : shares_(static_cast<size_t>(threads > 1 ? threads : 1)) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
}

// A piece of what is left of a share, its first for whom it belongs to and its last for others; whether there was one.
bool Pool::take_from(Share &share, uint64_t loop, bool own) {
    uint64_t left = share.left.load();
    int64_t begin, end;
    do {
        begin = static_cast<int64_t>(left >> bits_of_piece) & most_pieces, end = static_cast<int64_t>(left) & most_pieces;
        if (left >> 2 * bits_of_piece != loop || begin == end) return false;
    } while (!share.left.compare_exchange_weak(left, share_of(loop, own ? begin + 1 : begin, own ? end : end - 1)));
    // This loop goes on until the piece is done, so what is read now is its own.
    const int64_t piece = own ? begin : end - 1, chunk = chunk_.load(), items = items_.load();
    const int64_t first = piece * chunk, last = first + chunk < items ? first + chunk : items;
    try {
        body_.load()(context_.load(), first, last);
    } catch (...) {  // one that left a thread would end the process
        failed_ = true;
    }
    finished_.fetch_add(1);
    return true;
}

bool Pool::take(int thread, uint64_t loop) {
    const int count = static_cast<int>(shares_.size());
    for (int i = 0; i < count; ++i)
        if (take_from(shares_[static_cast<size_t>((thread + i) % count)], loop, i == 0)) return true;
    return false;
}

void Pool::run(int64_t items, int64_t chunk, Body body, const void *context) {
    if ((items + chunk - 1) / chunk > most_pieces) chunk = (items + most_pieces - 1) / most_pieces;
    const int64_t pieces = (items + chunk - 1) / chunk, threads = static_cast<int64_t>(shares_.size());
    const uint64_t loop = (loop_.load() + 1) % most_loops;
    body_ = body;  // nothing of the loop before is left to take
    context_ = context;
    items_ = items;
    chunk_ = chunk;
    finished_ = 0;
    failed_ = false;
    for (int64_t i = 0; i < threads; ++i)
        shares_[static_cast<size_t>(i)].left = share_of(loop, pieces * i / threads, pieces * (i + 1) / threads);
    loop_ = loop;
    if (asleep_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    while (take(0, loop)) {
    }
    const auto done = [&] { return finished_.load() == pieces; };
    while (!done()) {
        if (!look(done)) std::this_thread::yield();
    }
    if (failed_) throw std::bad_alloc();
}

void Pool::sleep(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return stopping_.load() || loop_.load() != seen; });
    asleep_.fetch_sub(1);
}

void Pool::work(int thread) {
    while (!stopping_) {
        const uint64_t seen = loop_.load();
        while (take(thread, seen)) {
        }
        const auto news = [&] { return stopping_.load() || loop_.load() != seen; };
        if (!look(news)) sleep(seen);
    }
}

}  // namespace moesaic
