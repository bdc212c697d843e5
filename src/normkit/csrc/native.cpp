// What this machine can execute. Compiled kernels choose by it; until there are any, the report of a comparison states it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace nb = nanobind;

namespace {

// From the widest to the narrowest; the last entry always works.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.emplace_back("avx512");
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.emplace_back("avx2");
    }
#endif
    found.emplace_back("baseline");
    return found;
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets this processor executes, from the widest to the narrowest.");
}
