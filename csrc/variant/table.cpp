// One variant's table of kernels.
#include "entries.h"

#define GRADPRUNER_STRING_OF(name) #name
#define GRADPRUNER_STRING(name) GRADPRUNER_STRING_OF(name)

namespace gradpruner::GRADPRUNER_VARIANT {

extern const Kernels table;
const Kernels table = {
    GRADPRUNER_STRING(GRADPRUNER_VARIANT),
    gram_of_rows,
    gram_of_entries,
    padded_rank,
    gram_scratch,
    square_accumulate,
    all_finite,
    weight_gradient_tile,
    weight_gradient_scratch,
    add_importance,
    importance_tile,
    importance_scratch,
    count_between,
    collect,
    histogram,
    weight_importance,
    prune_rows,
    apply_mask,
    merge,
};

}  // namespace gradpruner::GRADPRUNER_VARIANT
