// ||b a||_F^2 = sum((b^T b) * (a a^T)): two small Gram matrices per pair. Pairs are spread over threads.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace gradpruner {

void gram_norm(const std::vector<Pair>& pairs, double* norms, int threads) {
  int64_t rank = 0;
  double work = 0;
  for (const Pair& pair : pairs) {
    rank = std::max(rank, pair.rank);
    work += static_cast<double>(pair.rank) * static_cast<double>(pair.rank * (pair.in + pair.out)) / 8;
  }
  const int64_t gram_size = kernels().padded_rank(rank) * kernels().padded_rank(rank);
  const auto count = static_cast<int64_t>(pairs.size());
  const int workers = worker_count(threads, count, work);
  Scratch<double> grams(workers, 2 * gram_size);
  Scratch<double> chunks(workers, kernels().gram_scratch(rank));
  parallel_for(workers, count, [&](int worker, int64_t item) {
    const Pair& pair = pairs[static_cast<size_t>(item)];
    double* of_a = grams.of(worker);
    double* of_b = of_a + gram_size;
    kernels().gram_of_rows(pair.a, pair.rank, pair.in, of_a, chunks.of(worker));
    kernels().gram_of_entries(pair.b, pair.rank, pair.out, of_b, chunks.of(worker));
    const int64_t stride = kernels().padded_rank(pair.rank);
    double norm = 0;
    for (int64_t i = 0; i < pair.rank; ++i) {
      for (int64_t j = 0; j < i; ++j) norm += 2 * of_a[i * stride + j] * of_b[i * stride + j];
      norm += of_a[i * stride + i] * of_b[i * stride + i];
    }
    norms[item] = norm;
  });
}

}  // namespace gradpruner
