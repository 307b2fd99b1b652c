// Every op of ops.h against naive loops, made to be run under sanitizers: every instruction set of this machine, one
// thread and four, sizes around the edges of chunks and tiles, four dtypes, misaligned arrays, hostile values.
//
// Arguments: "all", or "threads" to leave out what runs on one thread, which tells a race detector nothing; then the
// instruction sets. Prints what ran; writes every difference to stderr and exits with 1 if there was one.
#include "exercise_cases.h"
#include "exercise_gradients.h"
#include "exercise_merging.h"
#include "exercise_selection.h"
#include "exercise_single_weights.h"

namespace {

// ---- threads

// What a body throws reaches the caller after every thread has ended, as when memory runs out in one of them.
void exceptions() {
  mode = "parallel_for";
  std::vector<int64_t> seen(1000);
  bool caught = false;
  try {
    parallel_for(4, static_cast<int64_t>(seen.size()), [&](int, int64_t item) {
      seen[static_cast<size_t>(item)] = item;
      if (item == 500) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  check(caught, "the exception was lost");
  check(seen[500] == 500, "an item was lost");
}

// Python calls without its lock: callers share what they read, and nothing that they write.
void callers_at_once() {
  const auto in_order = [](const std::vector<Case>& cases) {
    for (const Case& item : cases) item.run(item.op + " " + item.name, 4);
  };
  const std::vector<Case> backwards(shared_cases.rbegin(), shared_cases.rend());
  for (const std::string& variant : variants) {
    select_variant(variant.c_str());
    mode = variant + ", callers at once";
    for (const std::vector<Case>& second : {shared_cases, backwards}) {
      std::thread first(in_order, std::cref(shared_cases));
      in_order(second);
      first.join();
    }
  }
}

}  // namespace

int main(int argument_count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + argument_count);
  if (words.size() < 2 || (words[0] != "all" && words[0] != "threads")) {
    std::fprintf(stderr, "usage: exercise all|threads INSTRUCTION_SET...\n");
    return 2;
  }
  threads_only = words[0] == "threads";
  for (size_t i = 1; i < words.size(); ++i) {
    try {
      variants.emplace_back(select_variant(words[i].c_str()));
    } catch (const std::invalid_argument& reason) {
      std::printf("%s\n", reason.what());
    }
  }
  const std::pair<const char*, void (*)()> parts[] = {
      {"elementwise", elementwise}, {"weight_gradient", weight_gradients}, {"gram_norm", gram_norms},
      {"selection", selections},    {"outer", outers},                     {"merge", merges},
      {"single weights", single_weights}, {"exceptions", exceptions},   {"callers at once", callers_at_once}};
  for (const auto& [name, run] : parts) {
    const int64_t before = checks;
    run();
    std::printf("%s: %lld checks\n", name, static_cast<long long>(checks - before));
    std::fflush(stdout);
  }
  for (const std::string& variant : variants) std::printf("ran %s\n", variant.c_str());
  for (const Case& item : shared_cases) std::printf("shared %s\n", item.op.c_str());
  std::printf("%lld failures\n", static_cast<long long>(failures.load()));
  return failures == 0 ? 0 : 1;
}
