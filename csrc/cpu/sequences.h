// Work on packed sequences, shared out over threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace skyrl_mega {

constexpr int64_t kTokensPerTask = 16384;  // about 20 microseconds of work: less is not worth a thread

// Calls task(s) for every sequence s. Threads get equal shares of tokens, not of sequences: a sequence belongs to the thread in whose
// share its first token lies. Empty sequences at the very end belong to nobody and need nothing.
template <class Task>
void for_each_sequence(const at::Tensor& cu_seqlens, int64_t num_tokens, const Task& task) {
  const int64_t* borders = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t num_sequences = cu_seqlens.numel() - 1;
  at::parallel_for(0, num_tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
    int64_t s = std::lower_bound(borders, borders + num_sequences, first) - borders;
    for (; s < num_sequences && borders[s] < last; s++) task(s);
  });
}

}  // namespace skyrl_mega
