// One variant's table of kernels.
#include "entries.h"

#define GRADPRUNER_STRING_OF(name) #name
#define GRADPRUNER_STRING(name) GRADPRUNER_STRING_OF(name)

namespace gradpruner::GRADPRUNER_VARIANT {

extern const Kernels table;
const Kernels table = {
    GRADPRUNER_STRING(GRADPRUNER_VARIANT),
    gram,
    padded_rank,
    gram_scratch,
    square_accumulate,
    add,
    all_finite,
    square_product,
    importance_tile,
    importance_scratch,
    count_between,
    collect,
    histogram,
    merge,
};

}  // namespace gradpruner::GRADPRUNER_VARIANT
