// Uninitialised memory for each worker, aligned to a cache line so that workers do not share one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace gradpruner {

template <class T>
class Scratch {
 public:
  Scratch(int workers, int64_t size) {
    for (int worker = 0; worker < workers; ++worker) {
      const auto bytes = static_cast<size_t>(size) * sizeof(T);
      blocks_.emplace_back(static_cast<T*>(::operator new(bytes, kAlignment)));
    }
  }
  T* of(int worker) { return blocks_[static_cast<size_t>(worker)].get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* block) const { ::operator delete(block, kAlignment); }
  };
  std::vector<std::unique_ptr<T, Free>> blocks_;
};

}  // namespace gradpruner
