// Chooses the instruction set: at load time by what the machine has, or by name.
#ifdef GRADPRUNER_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gradpruner {

namespace portable {
extern const Kernels table;
}
#ifdef GRADPRUNER_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef GRADPRUNER_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef GRADPRUNER_AVX512BF16
namespace avx512bf16 {
extern const Kernels table;
}
#endif
#ifdef GRADPRUNER_AMX
namespace amx {
extern const Kernels table;
}
#endif

namespace {

struct Variant {
  const Kernels* table;
  bool (*supported)();
};

#ifdef GRADPRUNER_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// A compiler may lack one variant and know a better one. The better one needs what the other needs, and more.
#if defined(GRADPRUNER_AVX512) || defined(GRADPRUNER_AVX512BF16) || defined(GRADPRUNER_AMX)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif
#if defined(GRADPRUNER_AVX512BF16) || defined(GRADPRUNER_AMX)
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef GRADPRUNER_AMX
// On Linux, a process must ask for permission to use the registers of the matrix unit.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
bool has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}
#endif

// Best first.
const Variant kVariants[] = {
#ifdef GRADPRUNER_AMX
    {&amx::table, has_amx},
#endif
#ifdef GRADPRUNER_AVX512BF16
    {&avx512bf16::table, has_avx512bf16},
#endif
#ifdef GRADPRUNER_AVX512
    {&avx512::table, has_avx512},
#endif
#ifdef GRADPRUNER_AVX2
    {&avx2::table, has_avx2},
#endif
    {&portable::table, [] { return true; }},
};

const Kernels* choose(const std::string& name) {
  std::string usable;
  for (const Variant& variant : kVariants) {
    if (!variant.supported()) continue;
    if (name.empty() || name == variant.table->name) return variant.table;
    usable += (usable.empty() ? "" : ", ") + std::string(variant.table->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; this machine and build have " +
                              usable);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{choose("")};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(); }

const char* select_variant(const char* name) {
  const Kernels* table = choose(name);
  current().store(table);
  return table->name;
}

}  // namespace gradpruner
