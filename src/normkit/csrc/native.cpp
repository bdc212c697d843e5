// What this machine can execute, and the kernels by instruction set. Tensors come as addresses: they cost nothing to pass.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nb = nanobind;
using namespace normkit;

namespace {

// From the widest to the narrowest; the last entry always works.
const std::vector<const Table*>& tables() {
    static const std::vector<const Table*> found = [] {
        std::vector<const Table*> list;
#if defined(NORMKIT_X86)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            list.push_back(&table_avx512);
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            list.push_back(&table_avx2);
        }
#endif
        list.push_back(&table_baseline);
        return list;
    }();
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Table* table : tables()) names.emplace_back(table->name);
    return names;
}

template <class P>
P* at(std::uintptr_t address) {
    return reinterpret_cast<P*>(address);
}

using Address = std::uintptr_t;

Tensors tensors(Address x, Address residual, Address gamma, Address beta, Address var, Address mean, Address rest,
                double eps, bool center, bool given, int type, int activation, int threads) {
    Tensors t{};
    t.x = at<const void>(x);
    t.residual = at<const void>(residual);
    t.gamma = at<const float>(gamma);
    t.beta = at<const float>(beta);
    t.mean = at<float>(mean);
    t.rest = at<float>(rest);
    t.var = at<float>(var);
    t.eps = eps;
    t.center = center;
    t.given = given;
    t.type = type;
    t.activation = activation;
    t.threads = threads < 1 ? 1 : threads;
    return t;
}

const Table& table(int place) { return *tables().at((size_t)place); }

Rows rows(const std::vector<Index>& g) {
    return {g.at(0), g.at(1), g.at(2), g.at(3), g.at(4), g.at(5), g.at(6), (int)g.at(7)};
}

Columns columns(const std::vector<Index>& g) { return {g.at(0), g.at(1), g.at(2), g.at(3)}; }

// Four numbers are a geometry of columns, eight one of rows.
void forward(int set, const std::vector<Index>& g, Address x, Address residual, Address gamma, Address beta, Address y,
             Address total, Address var, Address mean, Address rest, double eps, bool center, bool given, int type,
             int activation, int threads) {
    Tensors t = tensors(x, residual, gamma, beta, var, mean, rest, eps, center, given, type, activation, threads);
    t.y = at<void>(y);
    t.total = at<void>(total);
    if (g.size() == 4)
        table(set).columns_forward(columns(g), t);
    else
        table(set).rows_forward(rows(g), t);
}

void backward(int set, const std::vector<Index>& g, Address dy, Address x, Address residual, Address gamma, Address beta,
              Address dx, Address dresidual, Address dgamma, Address dbeta, Address dtotal, Address var, Address mean,
              Address rest, double eps, bool center, bool given, int type, int activation, int threads) {
    Tensors t = tensors(x, residual, gamma, beta, var, mean, rest, eps, center, given, type, activation, threads);
    t.dy = at<const void>(dy);
    t.dx = at<void>(dx);
    t.dresidual = at<void>(dresidual);
    t.dtotal = at<const void>(dtotal);
    t.dgamma = at<float>(dgamma);
    t.dbeta = at<float>(dbeta);
    if (g.size() == 4)
        table(set).columns_backward(columns(g), t);
    else
        table(set).rows_backward(rows(g), t);
}

// The gradient of x by statistics that it is a part of, and by the averages of the sums of all that they were taken from.
void gradient(int set, const std::vector<Index>& g, Address dy, Address x, Address residual, Address gamma, Address beta,
              Address dx, Address dresidual, Address average_g, Address average_gx, Address var, Address mean, Address rest,
              double eps, int type, int activation, int threads) {
    Tensors t = tensors(x, residual, gamma, beta, var, mean, rest, eps, true, true, type, activation, threads);
    t.dy = at<const void>(dy);
    t.dx = at<void>(dx);
    t.dresidual = at<void>(dresidual);
    t.average_g = at<const float>(average_g);
    t.average_gx = at<const float>(average_gx);
    if (g.size() == 4)
        table(set).columns_backward(columns(g), t);
    else
        table(set).rows_backward(rows(g), t);
}

void cell_state(int set, Index rows, Index units, Address gates, Address before, Address cell, int threads) {
    Cell s{};
    s.rows = rows, s.units = units, s.threads = threads;
    s.gates = at<float>(gates), s.before = at<const float>(before), s.cell = at<float>(cell);
    table(set).cell_state(s);
}

void cell_output(int set, Index rows, Index units, Address gates, Address shown, Address out, int threads) {
    Cell s{};
    s.rows = rows, s.units = units, s.threads = threads;
    s.gates = at<float>(gates), s.shown = at<float>(shown), s.out = at<float>(out);
    table(set).cell_output(s);
}

void cell_output_backward(int set, Index rows, Index units, Address dh, Address more, Address gates, Address shown,
                          Address dgates, Address dshown, int threads) {
    Cell s{};
    s.rows = rows, s.units = units, s.threads = threads;
    s.dh = at<const float>(dh), s.more_h = at<const float>(more);
    s.gates = at<float>(gates), s.shown = at<float>(shown), s.dgates = at<float>(dgates), s.dshown = at<float>(dshown);
    table(set).cell_output_backward(s);
}

void cell_state_backward(int set, Index rows, Index units, Address dc, Address from_norm, Address more, Address gates,
                         Address before, Address dgates, int threads) {
    Cell s{};
    s.rows = rows, s.units = units, s.threads = threads;
    s.dc = at<float>(dc), s.from_norm = at<const float>(from_norm), s.more_c = at<const float>(more);
    s.gates = at<float>(gates), s.before = at<const float>(before), s.dgates = at<float>(dgates);
    table(set).cell_state_backward(s);
}

// Statistics of a batch into the running ones: running += rate * (batch - running), in double, rounded once; and one more
// batch is counted, unless its address is 0. If not all are finite, and such are to be skipped, nothing is written.
void keep(Index count, Address var, Address mean, Address rest, Address running_mean, Address running_var,
          Address batches, double rate, double unbiased, bool skip) {
    const float *const m = at<const float>(mean), *const r = at<const float>(rest), *const v = at<const float>(var);
    bool finite = true;
    for (Index k = 0; k < count; ++k) finite &= std::isfinite(m[k]) && std::isfinite(v[k]);
    if (!finite && skip) return;
    float *const kept_mean = at<float>(running_mean), *const kept_var = at<float>(running_var);
    for (Index k = 0; k < count; ++k) {
        kept_mean[k] = (float)((1 - rate) * kept_mean[k] + rate * ((double)m[k] + r[k]));
        kept_var[k] = (float)((1 - rate) * kept_var[k] + rate * unbiased * v[k]);
    }
    if (batches) ++*at<std::int64_t>(batches);
}

// Ask for huge pages where memory has not been touched yet: a page of 4 KB costs a fault, and large outputs have thousands.
void want_huge_pages(Address begin, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr Address PAGE = Address(1) << 21;
    const Address from = (begin + PAGE - 1) / PAGE * PAGE, to = (begin + bytes) / PAGE * PAGE;
    if (to > from) madvise(at<void>(from), to - from, MADV_HUGEPAGE);  // refused, it is as slow as without
#else
    (void)begin, (void)bytes;
#endif
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets this processor executes, from the widest to the narrowest.");
    m.def("forward", &forward, nb::call_guard<nb::gil_scoped_release>(), "See normkit.kernels.native.");
    m.def("cell_state", &cell_state, nb::call_guard<nb::gil_scoped_release>(), "See normkit.torch._lstm.");
    m.def("cell_output", &cell_output, nb::call_guard<nb::gil_scoped_release>(), "See normkit.torch._lstm.");
    m.def("cell_output_backward", &cell_output_backward, nb::call_guard<nb::gil_scoped_release>(),
          "See normkit.torch._lstm.");
    m.def("cell_state_backward", &cell_state_backward, nb::call_guard<nb::gil_scoped_release>(),
          "See normkit.torch._lstm.");
    m.def("want_huge_pages", &want_huge_pages, "See normkit.torch._compiled.");
    m.def("keep", &keep, "See normkit.kernels.native.");
    m.def("gradient", &gradient, nb::call_guard<nb::gil_scoped_release>(), "See normkit.torch._halves.");
    m.def("backward", &backward, nb::call_guard<nb::gil_scoped_release>(), "See normkit.kernels.native.");
}
