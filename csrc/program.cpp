#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "parallel.h"

namespace moesaic {
namespace {

constexpr std::align_val_t line{64};
constexpr int64_t lane_multiple = 16;  // rows begin on cache lines

}  // namespace

// An exponent of ones: infinite, or no number.
bool is_finite(const float *x, int64_t size) {
    int32_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !found;
}

void Program::Release::operator()(float *memory) const { ::operator delete(memory, line); }

int Program::add_buffer(int64_t width) {
    buffers_.push_back({0});
    const int number = static_cast<int>(buffers_.size()) - 1;
    widen(number, width);
    return number;
}

void Program::widen(int buffer, int64_t width) {
    int64_t &own = buffers_.at(static_cast<size_t>(buffer)).width;
    own = std::max(own, (width + lane_multiple - 1) / lane_multiple * lane_multiple);
    room_ = 0;
}

RowsOf Program::rows(int buffer, int64_t offset) {
    const Buffer &found = buffers_.at(static_cast<size_t>(buffer));
    return {found.memory + offset, found.width};
}

int Program::begin_section() {
    starts_.push_back(steps_.size());
    return sections() - 1;
}

Program::Steps Program::steps_of(int section) {
    const auto number = static_cast<size_t>(section);
    const size_t end = number + 1 < starts_.size() ? starts_[number + 1] : steps_.size();
    return {steps_.data() + starts_.at(number), steps_.data() + end};
}

int64_t Program::bytes() const {
    int64_t floats = 0;
    for (const Buffer &buffer : buffers_) floats += buffer.width * room_;
    return floats * 4;
}

void Program::reset_times() {
    for (Step &step : steps_) step.seconds = 0;
}

void Program::make_room(int64_t tokens) {
    if (tokens <= room_) return;
    memory_.clear();
    room_ = 0;
    for (Buffer &buffer : buffers_) {
        const auto bytes = static_cast<size_t>(buffer.width * tokens * 4);
        buffer.memory = static_cast<float *>(::operator new(bytes, line));
        memory_.emplace_back(buffer.memory);
    }
    room_ = tokens;
}

void Program::check(const Batch &batch, int64_t texts, int64_t logits) const {
    const auto require = [](bool fine, const char *what) {
        if (!fine) throw std::invalid_argument(what);
    };
    require(logits == logits_, "logits have another width than the head");
    int64_t blocks = caches_.empty() ? 0 : INT64_MAX;
    for (const PagedCache &cache : caches_) blocks = std::min(blocks, cache.num_blocks);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        require(batch.token_ids[t] >= 0 && batch.token_ids[t] < vocab_, "token_ids are not all in the vocabulary");
        const int64_t text = batch.text_of[t], position = batch.positions[t];
        require(text >= 0 && text < texts, "text_of names texts that have no table");
        require(position >= 0 && position < positions_ && position / block_tokens < batch.table_width,
                "positions reach past the tables, or past what rotations were made for");
    }
    for (const Choices::Layer &layer : choices_.layers)
        require(layer.dictated.empty() || static_cast<int64_t>(layer.dictated.size()) == batch.tokens * layer.columns,
                "choices were dictated for another number of tokens");
    for (int64_t i = 0; i < texts * batch.table_width; ++i)
        require(batch.tables[i] >= 0 && batch.tables[i] < blocks, "tables name blocks that the caches do not have");
}

void Program::begin(const Batch &batch) {
    make_room(batch.tokens);
    choices_.newest.clear();
    choices_.newest_tokens = 0;
}

bool Program::run(const Batch &batch, int section) {
    using Clock = std::chrono::steady_clock;
    begin(batch);
    const Pool::Scope on_own_threads(pool_);
    auto before = Clock::now();
    for (Step &step : steps_of(section)) {
        step.run(batch, *this);
        const auto after = Clock::now();
        step.seconds += std::chrono::duration<double>(after - before).count();
        before = after;
    }
    choices_.newest_tokens = section ? 0 : batch.tokens;
    std::atomic<bool> fine{true};
    parallel_for(batch.outputs, 1, threads(), [&](int64_t row) {
        if (!is_finite(batch.logits + row * logits_, logits_)) fine = false;
    });
    return fine;
}

NotFinite Program::run_checked(const Batch &batch, int section) {
    begin(batch);
    const Pool::Scope on_own_threads(pool_);
    for (Step &step : steps_of(section)) {
        step.run(batch, *this);
        if (step.buffer < 0) continue;
        const RowsOf written = rows(step.buffer);
        for (int64_t row = 0; row < batch.tokens; ++row)
            if (!is_finite(written.row(row) + step.offset, step.size))
                return {step.part, step.layer, row,
                        step.broken_experts ? step.broken_experts(*this, row) : std::vector<int64_t>{}};
    }
    return {};
}

}  // namespace moesaic
