// Ops that walk over memory once, in chunks spread over threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"

namespace gradpruner {

namespace {

constexpr int64_t kChunk = 1 << 16;

const void* offset(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}

void* offset(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * element_size(dtype);
}

// Calls body(first, length, chunk) for every chunk of `count` entries.
template <class Body>
void for_chunks(int64_t count, double work_per_entry, int threads, const Body& body) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  const int workers = worker_count(threads, chunks, static_cast<double>(count) * work_per_entry);
  parallel_for(workers, chunks, [&](int, int64_t chunk) {
    const int64_t first = chunk * kChunk;
    body(first, std::min(kChunk, count - first), chunk);
  });
}

}  // namespace

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::float64:
      return 8;
    default:
      return 4;
  }
}

void square_accumulate(float* igia, Array grad, int64_t count, int threads) {
  for_chunks(count, 1, threads, [&](int64_t first, int64_t length, int64_t) {
    kernels().square_accumulate(igia + first, {offset(grad.data, grad.dtype, first), grad.dtype}, length);
  });
}

bool all_finite(Array data, int64_t count, int threads) {
  std::atomic<bool> finite{true};
  for_chunks(count, 0.5, threads, [&](int64_t first, int64_t length, int64_t) {
    if (finite && !kernels().all_finite({offset(data.data, data.dtype, first), data.dtype}, length)) finite = false;
  });
  return finite;
}

void sign_merge(void* weight, DType dtype, int64_t count, const std::vector<Donor>& donors, int threads) {
  for_chunks(count, 2.0 * static_cast<double>(donors.size() + 1), threads,
             [&](int64_t first, int64_t length, int64_t) {
               std::vector<MergeTerm> terms;
               for (const Donor& donor : donors) {
                 terms.push_back({offset(donor.weight, dtype, first), donor.igia + first, donor.threshold.value,
                                  donor.threshold.index - first, donor.scale});
               }
               kernels().merge(offset(weight, dtype, first), dtype, length, terms.data(),
                               static_cast<int64_t>(terms.size()));
             });
}

}  // namespace gradpruner
