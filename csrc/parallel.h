// Threads for the length of one call: those of torch if its runtime can be found, otherwise new ones.
#pragma once

#include <cstdint>
#include <functional>

namespace gradpruner {

// How many of `threads` are worth starting for `items` items that take about `work` simple operations in all.
int worker_count(int threads, int64_t items, double work);

// Calls body(worker, item) for every item, in no fixed order, with worker below `workers`. The calling thread is one of
// the workers. The first exception stops the others and is thrown here.
void parallel_for(int workers, int64_t items, const std::function<void(int worker, int64_t item)>& body);

}  // namespace gradpruner
