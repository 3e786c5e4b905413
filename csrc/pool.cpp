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
constexpr uint64_t one_job = 1ull << 32;

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

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
}

bool Pool::has_work(uint64_t ticket) const { return static_cast<uint32_t>(ticket) < pieces_.load(); }

// One piece of the job that `ticket` belongs to; whether there was one. A ticket that is out of date takes nothing: the
// number of its job has changed.
bool Pool::take(uint64_t ticket) {
    if (!has_work(ticket)) return false;
    const Body body = body_.load();
    const void *context = context_.load();
    const int64_t items = items_.load(), chunk = chunk_.load();
    if (!ticket_.compare_exchange_strong(ticket, ticket + 1)) return true;  // another took it: look again
    const int64_t begin = static_cast<int64_t>(static_cast<uint32_t>(ticket)) * chunk;
    try {
        body(context, begin, begin + chunk < items ? begin + chunk : items);
    } catch (...) {  // one that left a thread would end the process
        failed_ = true;
    }
    finished_.fetch_add(1);
    return true;
}

void Pool::run(int64_t items, int64_t chunk, Body body, const void *context) {
    constexpr int64_t most = UINT32_MAX - 1;
    if ((items + chunk - 1) / chunk > most) chunk = (items + most - 1) / most;
    const int64_t pieces = (items + chunk - 1) / chunk;
    const uint64_t number = (ticket_.load() & ~(one_job - 1)) + one_job;
    ticket_ = number | UINT32_MAX;  // closed, so that nobody takes half of what is written next
    body_ = body;
    context_ = context;
    items_ = items;
    chunk_ = chunk;
    pieces_ = static_cast<uint32_t>(pieces);
    finished_ = 0;
    failed_ = false;
    ticket_ = number;
    if (asleep_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    while (take(ticket_.load())) {
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
    wake_.wait(lock, [&] { return stopping_.load() || ticket_.load() != seen; });
    asleep_.fetch_sub(1);
}

void Pool::work() {
    while (!stopping_) {
        uint64_t seen = ticket_.load();
        while (take(seen)) seen = ticket_.load();
        const auto news = [&] { return stopping_.load() || ticket_.load() != seen; };
        if (!look(news)) sleep(seen);
    }
}

}  // namespace moesaic
