// Ops on single weights: importance, pruning by groups, masks.
#pragma once

#include "exercise_cases.h"

namespace {

// ---- single weights

// What a weight (out, in) is judged by: neither norms nor grads, norms, grads, both.
struct Judged {
  Elements weight, norms, grads;
  int64_t out, in;
  bool by_norms, by_grads;

  static constexpr float kAlpha = 0.5f;

  WeightImportance of(Elements& written) const {
    WeightImportance call{};
    call.weight = written.data();
    call.dtype = weight.dtype();
    call.out = out;
    call.in = in;
    call.norms = by_norms ? norms.floats() : nullptr;
    call.grads = by_grads ? grads.floats() : nullptr;
    call.alpha = kAlpha;
    return call;
  }

  // Every operation rounded to float; what is not above zero is zero.
  std::vector<float> naive() const {
    std::vector<float> found(static_cast<size_t>(out * in));
    for (int64_t i = 0; i < out * in; ++i) {
      volatile float value = std::fabs(static_cast<float>(weight.get(i)));
      if (by_grads) {
        volatile float factor = kAlpha * static_cast<float>(grads.get(i));
        if (by_norms) factor = static_cast<float>(norms.get(i % in)) + factor;
        value = value * factor;
      } else if (by_norms) {
        value = value * static_cast<float>(norms.get(i % in));
      }
      found[static_cast<size_t>(i)] = value > 0 ? value : 0.0f;
    }
    return found;
  }

  std::string name() const {
    return std::string(name_of(weight.dtype())) + " " + std::to_string(out) + "x" + std::to_string(in) +
           (by_norms ? " norms" : "") + (by_grads ? " grads" : "");
  }
};

Judged judged(DType dtype, int64_t out, int64_t in, int by, Draw draw) {
  return {make(dtype, out * in, 1, draw, 90), make(DType::float32, in, 1, special, 91),
          make(DType::float32, out * in, 1, special, 92), out, in, (by & 1) != 0, (by & 2) != 0};
}

bool is_large(const Judged& item) { return item.out * item.in >= kLarge; }

void weight_importance_case(const Judged& item) {
  exercise({"weight_importance", item.name(), is_large(item),
            [=, expected = copy_of(item.naive(), 1)](const std::string& what, int threads) {
              Elements weight = item.weight, found(DType::float32, item.out * item.in, 1);
              weight_importance(item.of(weight), found.floats(), threads);
              check_same(found, expected, false, what);
            }});
}

// Which entries stay, by ranking every group.
std::vector<bool> kept_of(const std::vector<float>& importance, int64_t kept, int64_t group) {
  std::vector<bool> stays(importance.size());
  std::vector<size_t> places(static_cast<size_t>(group));
  for (size_t start = 0; start < importance.size(); start += places.size()) {
    std::iota(places.begin(), places.end(), start);
    std::stable_sort(places.begin(), places.end(), [&](size_t x, size_t y) { return importance[x] > importance[y]; });
    for (int64_t n = 0; n < kept; ++n) stays[places[static_cast<size_t>(n)]] = true;
  }
  return stays;
}

std::vector<uint8_t> packed(const std::vector<bool>& stays, int64_t out, int64_t in) {
  std::vector<uint8_t> mask(static_cast<size_t>(out * ((in + 7) / 8)));
  for (int64_t i = 0; i < out * in; ++i) {
    const auto byte = static_cast<size_t>(i / in * ((in + 7) / 8) + i % in / 8);
    if (stays[static_cast<size_t>(i)]) mask[byte] = static_cast<uint8_t>(mask[byte] | 1 << i % in % 8);
  }
  return mask;
}

Elements pruned(const Elements& weight, const std::vector<bool>& stays) {
  Elements expected = weight;
  for (int64_t i = 0; i < weight.count(); ++i) {
    if (!stays[static_cast<size_t>(i)]) expected.set(i, 0);
  }
  return expected;
}

void prune_groups_case(const Judged& item, int64_t kept, int64_t group) {
  const std::vector<bool> stays = kept_of(item.naive(), kept, group);
  const std::string name = item.name() + " " + std::to_string(kept) + " of " + std::to_string(group);
  exercise({"prune_groups", name, is_large(item),
            [=, expected = pruned(item.weight, stays), bits = packed(stays, item.out, item.in)](
                const std::string& what, int threads) {
              Elements weight = item.weight;
              std::vector<uint8_t> mask(bits.size(), 0xAA);
              prune_groups(item.of(weight), kept, group, mask.data(), threads);
              check_same(weight, expected, false, what);
              check(mask == bits, what + ": the mask");
            }});
}

void apply_mask_case(const Judged& item) {
  Random random(93);
  std::vector<bool> stays(static_cast<size_t>(item.out * item.in));
  for (size_t i = 0; i < stays.size(); ++i) stays[i] = random() % 3 == 0;
  exercise({"apply_mask", item.name(), is_large(item),
            [=, expected = pruned(item.weight, stays), bits = packed(stays, item.out, item.in)](
                const std::string& what, int threads) {
              Elements weight = item.weight;
              apply_mask(weight.data(), weight.dtype(), item.out, item.in, bits.data(), threads);
              check_same(weight, expected, false, what);
            }});
}

// Groups of every size around those that are ranked in another way, in rows that end inside a byte or with one.
void single_weights() {
  const std::pair<int64_t, int64_t> shapes[] = {{0, 5}, {5, 0}, {1, 1}, {3, 7}, {2, 8}, {3, 65}, {600, 1003}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      for (int by = 0; by < 4; ++by) weight_importance_case(judged(dtype, out, in, by, special));
    }
  }
  const std::pair<int64_t, int64_t> groups[] = {{1, 13}, {2, 4},  {3, 3},  {4, 5},  {8, 3},    {17, 2},
                                                {31, 3}, {32, 2}, {33, 2}, {64, 1}, {65, 3}, {1003, 2}};
  for (const DType dtype : kDTypes) {
    for (const auto& [group, count] : groups) {
      for (const int64_t kept : {int64_t{0}, int64_t{1}, group / 2, group}) {
        if (kept > group) continue;
        prune_groups_case(judged(dtype, 3, group * count, 3, special), kept, group);
        prune_groups_case(judged(dtype, 3, group * count, 0, whole), kept, group);
      }
    }
    prune_groups_case(judged(dtype, 600, 1004, 1, plain), 2, 4);
    prune_groups_case(judged(dtype, 600, 1003, 1, plain), 501, 1003);
  }
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) apply_mask_case(judged(dtype, out, in, 0, special));
  }
}

}  // namespace
