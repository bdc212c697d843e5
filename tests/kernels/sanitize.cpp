// Every path of the compiled kernels on memory of exactly the right size, for the address and undefined sanitizers:
// `make sanitize`. Only what the sanitizers see counts here; values are the business of the other tests.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

using namespace normkit;

namespace {

// Of n values of either type, filled, on the heap: a read or a write beside them is found.
struct Memory {
    std::vector<std::uint8_t> bytes;

    Memory(Index n, int type, int seed) : bytes((size_t)n * (type == BFLOAT16 ? 2 : 4)) {
        for (Index k = 0; k < n; ++k) {
            const float value = (float)((k * 7919 + seed * 104729) % 1009) / 300.0f - 1.5f;
            std::uint32_t bits;
            __builtin_memcpy(&bits, &value, 4);
            const std::uint16_t half = (std::uint16_t)(bits >> 16);
            if (type == BFLOAT16)
                __builtin_memcpy(&bytes[(size_t)k * 2], &half, 2);
            else
                __builtin_memcpy(&bytes[(size_t)k * 4], &bits, 4);
        }
    }
    void* get() { return bytes.data(); }
    float* floats() { return (float*)bytes.data(); }
};

long calls = 0;

template <class Geometry>
void run(const Geometry& g, Index values, Index statistics, Index entries, bool given,
         void (*forward)(const Geometry&, const Tensors&), void (*backward)(const Geometry&, const Tensors&)) {
    for (int type : {FLOAT32, BFLOAT16})
        for (int variant = 0; variant < 4; ++variant) {
            const bool residual = variant & 1, affine = variant & 2;
            Memory x(values, type, 1), dy(values, type, 2), r(values, type, 3), y(values, type, 0), dx(values, type, 0),
                dr(values, type, 0), gamma(entries, FLOAT32, 4), beta(entries, FLOAT32, 5), dgamma(entries, FLOAT32, 0),
                dbeta(entries, FLOAT32, 0), mean(statistics, FLOAT32, 6), rest(statistics, FLOAT32, 7),
                var(statistics, FLOAT32, 8);
            if (given)
                for (Index k = 0; k < statistics; ++k) var.floats()[k] = 1.0f;
            Tensors t{};
            t.x = x.get();
            t.residual = residual ? r.get() : nullptr;
            t.gamma = affine ? gamma.floats() : nullptr;
            t.beta = affine ? beta.floats() : nullptr;
            t.y = y.get();
            t.mean = mean.floats();
            t.rest = given ? nullptr : rest.floats();
            t.var = var.floats();
            t.eps = 1e-5;
            t.center = true;
            t.given = given;
            t.type = type;
            t.activation = (int)(calls % 8);
            t.threads = 1 + (int)(calls % 3);
            forward(g, t);
            t.dy = dy.get();
            t.dresidual = residual ? dr.get() : nullptr;
            // Now and then only some gradients are asked for.
            t.dx = calls % 5 != 4 ? dx.get() : nullptr;
            t.dgamma = affine ? dgamma.floats() : nullptr;
            t.dbeta = affine && calls % 7 != 6 ? dbeta.floats() : nullptr;
            backward(g, t);
            ++calls;
            if constexpr (std::is_same_v<Geometry, Rows>)
                if (residual && !given && g.affine == PER_VALUE) {  // the sum in front
                    Memory total(values, type, 0);
                    Tensors front = t;
                    front.total = total.get();
                    front.activation = NONE;
                    forward(g, front);
                    front.x = total.get(), front.dtotal = r.get(), front.dx = dx.get();
                    front.residual = nullptr, front.dresidual = nullptr;
                    backward(g, front);
                }
            // The halves: statistics alone, or sums alone and the gradient by averages over more than this.
            t.y = t.dx = t.dresidual = nullptr;
            t.rest = rest.floats();
            if (!given) {
                forward(g, t);
                continue;
            }
            Memory average_g(entries, FLOAT32, 9), average_gx(entries, FLOAT32, 10);
            t.dgamma = dgamma.floats(), t.dbeta = dbeta.floats();
            backward(g, t);
            t.dx = dx.get(), t.dresidual = residual ? dr.get() : nullptr;
            t.dgamma = t.dbeta = nullptr;
            t.average_g = average_g.floats(), t.average_gx = average_gx.floats();
            backward(g, t);
        }
}

// The steps of an LSTM, on arrays of exactly the size that they need.
void cell(const Table& table, Index rows, Index units) {
    for (const bool more : {false, true}) {
        std::vector<float> gates(rows * 4 * units, 0.5f), dgates(gates.size());
        std::vector<float> of[10];
        for (auto& array : of) array.assign(rows * units, 0.25f);
        Cell s{};
        s.rows = rows, s.units = units, s.threads = 2;
        s.gates = gates.data(), s.before = of[0].data(), s.cell = of[1].data(), s.shown = of[2].data(), s.out = of[3].data();
        s.dh = of[4].data(), s.from_norm = of[5].data(), s.dc = of[6].data(), s.dgates = dgates.data();
        s.dshown = of[7].data();
        if (more) s.more_h = of[8].data(), s.more_c = of[9].data();
        table.cell_state(s);
        table.cell_output(s);
        table.cell_output_backward(s);
        table.cell_state_backward(s);
        ++calls;
    }
}

void all(const Table& table) {
    const Index w = table.width;
    const Index lengths[] = {1, 3, 7, 16, w - 1, w, w + 1, 2 * w + 1, 49, 127, 128, 129, 1023, 1024, 1025, 4097};
    const auto rows = [&](Rows g, Index statistics, Index entries, bool given) {
        run(g, g.rows * g.runs * g.span, statistics, entries, given, table.rows_forward, table.rows_backward);
    };
    const auto columns = [&](Columns g, bool given) {
        const Index statistics = given ? g.channels : g.blocks * g.channels / g.group;
        run(g, g.blocks * g.length * g.channels, statistics, g.channels, given, table.columns_forward,
            table.columns_backward);
    };
    for (const Index s : lengths) {
        const Index n = 2, c = 3;
        rows({c, c, 0, s, n, c * s, s, PER_ROW}, c, c, false);              // batch norm
        rows({n * c, c, c * s, s, 1, 0, s, PER_ROW}, n * c, c, false);      // instance norm
        rows({n * c, c, c * s, s, 1, 0, s, PER_ROW}, c, c, true);           // given statistics
        rows({c, c, 0, s, n, c * s, s, PER_ROW}, c, c, true);               // the same, of batch norm's parts
        rows({n * 2, 2, 4 * s, 2 * s, 2, s, s, PER_RUN}, n * 2, 4, false);  // group norm, two channels a group
        rows({5, 1, s, 0, 1, 0, s, PER_VALUE}, 5, s, false);                // layer norm
        columns({1, 5, s, 1}, false);                                       // batch norm
        columns({1, 5, s, 1}, true);
        columns({3, 5, 2 * s, 2}, false);  // group norm
    }
    rows({70, 70, 0, 130, 2, 70 * 130, 130, PER_ROW}, 70, 70, false);  // more rows than a bundle holds
    rows({3, 3, 0, 2, 257, 6, 2, PER_ROW}, 3, 3, false);               // more runs than are summed in float
    columns({1, 4200, 3, 1}, false);                                   // several blocks and pieces
    columns({2, 4200, 40, 8}, false);
    rows({1030, 1, 4096, 0, 1, 0, 4096, PER_VALUE}, 1030, 4096, false);  // past the caches
    columns({1, 1030, 4096, 1}, false);
    for (const Index units : lengths) cell(table, 3, units);
}

}  // namespace

int main() {
    all(table_baseline);
#if defined(NORMKIT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all(table_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        all(table_avx512);
#endif
    std::printf("%ld calls, forward and backward: clean\n", calls);
    return 0;
}
