#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace gradpruner {

namespace {

// Starting a thread costs about as much as this many simple operations.
constexpr double kWorkPerThread = 1 << 17;

}  // namespace

int worker_count(int threads, int64_t items, double work) {
  const double useful = std::min(work / kWorkPerThread, static_cast<double>(items));
  return static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(std::max(threads, 1))));
}

void parallel_for(int workers, int64_t items, const std::function<void(int worker, int64_t item)>& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&](int worker) {
    try {
      for (int64_t item = next++; item < items; item = next++) body(worker, item);
    } catch (...) {
      next = items;
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(std::max(workers - 1, 0)));
  try {
    for (int worker = 1; worker < workers; ++worker) threads.emplace_back(run, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do the work.
  }
  run(0);
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gradpruner
