// What the kernels are given. Plain structures and one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace normkit {

using Index = std::int64_t;

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1 };
enum Activation : int { NONE = 0, RELU, RELU6, LEAKY_RELU, SILU, GELU, GELU_TANH, HARDSWISH };
// Which entry of gamma and beta a value takes: that of its row, of its run within the row, or its own.
enum Affine : int { PER_ROW = 0, PER_RUN, PER_VALUE };

// Statistics over rows. Row r = (a, b) with b < inner starts at a * outer_stride + b * inner_stride and consists of `runs`
// runs of `span` contiguous values, `run_stride` apart. gamma and beta: entry b, b * runs + run, or the place in the run.
//
// Batch norm of (N, C, S): rows C, inner C, inner_stride S, runs N, run_stride C S, span S, PER_ROW. Group norm: rows
// N G, inner G, runs C/G, run_stride = span = S, PER_RUN. Layer norm of (N, D): rows N, inner 1, runs 1, span D,
// PER_VALUE.
struct Rows {
    Index rows, inner, outer_stride, inner_stride, runs, run_stride, span;
    int affine;
};

// Statistics over columns of `blocks` matrices (length, channels), of every column, or of `group` columns together.
struct Columns {
    Index blocks, length, channels, group;
};

// Tensors. What is not there is null.
//
// The halves, for statistics that several processes share: forward without y finds the statistics and writes nothing else;
// forward with given ones normalizes. Backward with given ones and without dx sums dgamma and dbeta; with their averages
// over the whole it gives dx, as if the statistics had been those of x.
struct Tensors {
    const void* x;
    const void* residual;  // added behind the norm; before it where there is a total
    void* total;           // x + residual, which is normalized (rows of one run)
    const float* gamma;
    const float* beta;
    void* y;
    // One entry per statistic: mean = mean + rest, to twice the digits of a float; var without eps.
    float *mean, *rest, *var;
    double eps;
    bool center;  // false: the mean is taken for 0
    bool given;   // the statistics are given and not taken from x
    int type, activation, threads;
    // Backward pass.
    const void* dy;
    const void* dtotal;  // a gradient that the sum gets besides
    void* dx;
    void* dresidual;
    float *dgamma, *dbeta;
    // Per entry, with given statistics: averages over all that these were taken from, of the gradient before the activation
    // and of that times the normalized input. Null: the statistics are constants.
    const float *average_g, *average_gx;
};

// One step of an LSTM between its norms. Rows are samples; `gates` and `dgates` hold i, f, g, o side by side, each `units`
// wide, the rest is (rows, units). Gates become their activations, `shown` its hyperbolic tangent, in place.
struct Cell {
    Index rows, units;
    int threads;
    float* gates;
    const float* before;  // the cell state one step earlier
    float *cell, *shown, *out;
    // Backward pass. dh and dc come from the step after it, more_* from elsewhere (or null); dc leaves for the step before.
    const float *dh, *more_h, *more_c, *from_norm;
    float *dc, *dgates, *dshown;
};

struct Table {
    const char* name;
    int width;
    void (*rows_forward)(const Rows&, const Tensors&);
    void (*rows_backward)(const Rows&, const Tensors&);
    void (*columns_forward)(const Columns&, const Tensors&);
    void (*columns_backward)(const Columns&, const Tensors&);
    void (*cell_state)(const Cell&);
    void (*cell_output)(const Cell&);
    void (*cell_output_backward)(const Cell&);
    void (*cell_state_backward)(const Cell&);
};

extern const Table table_baseline;
#if defined(NORMKIT_X86)
extern const Table table_avx2;
extern const Table table_avx512;
#endif

}  // namespace normkit
