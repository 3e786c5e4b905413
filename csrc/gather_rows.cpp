// Rows of tokens, copied to where their experts read them.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace moesaic {

void gather_rows(const void *x, const int64_t *token_ids, void *rows_out, int64_t rows, int64_t row_bytes,
                 int threads) {
    const char *from = static_cast<const char *>(x);
    char *to = static_cast<char *>(rows_out);
    parallel_for(rows, 8, threads_for(rows * row_bytes, 128 << 10, threads), [=](int64_t row) {
        std::memcpy(to + row * row_bytes, from + token_ids[row] * row_bytes, static_cast<size_t>(row_bytes));
    });
}

}  // namespace moesaic
