// Memory that ends where a page begins that nobody may touch: an access past the end stops the program, also one by an
// instruction that sanitizers do not see (masked loads, the tile unit).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace moesaic {

template <class T>
class Guarded {
public:
    explicit Guarded(int64_t size) : size_(size) {
        const int64_t page = sysconf(_SC_PAGESIZE), bytes = size * static_cast<int64_t>(sizeof(T));
        const int64_t open = (bytes + page - 1) / page * page;
        mapped_ = static_cast<size_t>(open + page);
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char *end = static_cast<char *>(memory_) + open;
        if (memory_ == MAP_FAILED || mprotect(end, static_cast<size_t>(page), PROT_NONE)) {
            std::perror("no guarded memory");
            std::exit(2);
        }
        data_ = reinterpret_cast<T *>(end - bytes);
    }
    Guarded(const Guarded &other) : Guarded(other.size_) {
        std::memcpy(data_, other.data_, static_cast<size_t>(size_) * sizeof(T));
    }
    Guarded &operator=(const Guarded &) = delete;
    ~Guarded() { munmap(memory_, mapped_); }

    T *data() const { return data_; }
    int64_t size() const { return size_; }
    T &operator[](int64_t i) const { return data_[i]; }

private:
    int64_t size_;
    size_t mapped_;
    void *memory_;
    T *data_;
};

}  // namespace moesaic
