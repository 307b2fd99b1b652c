#include "parallel.h"

#include <dlfcn.h>

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

// The function of the OpenMP runtime that torch has loaded, under the name that it has in every such runtime. The
// threads of torch wait for more work for milliseconds after each loop, and keep their cores busy. Other threads would
// have to share the cores with them.
using Team = void(void (*body)(void*), void* argument, unsigned threads, unsigned flags);
Team* waiting_team() {
  static Team* const team = reinterpret_cast<Team*>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
}

}  // namespace

int worker_count(int threads, int64_t items, double work) {
  const double useful = std::min(work / kWorkPerThread, static_cast<double>(items));
  return static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(std::max(threads, 1))));
}

void parallel_for(int workers, int64_t items, const std::function<void(int worker, int64_t item)>& body) {
  std::atomic<int> next_worker{0};
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  std::function<void()> run = [&] {
    const int worker = next_worker++;
    try {
      for (int64_t item = next++; item < items; item = next++) body(worker, item);
    } catch (...) {
      next = items;
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  if (workers <= 1) {
    run();
  } else if (Team* team = waiting_team()) {
    team([](void* call) { (*static_cast<std::function<void()>*>(call))(); }, &run, static_cast<unsigned>(workers), 0);
  } else {
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(workers - 1));
    try {
      for (int worker = 1; worker < workers; ++worker) threads.emplace_back(run);
    } catch (const std::system_error&) {
      // The system gives no more threads. Those that started do the work.
    }
    run();
    for (std::thread& thread : threads) thread.join();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gradpruner
