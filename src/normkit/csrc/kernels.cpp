// Normalization over two geometries: statistics over contiguous runs (rows) and over strided columns. Compiled once per
// instruction set, with NORMKIT_TABLE naming the table that it fills.
//
// Moments. Blocks that fit the nearest cache are read twice, for their mean and for the squares of the deviations from it,
// and blocks are merged in double (Chan, Golub and LeVeque 1979): x is read from memory once, and no difference of two
// large numbers is taken anywhere. The mean is kept as two floats, so that x - mean keeps its digits far from zero.
#include "kernels.hpp"

#include <cmath>
#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.hpp"

namespace {

using namespace normkit;

// A loop's body is written once and must be compiled twice: for whole vectors, and for the rest.
#define ALWAYS __attribute__((always_inline))

constexpr Index BLOCK = 4096;          // values that are read twice from the nearest cache
constexpr Index COLUMN_BLOCK = 32768;  // the same for columns, from the second nearest: whole rows of the matrix
constexpr Index COLUMN_EXACT = 1024;   // rows at most: a lane sums them one by one in float

// Zeros, or nothing. (A template of the standard library would be one symbol for all instruction sets.)
template <class T>
class Array {
  public:
    explicit Array(Index size) : values_(size ? (T*)std::calloc((size_t)size, sizeof(T)) : nullptr) {
        if (size && !values_) std::abort();
    }
    ~Array() { std::free(values_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    T& operator[](Index k) const { return values_[k]; }
    T* get() const { return values_; }
    explicit operator bool() const { return values_ != nullptr; }

  private:
    T* values_;
};

template <int N>
struct Number {
    static constexpr int value = N;
};

struct Moments {
    double count = 0, mean = 0, squares = 0;  // squares: sum of squared deviations from the mean

    void merge(double n, double m, double s) {
        const double total = count + n, delta = m - mean;
        mean += delta * (n / total);
        squares += s + delta * delta * (count * n / total);
        count = total;
    }
};

// --- activations: of z, and the derivative times a gradient ----------------------------------------------------------

template <int A>
inline vf activate(vf z) {
    if constexpr (A == RELU) return z < 0.0f ? vf{} : z;  // NaN passes
    if constexpr (A == RELU6) {
        z = z < 0.0f ? vf{} : z;
        return z > 6.0f ? splat(6.0f) : z;
    }
    if constexpr (A == LEAKY_RELU) return z > 0.0f ? z : z * 0.01f;
    if constexpr (A == SILU) return z * sigmoid(z);
    if constexpr (A == GELU) return 0.5f * z * (1.0f + error_function(z * 0.70710678118654752f));
    if constexpr (A == GELU_TANH) {
        const vf u = 0.7978845608028654f * (z + 0.044715f * z * z * z);
        return z * sigmoid(2.0f * u);  // (1 + tanh u) / 2 = sigmoid(2u)
    }
    if constexpr (A == HARDSWISH) {
        vf gate = z + 3.0f;
        gate = gate < 0.0f ? vf{} : gate;
        gate = gate > 6.0f ? splat(6.0f) : gate;
        return z * gate * (1.0f / 6.0f);
    }
    return z;
}

template <int A>
inline vf derivative(vf z, vf g) {
    if constexpr (A == RELU) return z <= 0.0f ? vf{} : g;
    if constexpr (A == RELU6) {
        g = z <= 0.0f ? vf{} : g;
        return z >= 6.0f ? vf{} : g;
    }
    if constexpr (A == LEAKY_RELU) return z > 0.0f ? g : g * 0.01f;
    if constexpr (A == SILU) {
        const vf s = sigmoid(z);
        return g * s * (1.0f + z * (1.0f - s));
    }
    if constexpr (A == GELU) {
        const vf cdf = 0.5f * (1.0f + error_function(z * 0.70710678118654752f));
        return g * (cdf + z * 0.3989422804014327f * exponential(-0.5f * z * z));
    }
    if constexpr (A == GELU_TANH) {
        const vf s = sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z));
        return g * (s + z * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * z * z));
    }
    if constexpr (A == HARDSWISH) {
        const vf inside = z < 3.0f ? g * (z * (1.0f / 3.0f) + 0.5f) : g;
        return z <= -3.0f ? vf{} : inside;
    }
    return g;
}

// One statistic, as the elementwise loops need it.
struct Scale {
    float mean, rest, rstd;
};

inline Scale scale_of(double mean, double var, double eps) {
    const float high = (float)mean;
    return {high, (float)(mean - high), (float)(1.0 / std::sqrt(var + eps))};
}

inline Scale given(const Tensors& t, Index k) {
    const double mean = t.mean ? t.mean[k] + (t.rest ? (double)t.rest[k] : 0.0) : 0.0;
    return scale_of(mean, t.var[k], t.eps);
}

inline Scale kept(const Tensors& t, Index k, const Moments& m) {
    const Scale s = scale_of(m.mean, m.squares / m.count, t.eps);
    if (t.mean) {
        t.mean[k] = s.mean;
        t.rest[k] = s.rest;
    }
    t.var[k] = (float)(m.squares / m.count);
    return s;
}

// Call body(place, lanes) along a run: whole vectors with lanes = W, then the rest.
template <class Body>
ALWAYS inline void along(Index span, Body body) {
    Index k = 0;
    for (; k + W <= span; k += W) body(k, W);
    if (k < span) body(k, (int)(span - k));
}

template <class T>
inline vf read(const T* p, int lanes) {
    return lanes == W ? load(p) : load(p, lanes);
}

template <class T>
inline void write(T* p, vf v, int lanes) {
    if (lanes == W)
        store(p, v);
    else
        store(p, v, lanes);
}

// Outputs of at least this many bytes do not stay in a cache anyway.
constexpr Index STREAMED = 16 << 20;

// The same, past the caches where `past`.
template <class T>
ALWAYS inline void write(T* p, vf v, int lanes, bool past) {
    if (past && lanes == W)
        stream(p, v);
    else
        write(p, v, lanes);
}

template <class T>
inline bool past_caches(const T* p, Index values) {
    return values * (Index)sizeof(T) >= STREAMED && (std::uintptr_t)p % (W * sizeof(T)) == 0;
}

inline vf masked(vf v, int lanes) { return lanes == W ? v : keep(v, first(lanes)); }

// --- statistics of a row ---------------------------------------------------------------------------------------------

template <class T>
void block_moments(const T* x, Index runs, Index stride, Index span, bool center, Moments& total) {
    const double n = (double)(runs * span);
    double mean = 0;
    if (center) {
        vf s[4] = {};
        for (Index r = 0; r < runs; ++r) {
            const T* p = x + r * stride;
            Index k = 0;
            for (; k + 4 * W <= span; k += 4 * W)
                for (int u = 0; u < 4; ++u) s[u] += load(p + k + u * W);
            along(span - k, [&](Index j, int lanes) ALWAYS { s[0] += read(p + k + j, lanes); });
        }
        mean = sum((s[0] + s[1]) + (s[2] + s[3])) / n;
    }
    const float about = (float)mean;
    vf s1[4] = {}, s2[4] = {};
    for (Index r = 0; r < runs; ++r) {
        const T* p = x + r * stride;
        Index k = 0;
        for (; k + 4 * W <= span; k += 4 * W)
            for (int u = 0; u < 4; ++u) {
                const vf d = load(p + k + u * W) - about;
                s1[u] += d;
                s2[u] += d * d;
            }
        along(span - k, [&](Index j, int lanes) ALWAYS {
            const vf d = masked(read(p + k + j, lanes) - about, lanes);
            s1[0] += d;
            s2[0] += d * d;
        });
    }
    const double squares = sum((s2[0] + s2[1]) + (s2[2] + s2[3]));
    if (!center) {
        total.squares += squares;
        total.count += n;
        return;
    }
    const double off = sum((s1[0] + s1[1]) + (s1[2] + s1[3]));
    total.merge(n, about + off / n, squares - off * off / n);
}

template <class T>
Moments row_moments(const T* x, Index runs, Index stride, Index span, bool center) {
    if (stride == span) {
        span *= runs;
        runs = 1;
    }
    Moments total;
    if (span >= BLOCK) {
        for (Index r = 0; r < runs; ++r)
            for (Index k = 0; k < span; k += BLOCK)
                block_moments(x + r * stride + k, 1, 0, span - k < BLOCK ? span - k : BLOCK, center, total);
    } else {
        const Index together = BLOCK / span;
        for (Index r = 0; r < runs; r += together)
            block_moments(x + r * stride, runs - r < together ? runs - r : together, stride, span, center, total);
    }
    return total;
}

// --- bundles: rows of many short runs ---------------------------------------------------------------------------------
//
// Runs of 49 values, a channel of a small map, lie far apart: one by one, each costs a page. Neighbouring rows of a bundle
// are taken together, so that memory is read in longer pieces. Only where a row has one gamma.

constexpr Index SHORT = 1024;      // values of a run, below which rows are bundled
constexpr Index BUNDLE = 32;       // rows of a bundle, at most
constexpr Index CACHED = 98304;    // values that a bundle may hold, to be still in the second cache when read again

inline Index bundle_size(const Rows& g, Index tensors) {
    const Index fitting = CACHED / (tensors * g.runs * g.span);
    return fitting < 1 ? 1 : fitting > BUNDLE ? BUNDLE : fitting;
}

// The place of a bundle: rows [row, row + size) with entries [b, b + size), the first starting at `start`.
struct Bundle {
    Index row, b, size, start;

    Bundle(const Rows& g, Index number, Index most) {
        const Index each = (g.inner + most - 1) / most;
        b = (number % each) * most;
        row = (number / each) * g.inner + b;
        size = g.inner - b < most ? g.inner - b : most;
        start = (number / each) * g.outer_stride + b * g.inner_stride;
    }
    static Index count(const Rows& g, Index most) { return g.rows / g.inner * ((g.inner + most - 1) / most); }
};

// Add up body(row of the bundle, place) over all runs: vectors within a block, in double across blocks.
template <int N, class Body>
ALWAYS inline void bundle_sums(const Rows& g, const Bundle& bundle, double (*total)[N], Body body) {
    const Index together = BLOCK / g.span;
    for (Index from = 0; from < g.runs; from += together) {
        const Index to = g.runs - from < together ? g.runs : from + together;
        vf part[BUNDLE][N];
        for (Index i = 0; i < bundle.size; ++i)
            for (int u = 0; u < N; ++u) part[i][u] = vf{};
        for (Index run = from; run < to; ++run)
            for (Index i = 0; i < bundle.size; ++i)
                body(i, bundle.start + i * g.inner_stride + run * g.run_stride, part[i]);
        for (Index i = 0; i < bundle.size; ++i)
            for (int u = 0; u < N; ++u) total[i][u] += sum(part[i][u]);
    }
}

template <class T>
void bundle_scales(const Rows& g, const Tensors& t, const Bundle& bundle, Scale* scales) {
    const T* const x = (const T*)t.x;
    const double n = (double)(g.runs * g.span);
    double sums[BUNDLE][1] = {}, about[BUNDLE][2] = {};
    float mean[BUNDLE] = {};
    if (t.center) {
        bundle_sums<1>(g, bundle, sums, [&](Index, Index at, vf* part) ALWAYS {
            vf s = {};
            along(g.span, [&](Index k, int lanes) ALWAYS { s += read(x + at + k, lanes); });
            part[0] += s;
        });
        for (Index i = 0; i < bundle.size; ++i) mean[i] = (float)(sums[i][0] / n);
    }
    bundle_sums<2>(g, bundle, about, [&](Index i, Index at, vf* part) ALWAYS {
        const vf m = splat(mean[i]);
        vf s1 = {}, s2 = {};
        along(g.span, [&](Index k, int lanes) ALWAYS {
            const vf d = masked(read(x + at + k, lanes) - m, lanes);
            s1 += d;
            s2 += d * d;
        });
        part[0] += s1;
        part[1] += s2;
    });
    for (Index i = 0; i < bundle.size; ++i) {
        Moments m;
        m.count = n;
        m.mean = t.center ? mean[i] + about[i][0] / n : 0.0;
        m.squares = about[i][1] - (t.center ? about[i][0] * about[i][0] / n : 0.0);
        scales[i] = kept(t, bundle.row + i, m);
    }
}

template <class T, int A, bool R>
void bundles_forward(const Rows& g, const Tensors& t) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    const Index most = bundle_size(g, 1), count = Bundle::count(g, most);
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (Index number = 0; number < count; ++number) {
        const Bundle bundle(g, number, most);
        Scale scales[BUNDLE];
        bundle_scales<T>(g, t, bundle, scales);
        for (Index run = 0; run < g.runs; ++run)
            for (Index i = 0; i < bundle.size; ++i) {
                const Index at = bundle.start + i * g.inner_stride + run * g.run_stride, entry = bundle.b + i;
                const Scale s = scales[i];
                const float gain = t.gamma ? s.rstd * t.gamma[entry] : s.rstd, shift = t.beta ? t.beta[entry] : 0.0f;
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    vf z = ((read(x + at + k, lanes) - s.mean) - s.rest) * gain + shift;
                    if constexpr (R) z += read(residual + at + k, lanes);
                    write(y + at + k, activate<A>(z), lanes);
                });
            }
    }
}

// --- patches: rows of runs so short that vectors do not fit them -----------------------------------------------------
//
// Neighbouring rows lie side by side in every run: 15 channels of 7 x 7 are 735 values in one piece. What belongs to a row
// (mean, gain, ...) is spread over an array as long as the piece, so that whole vectors serve, whatever rows they cross.

constexpr Index PATCHED = 128;    // values of a run, below which rows are patched together
constexpr Index PATCH = 768;      // values of a piece: eight arrays of them stay in the nearest cache
constexpr Index EXACT = 256;      // runs that are summed in float

inline bool patched(const Rows& g, const Tensors& t) {
    return g.affine == PER_ROW && g.span < PATCHED && g.inner_stride == g.span && !t.given;
}

inline Index patch_rows(const Rows& g) { return PATCH / g.span < 1 ? 1 : PATCH / g.span; }

// Sum an array of a patch over the values of every row.
inline void add_up(const float* values, Index rows, Index span, double* total) {
    for (Index i = 0; i < rows; ++i) {
        double s = 0;
        for (Index k = 0; k < span; ++k) s += values[i * span + k];
        total[i] += s;
    }
}

inline void fill(float* values, Index row, Index span, float value) {
    for (Index k = 0; k < span; ++k) values[row * span + k] = value;
}

template <class T, int A, bool R>
void patches_forward(const Rows& g, const Tensors& t) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    const Index most = patch_rows(g), count = Bundle::count(g, most);
    const double n = (double)(g.runs * g.span);
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (Index number = 0; number < count; ++number) {
        const Bundle patch(g, number, most);
        const Index width = patch.size * g.span;
        const T* const px = x + patch.start;
        float mean[PATCH], rest[PATCH], gain[PATCH], shift[PATCH], s1[PATCH], s2[PATCH];
        double sums[PATCH] = {}, squares[PATCH] = {}, about[PATCH] = {};
        if (t.center) {
            for (Index from = 0; from < g.runs; from += EXACT) {
                for (Index k = 0; k < width; ++k) s1[k] = 0;
                for (Index run = from; run < g.runs && run < from + EXACT; ++run) {
                    const T* const p = px + run * g.run_stride;
                    along(width, [&](Index k, int lanes) ALWAYS {
                        write(s1 + k, read(s1 + k, lanes) + read(p + k, lanes), lanes);
                    });
                }
                add_up(s1, patch.size, g.span, sums);
            }
        }
        for (Index i = 0; i < patch.size; ++i) {
            about[i] = (float)(sums[i] / n);
            sums[i] = 0;
            fill(mean, i, g.span, (float)about[i]);
        }
        for (Index from = 0; from < g.runs; from += EXACT) {
            for (Index k = 0; k < width; ++k) s1[k] = s2[k] = 0;
            for (Index run = from; run < g.runs && run < from + EXACT; ++run) {
                const T* const p = px + run * g.run_stride;
                along(width, [&](Index k, int lanes) ALWAYS {
                    const vf d = read(p + k, lanes) - read(mean + k, lanes);
                    write(s1 + k, read(s1 + k, lanes) + d, lanes);
                    write(s2 + k, read(s2 + k, lanes) + d * d, lanes);
                });
            }
            add_up(s1, patch.size, g.span, sums);
            add_up(s2, patch.size, g.span, squares);
        }
        for (Index i = 0; i < patch.size; ++i) {
            Moments m;
            m.count = n;
            m.mean = t.center ? about[i] + sums[i] / n : 0.0;
            m.squares = squares[i] - (t.center ? sums[i] * sums[i] / n : 0.0);
            const Scale s = kept(t, patch.row + i, m);
            fill(mean, i, g.span, s.mean);
            fill(rest, i, g.span, s.rest);
            fill(gain, i, g.span, t.gamma ? s.rstd * t.gamma[patch.b + i] : s.rstd);
            fill(shift, i, g.span, t.beta ? t.beta[patch.b + i] : 0.0f);
        }
        for (Index run = g.runs; run-- > 0;) {
            const Index at = patch.start + run * g.run_stride;
            along(width, [&](Index k, int lanes) ALWAYS {
                vf z = ((read(x + at + k, lanes) - read(mean + k, lanes)) - read(rest + k, lanes)) * read(gain + k, lanes) +
                       read(shift + k, lanes);
                if constexpr (R) z += read(residual + at + k, lanes);
                write(y + at + k, activate<A>(z), lanes);
            });
        }
    }
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class T, int A, bool R>
void rows_forward(const Rows& g, const Tensors& t) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    if (patched(g, t)) return patches_forward<T, A, R>(g, t);
    if (g.affine == PER_ROW && g.span < SHORT && !t.given) return bundles_forward<T, A, R>(g, t);
    const Index values = g.rows * g.runs * g.span;
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (Index row = 0; row < g.rows; ++row) {
        const Index b = row % g.inner, start = (row / g.inner) * g.outer_stride + b * g.inner_stride;
        const Scale s = t.given ? given(t, b)
                                : kept(t, row, row_moments(x + start, g.runs, g.run_stride, g.span, t.center));
        // Backwards: what was read last for the statistics is still in a cache.
        for (Index run = g.runs; run-- > 0;) {
            const Index at = start + run * g.run_stride;
            const T *px = x + at, *pr = R ? residual + at : nullptr;
            T* py = y + at;
            const bool past = past_caches(py, values);
            if (g.affine == PER_VALUE) {
                const float *const gamma = t.gamma, *const beta = t.beta;
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    vf z = ((read(px + k, lanes) - s.mean) - s.rest) * s.rstd;
                    if (gamma) z *= read(gamma + k, lanes);
                    if (beta) z += read(beta + k, lanes);
                    if constexpr (R) z += read(pr + k, lanes);
                    write(py + k, activate<A>(z), lanes, past);
                });
                continue;
            }
            const Index entry = g.affine == PER_ROW ? b : b * g.runs + run;
            const float gain = t.gamma ? s.rstd * t.gamma[entry] : s.rstd, shift = t.beta ? t.beta[entry] : 0.0f;
            along(g.span, [&](Index k, int lanes) ALWAYS {
                vf z = ((read(px + k, lanes) - s.mean) - s.rest) * gain + shift;
                if constexpr (R) z += read(pr + k, lanes);
                write(py + k, activate<A>(z), lanes, past);
            });
        }
    }
}

// Sums of the gradient before the activation, g, and of that times the centred input, gx.
struct Pair {
    double g = 0, gx = 0;
};

// The gradient before the activation. gain and beta give z from the centred input.
template <class T, int A, bool R>
ALWAYS inline vf before_activation(const T* dy, const T* residual, Index k, int lanes, vf centred, vf gain, vf beta) {
    const vf d = read(dy + k, lanes);
    if constexpr (A == NONE) return d;
    vf z = centred * gain + beta;
    if constexpr (R) z += read(residual + k, lanes);
    return derivative<A>(z, d);
}

// The gradient of the input. Given statistics do not depend on it: nothing is subtracted, nor an infinity times 0.
ALWAYS inline vf corrected(const Tensors& t, vf d, vf one, vf centred, vf two) {
    return t.given ? d : (d - one) - centred * two;
}

template <class T, int A, bool R>
Pair runs_sums(const T* x, const T* dy, const T* residual, Index runs, Index stride, Index span, const Scale& s,
               float gain, float beta) {
    Pair total;
    const vf vg = splat(gain), vb = splat(beta);
    vf a[2] = {}, b[2] = {};
    Index pending = 0;
    for (Index run = 0; run < runs; ++run) {
        const T *px = x + run * stride, *pd = dy + run * stride, *pr = R ? residual + run * stride : nullptr;
        for (Index from = 0; from < span; from += BLOCK) {
            const Index n = span - from < BLOCK ? span - from : BLOCK;
            const auto body = [&](Index k, int lanes, int u) ALWAYS {
                const vf centred = (read(px + k, lanes) - s.mean) - s.rest;
                const vf d = masked(before_activation<T, A, R>(pd, pr, k, lanes, centred, vg, vb), lanes);
                a[u] += d;
                b[u] += d * centred;
            };
            Index k = from;
            for (; k + 2 * W <= from + n; k += 2 * W) {
                body(k, W, 0);
                body(k + W, W, 1);
            }
            if (k + W <= from + n) {
                body(k, W, 0);
                k += W;
            }
            if (k < from + n) body(k, (int)(from + n - k), 1);
            pending += n;
            if (pending >= BLOCK) {
                total.g += sum(a[0] + a[1]);
                total.gx += sum(b[0] + b[1]);
                a[0] = a[1] = b[0] = b[1] = vf{};
                pending = 0;
            }
        }
    }
    total.g += sum(a[0] + a[1]);
    total.gx += sum(b[0] + b[1]);
    return total;
}

template <class T, int A, bool R>
void bundles_backward(const Rows& g, const Tensors& t, double* dgamma, double* dbeta) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const Index most = bundle_size(g, 2), count = Bundle::count(g, most);
    const double n = (double)(g.runs * g.span);
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (Index number = 0; number < count; ++number) {
        const Bundle bundle(g, number, most);
        Scale scales[BUNDLE];
        float gains[BUNDLE], betas[BUNDLE], c1[BUNDLE], c2[BUNDLE];
        double sums[BUNDLE][2] = {};
        for (Index i = 0; i < bundle.size; ++i) {
            const Index entry = bundle.b + i;
            scales[i] = given(t, t.given ? entry : bundle.row + i);
            gains[i] = t.gamma ? scales[i].rstd * t.gamma[entry] : scales[i].rstd;
            betas[i] = t.beta ? t.beta[entry] : 0.0f;
        }
        bundle_sums<2>(g, bundle, sums, [&](Index i, Index at, vf* part) ALWAYS {
            const vf mean = splat(scales[i].mean), rest = splat(scales[i].rest), gain = splat(gains[i]);
            const vf beta = splat(betas[i]);
            vf a = {}, b = {};
            along(g.span, [&](Index k, int lanes) ALWAYS {
                const vf centred = (read(x + at + k, lanes) - mean) - rest;
                const vf d = masked(
                    before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, centred, gain, beta), lanes);
                a += d;
                b += d * centred;
            });
            part[0] += a;
            part[1] += b;
        });
        for (Index i = 0; i < bundle.size; ++i) {
            const double rstd = scales[i].rstd, gamma = t.gamma ? t.gamma[bundle.b + i] : 1.0;
            if (dgamma) dgamma[bundle.row + i] = sums[i][1] * rstd;
            if (dbeta) dbeta[bundle.row + i] = sums[i][0];
            c1[i] = t.given || !t.center ? 0.0f : (float)(gamma * sums[i][0] / n * rstd);
            c2[i] = t.given ? 0.0f : (float)(gamma * sums[i][1] / n * rstd * rstd * rstd);
        }
        if (!dx && !dresidual) continue;
        for (Index run = 0; run < g.runs; ++run)
            for (Index i = 0; i < bundle.size; ++i) {
                const Index at = bundle.start + i * g.inner_stride + run * g.run_stride;
                const Scale s = scales[i];
                const vf gain = splat(gains[i]), beta = splat(betas[i]);
                const vf one = splat(c1[i]), two = splat(c2[i]);
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    const vf centred = (read(x + at + k, lanes) - s.mean) - s.rest;
                    const vf d =
                        before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, centred, gain, beta);
                    if (dx) write(dx + at + k, corrected(t, d * gain, one, centred, two), lanes);
                    if (R && dresidual) write(dresidual + at + k, d, lanes);
                });
            }
    }
}

template <class T, int A, bool R>
void patches_backward(const Rows& g, const Tensors& t, double* dgamma, double* dbeta) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const Index most = patch_rows(g), count = Bundle::count(g, most);
    const double n = (double)(g.runs * g.span);
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (Index number = 0; number < count; ++number) {
        const Bundle patch(g, number, most);
        const Index width = patch.size * g.span;
        float mean[PATCH], rest[PATCH], gain[PATCH], shift[PATCH], s1[PATCH], s2[PATCH];
        double sums[PATCH] = {}, products[PATCH] = {};
        for (Index i = 0; i < patch.size; ++i) {
            const Scale s = given(t, patch.row + i);
            fill(mean, i, g.span, s.mean);
            fill(rest, i, g.span, s.rest);
            fill(gain, i, g.span, t.gamma ? s.rstd * t.gamma[patch.b + i] : s.rstd);
            fill(shift, i, g.span, t.beta ? t.beta[patch.b + i] : 0.0f);
        }
        for (Index from = 0; from < g.runs; from += EXACT) {
            for (Index k = 0; k < width; ++k) s1[k] = s2[k] = 0;
            for (Index run = from; run < g.runs && run < from + EXACT; ++run) {
                const Index at = patch.start + run * g.run_stride;
                along(width, [&](Index k, int lanes) ALWAYS {
                    const vf centred = (read(x + at + k, lanes) - read(mean + k, lanes)) - read(rest + k, lanes);
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, centred,
                                                            read(gain + k, lanes), read(shift + k, lanes));
                    write(s1 + k, read(s1 + k, lanes) + d, lanes);
                    write(s2 + k, read(s2 + k, lanes) + d * centred, lanes);
                });
            }
            add_up(s1, patch.size, g.span, sums);
            add_up(s2, patch.size, g.span, products);
        }
        // s1 and s2 become what is subtracted.
        for (Index i = 0; i < patch.size; ++i) {
            const double rstd = given(t, patch.row + i).rstd, gamma = t.gamma ? t.gamma[patch.b + i] : 1.0;
            if (dgamma) dgamma[patch.row + i] = products[i] * rstd;
            if (dbeta) dbeta[patch.row + i] = sums[i];
            fill(s1, i, g.span, t.center ? (float)(gamma * sums[i] / n * rstd) : 0.0f);
            fill(s2, i, g.span, (float)(gamma * products[i] / n * rstd * rstd * rstd));
        }
        if (!dx && !dresidual) continue;
        for (Index run = g.runs; run-- > 0;) {
            const Index at = patch.start + run * g.run_stride;
            along(width, [&](Index k, int lanes) ALWAYS {
                const vf centred = (read(x + at + k, lanes) - read(mean + k, lanes)) - read(rest + k, lanes);
                const vf scale = read(gain + k, lanes);
                const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, centred, scale,
                                                        read(shift + k, lanes));
                if (dx) write(dx + at + k, (d * scale - read(s1 + k, lanes)) - centred * read(s2 + k, lanes), lanes);
                if (R && dresidual) write(dresidual + at + k, d, lanes);
            });
        }
    }
}

template <class T, int A, bool R>
void rows_backward(const Rows& g, const Tensors& t) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const Index entries = g.affine == PER_VALUE ? g.span : g.affine == PER_ROW ? g.inner : g.inner * g.runs;
    const bool each = g.affine == PER_VALUE;
    // Shares of dgamma and dbeta: of every thread for PER_VALUE, else of every row and run. Summed in a fixed order.
    const Index shares = each ? t.threads * entries : g.affine == PER_ROW ? g.rows : g.rows * g.runs;
    Array<double> dgamma(t.dgamma ? shares : 0);
    Array<double> dbeta(t.dbeta ? shares : 0);
    const bool bundled = g.affine == PER_ROW && g.span < SHORT;
    if (patched(g, t))
        patches_backward<T, A, R>(g, t, dgamma.get(), dbeta.get());
    else if (bundled)
        bundles_backward<T, A, R>(g, t, dgamma.get(), dbeta.get());
#pragma omp parallel num_threads(t.threads) if (!bundled)
    {
        int thread = 0;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        // Sums of a block of rows in float, added to the double ones when the block ends.
        Array<float> block(each ? 2 * entries : 0);
        Index pending = 0;
        const auto flush = [&] {
            for (Index k = 0; k < entries; ++k) {
                if (dgamma) dgamma[thread * entries + k] += block[k];
                if (dbeta) dbeta[thread * entries + k] += block[entries + k];
                block[k] = block[entries + k] = 0;
            }
            pending = 0;
        };
#pragma omp for schedule(static)
        for (Index row = 0; row < (bundled ? 0 : g.rows); ++row) {
            const Index b = row % g.inner, start = (row / g.inner) * g.outer_stride + b * g.inner_stride;
            const Scale s = given(t, t.given ? b : row);
            double sg = 0, sgx = 0;
            if (!each) {
                // One gamma for the whole row: its runs are summed together. Else run by run.
                const Index together = g.affine == PER_ROW ? g.runs : 1;
                for (Index run = 0; run < g.runs; run += together) {
                    const Index at = start + run * g.run_stride, entry = g.affine == PER_ROW ? b : b * g.runs + run;
                    const float gamma = t.gamma ? t.gamma[entry] : 1.0f, beta = t.beta ? t.beta[entry] : 0.0f;
                    const Pair p = runs_sums<T, A, R>(x + at, dy + at, residual + (R ? at : 0), together, g.run_stride,
                                                      g.span, s, gamma * s.rstd, beta);
                    sg += gamma * p.g;
                    sgx += gamma * p.gx;
                    const Index share = g.affine == PER_ROW ? row : row * g.runs + run;
                    if (dgamma) dgamma[share] = p.gx * s.rstd;
                    if (dbeta) dbeta[share] = p.g;
                }
            } else {
                vf a = {}, c = {};
                const T *px = x + start, *pd = dy + start, *pr = residual + (R ? start : 0);
                const float *const gammas = t.gamma, *const betas = t.beta;
                float *const own_gamma = dgamma ? block.get() : nullptr, *const own_beta = dbeta ? block.get() + entries : nullptr;
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    const vf centred = (read(px + k, lanes) - s.mean) - s.rest;
                    const vf gamma = gammas ? read(gammas + k, lanes) : splat(1.0f);
                    const vf beta = betas ? read(betas + k, lanes) : vf{};
                    const vf d =
                        masked(before_activation<T, A, R>(pd, pr, k, lanes, centred, gamma * s.rstd, beta), lanes);
                    if (own_gamma) write(own_gamma + k, read(own_gamma + k, lanes) + d * (centred * s.rstd), lanes);
                    if (own_beta) write(own_beta + k, read(own_beta + k, lanes) + d, lanes);
                    a += d * gamma;
                    c += d * gamma * centred;
                });
                sg = sum(a);
                sgx = sum(c);
                if ((dgamma || dbeta) && ++pending == 64) flush();
            }
            if (!dx && !dresidual) continue;
            const double n = (double)(g.runs * g.span), rstd = s.rstd;
            const float c1 = t.given || !t.center ? 0.0f : (float)(sg / n * rstd);
            const float c2 = t.given ? 0.0f : (float)(sgx / n * rstd * rstd * rstd);
            for (Index run = g.runs; run-- > 0;) {
                const Index at = start + run * g.run_stride;
                const T *px = x + at, *pd = dy + at, *pr = residual + (R ? at : 0);
                const bool past = dx && past_caches(dx + at, g.rows * g.runs * g.span);
                const Index entry = g.affine == PER_ROW ? b : b * g.runs + run;
                const vf one_gain = splat(!each && t.gamma ? t.gamma[entry] * s.rstd : s.rstd);
                const vf one_beta = splat(!each && t.beta ? t.beta[entry] : 0.0f);
                const auto body = [&](Index k, int lanes, vf gain, vf beta) ALWAYS {
                    const vf centred = (read(px + k, lanes) - s.mean) - s.rest;
                    const vf d = before_activation<T, A, R>(pd, pr, k, lanes, centred, gain, beta);
                    if (dx) write(dx + at + k, corrected(t, d * gain, splat(c1), centred, splat(c2)), lanes, past);
                    if (R && dresidual) write(dresidual + at + k, d, lanes);
                };
                if (each) {
                    const float *const gammas = t.gamma, *const betas = t.beta;
                    along(g.span, [&](Index k, int lanes) ALWAYS {
                        body(k, lanes, gammas ? read(gammas + k, lanes) * s.rstd : one_gain,
                             betas ? read(betas + k, lanes) : one_beta);
                    });
                } else
                    along(g.span, [&](Index k, int lanes) ALWAYS { body(k, lanes, one_gain, one_beta); });
            }
        }
        if (each && (dgamma || dbeta)) flush();
    }
    const Index times = entries ? shares / entries : 0;
    for (Index k = 0; k < entries; ++k) {
        double a = 0, b = 0;
        for (Index share = 0; share < times; ++share) {
            if (dgamma) a += dgamma[share * entries + k];
            if (dbeta) b += dbeta[share * entries + k];
        }
        if (dgamma) t.dgamma[k] = (float)a;
        if (dbeta) t.dbeta[k] = (float)b;
    }
}

// --- columns ---------------------------------------------------------------------------------------------------------

// Call body(first channel, lanes of the last vector, constant N) for tiles of N vectors: whole lines of the cache.
template <int MOST = 4, class Body>
ALWAYS inline void tiles(Index channels, Body body) {
    Index c = 0;
    for (; c + MOST * W <= channels; c += MOST * W) body(c, W, Number<MOST>());
    for (; c + W <= channels; c += W) body(c, W, Number<1>());
    if (c < channels) body(c, (int)(channels - c), Number<1>());
}

// Rows of a matrix that are gone through together, tile by tile: they stay in the second cache.
inline Index block_rows(Index channels) {
    const Index rows = COLUMN_BLOCK / channels;
    return rows < 8 ? 8 : rows > COLUMN_EXACT ? COLUMN_EXACT : rows;
}

// Moments of all columns of rows [from, to), merged into those that are there.
template <class T>
void column_moments(const T* x, Index from, Index to, Index channels, bool center, Moments* total) {
    const Index rows = block_rows(channels);
    for (Index m = from; m < to; m += rows) {
        const Index end = to - m < rows ? to : m + rows;
        const double n = (double)(end - m);
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            const T* p = x + c;
            vf about[N] = {};
            if (center) {
                for (Index r = m; r < end; ++r)
                    for (int u = 0; u < N; ++u) about[u] += read(p + r * channels + u * W, lanes);
                for (int u = 0; u < N; ++u) about[u] /= (float)n;
            }
            vf off[N] = {}, squares[N] = {};
            for (Index r = m; r < end; ++r)
                for (int u = 0; u < N; ++u) {
                    const vf d = read(p + r * channels + u * W, lanes) - about[u];
                    off[u] += d;
                    squares[u] += d * d;
                }
            for (int u = 0; u < N; ++u)
                for (int k = 0; k < lanes; ++k) {
                    Moments& own = total[c + u * W + k];
                    if (center) {
                        const double rest = off[u][k];
                        own.merge(n, about[u][k] + rest / n, squares[u][k] - rest * rest / n);
                    } else {
                        own.squares += squares[u][k];
                        own.count += n;
                    }
                }
        });
    }
}

// The statistics of a matrix as arrays over its columns: mean, rest, rstd.
struct Spread {
    Array<float> values;
    float *mean, *rest, *rstd;

    explicit Spread(Index channels)
        : values(3 * channels), mean(values.get()), rest(mean + channels), rstd(rest + channels) {}

    void set(Index c, const Scale& s) {
        mean[c] = s.mean;
        rest[c] = s.rest;
        rstd[c] = s.rstd;
    }
};

inline Moments merged(const Moments* columns, Index count) {
    Moments total;
    for (Index k = 0; k < count; ++k) {
        if (columns[k].count > 0) total.merge(columns[k].count, columns[k].mean, columns[k].squares);
    }
    return total;
}

inline void spread(const Columns& g, const Tensors& t, Index block, const Moments* columns, Spread& s) {
    const Index groups = g.channels / g.group;
    for (Index k = 0; k < groups; ++k) {
        const Index place = block * groups + k;
        const Scale one = columns ? kept(t, place, merged(columns + k * g.group, g.group))
                                  : given(t, t.given ? k : place);
        for (Index c = 0; c < g.group; ++c) s.set(k * g.group + c, one);
    }
}

template <class T, int A, bool R>
void apply_columns(const Columns& g, const Tensors& t, Index from, Index to, const Spread& s) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    const float *const gamma = t.gamma, *const beta = t.beta;
    const Index channels = g.channels, rows = block_rows(channels);
    const bool past = past_caches(y, g.blocks * g.length * channels) && channels % W == 0;
    // Backwards: what was read last for the statistics is still in a cache.
    for (Index end = to; end > from; end -= rows) {
        const Index m = end - from < rows ? from : end - rows;
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], rest[N], gain[N], shift[N];
            for (int u = 0; u < N; ++u) {
                const Index k = c + u * W;
                mean[u] = read(s.mean + k, lanes);
                rest[u] = read(s.rest + k, lanes);
                gain[u] = gamma ? read(s.rstd + k, lanes) * read(gamma + k, lanes) : read(s.rstd + k, lanes);
                shift[u] = beta ? read(beta + k, lanes) : vf{};
            }
            for (Index r = end; r-- > m;)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    vf z = ((read(x + at, lanes) - mean[u]) - rest[u]) * gain[u] + shift[u];
                    if constexpr (R) z += read(residual + at, lanes);
                    write(y + at, activate<A>(z), lanes, past);
                }
        });
    }
}

inline Index bound(Index length, int part, int parts) { return length * part / parts; }

// The moments of a matrix are those of its pieces, merged in their order. How many there are depends on the matrix alone,
// neither on threads nor on other matrices: so a sample has the same statistics in every batch.
constexpr Index PIECE = 2;  // blocks, at least
constexpr int PIECES = 64;  // at most: each has moments of all columns

inline int pieces(const Columns& g) {
    const Index found = g.length / (PIECE * block_rows(g.channels));
    return found < 1 ? 1 : found > PIECES ? PIECES : (int)found;
}

template <class T>
void piece_moments(const Columns& g, const Tensors& t, Index start, int piece, Moments* own) {
    for (Index c = 0; c < g.channels; ++c) own[c] = Moments();
    const int count = pieces(g);
    column_moments((const T*)t.x, start + bound(g.length, piece, count), start + bound(g.length, piece + 1, count),
                   g.channels, t.center, own);
}

inline void merge_piece(const Columns& g, const Moments* piece, Moments* total) {
    for (Index c = 0; c < g.channels; ++c)
        if (piece[c].count > 0) total[c].merge(piece[c].count, piece[c].mean, piece[c].squares);
}

template <class T, int A, bool R>
void columns_forward(const Columns& g, const Tensors& t) {
    if (g.blocks >= t.threads) {
#pragma omp parallel num_threads(t.threads)
        {
            Spread s(g.channels);
            const int count = t.given ? 0 : pieces(g);
            Array<Moments> own(count ? g.channels : 0), next(count > 1 ? g.channels : 0);
#pragma omp for schedule(static)
            for (Index block = 0; block < g.blocks; ++block) {
                for (int piece = 0; piece < count; ++piece) {
                    piece_moments<T>(g, t, block * g.length, piece, piece ? next.get() : own.get());
                    if (piece) merge_piece(g, next.get(), own.get());
                }
                spread(g, t, block, own.get(), s);
                apply_columns<T, A, R>(g, t, block * g.length, (block + 1) * g.length, s);
            }
        }
        return;
    }
    Spread s(g.channels);
    const int count = t.given ? 0 : pieces(g);
    Array<Moments> parts(count * g.channels);
    for (Index block = 0; block < g.blocks; ++block) {
        const Index start = block * g.length;
        if (parts) {
#pragma omp parallel for num_threads(t.threads) schedule(static)
            for (int piece = 0; piece < count; ++piece)
                piece_moments<T>(g, t, start, piece, parts.get() + piece * g.channels);
            for (int piece = 1; piece < count; ++piece) merge_piece(g, parts.get() + piece * g.channels, parts.get());
        }
        spread(g, t, block, parts.get(), s);
#pragma omp parallel for num_threads(t.threads) schedule(static)
        for (int part = 0; part < t.threads; ++part)
            apply_columns<T, A, R>(g, t, start + bound(g.length, part, t.threads),
                                   start + bound(g.length, part + 1, t.threads), s);
    }
}

// Sums over rows [from, to) of every column: of the gradient before the activation, and of that times the centred input.
template <class T, int A, bool R>
void column_sums(const Columns& g, const Tensors& t, Index from, Index to, const Spread& s, double* sums) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    const float *const gamma = t.gamma, *const beta = t.beta;
    const Index channels = g.channels, rows = block_rows(channels);
    for (Index m = from; m < to; m += rows) {
        const Index end = to - m < rows ? to : m + rows;
        tiles<2>(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], rest[N], gain[N], shift[N], a[N] = {}, b[N] = {};
            for (int u = 0; u < N; ++u) {
                const Index k = c + u * W;
                mean[u] = read(s.mean + k, lanes);
                rest[u] = read(s.rest + k, lanes);
                gain[u] = gamma ? read(s.rstd + k, lanes) * read(gamma + k, lanes) : read(s.rstd + k, lanes);
                shift[u] = beta ? read(beta + k, lanes) : vf{};
            }
            for (Index r = m; r < end; ++r)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    const vf centred = (read(x + at, lanes) - mean[u]) - rest[u];
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), 0, lanes, centred, gain[u],
                                                            shift[u]);
                    a[u] += d;
                    b[u] += d * centred;
                }
            for (int u = 0; u < N; ++u)
                for (int k = 0; k < lanes; ++k) {
                    sums[c + u * W + k] += a[u][k];
                    sums[channels + c + u * W + k] += b[u][k];
                }
        });
    }
}

template <class T, int A, bool R>
void column_gradients(const Columns& g, const Tensors& t, Index from, Index to, const Spread& s, const float* c1,
                      const float* c2) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const float *const gamma = t.gamma, *const beta = t.beta;
    const Index channels = g.channels, rows = block_rows(channels);
    const bool past = dx && past_caches(dx, g.blocks * g.length * channels) && channels % W == 0;
    for (Index end = to; end > from; end -= rows) {
        const Index m = end - from < rows ? from : end - rows;
        tiles<2>(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], rest[N], gain[N], shift[N], one[N], two[N];
            for (int u = 0; u < N; ++u) {
                const Index k = c + u * W;
                mean[u] = read(s.mean + k, lanes);
                rest[u] = read(s.rest + k, lanes);
                gain[u] = gamma ? read(s.rstd + k, lanes) * read(gamma + k, lanes) : read(s.rstd + k, lanes);
                shift[u] = beta ? read(beta + k, lanes) : vf{};
                one[u] = read(c1 + k, lanes);
                two[u] = read(c2 + k, lanes);
            }
            for (Index r = end; r-- > m;)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    const vf centred = (read(x + at, lanes) - mean[u]) - rest[u];
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), 0, lanes, centred, gain[u],
                                                            shift[u]);
                    if (dx) write(dx + at, corrected(t, d * gain[u], one[u], centred, two[u]), lanes, past);
                    if (R && dresidual) write(dresidual + at, d, lanes);
                }
        });
    }
}

// What is subtracted in a block: of every column, from the sums over the columns of its group.
inline void corrections(const Columns& g, const Tensors& t, double* sums, const Spread& s, float* c1, float* c2) {
    const double n = (double)(g.length * g.group);
    for (Index k = 0; k < g.channels; k += g.group) {
        double sg = 0, sgx = 0;
        for (Index c = k; c < k + g.group; ++c) {
            const double gamma = t.gamma ? t.gamma[c] : 1.0;
            sg += gamma * sums[c];
            sgx += gamma * sums[g.channels + c];
        }
        for (Index c = k; c < k + g.group; ++c) {
            const double rstd = s.rstd[c];
            c1[c] = t.given || !t.center ? 0.0f : (float)(sg / n * rstd);
            c2[c] = t.given ? 0.0f : (float)(sgx / n * rstd * rstd * rstd);
            sums[g.channels + c] *= rstd;  // of the normalized input now, as dgamma is
        }
    }
}

template <class T, int A, bool R>
void columns_backward(const Columns& g, const Tensors& t) {
    const Index channels = g.channels, width = 2 * channels;
    const bool outside = g.blocks >= t.threads;
    // Per thread: sums of the current block, and sums of all its blocks.
    Array<double> current(t.threads * width), all(t.threads * width);
    if (outside) {
#pragma omp parallel num_threads(t.threads)
        {
            int thread = 0;
#if defined(_OPENMP)
            thread = omp_get_thread_num();
#endif
            Spread s(channels);
            Array<float> c(width);
            double *own = current.get() + thread * width, *total = all.get() + thread * width;
#pragma omp for schedule(static)
            for (Index block = 0; block < g.blocks; ++block) {
                for (Index k = 0; k < width; ++k) own[k] = 0;
                spread(g, t, block, nullptr, s);
                const Index start = block * g.length;
                column_sums<T, A, R>(g, t, start, start + g.length, s, own);
                corrections(g, t, own, s, c.get(), c.get() + channels);
                for (Index k = 0; k < width; ++k) total[k] += own[k];
                column_gradients<T, A, R>(g, t, start, start + g.length, s, c.get(), c.get() + channels);
            }
        }
    } else {
        Spread s(channels);
        Array<float> c(width);
        for (Index block = 0; block < g.blocks; ++block) {
            const Index start = block * g.length;
            spread(g, t, block, nullptr, s);
#pragma omp parallel for num_threads(t.threads) schedule(static)
            for (int part = 0; part < t.threads; ++part) {
                double* own = current.get() + part * width;
                for (Index k = 0; k < width; ++k) own[k] = 0;
                column_sums<T, A, R>(g, t, start + bound(g.length, part, t.threads),
                                     start + bound(g.length, part + 1, t.threads), s, own);
            }
            for (int part = 1; part < t.threads; ++part)
                for (Index k = 0; k < width; ++k) current[k] += current[part * width + k];
            corrections(g, t, current.get(), s, c.get(), c.get() + channels);
            for (Index k = 0; k < width; ++k) all[k] += current[k];
#pragma omp parallel for num_threads(t.threads) schedule(static)
            for (int part = 0; part < t.threads; ++part)
                column_gradients<T, A, R>(g, t, start + bound(g.length, part, t.threads),
                                          start + bound(g.length, part + 1, t.threads), s, c.get(), c.get() + channels);
        }
    }
    for (Index c = 0; c < channels; ++c) {
        double a = 0, b = 0;
        for (int thread = 0; thread < (outside ? t.threads : 1); ++thread) {
            a += all[thread * width + channels + c];
            b += all[thread * width + c];
        }
        if (t.dgamma) t.dgamma[c] = (float)a;
        if (t.dbeta) t.dbeta[c] = (float)b;
    }
}

// --- dispatch --------------------------------------------------------------------------------------------------------

#define NORMKIT_CASES(FUNCTION)                                                              \
    template <class T, int A>                                                                \
    void FUNCTION##_2(const G_##FUNCTION& g, const Tensors& t) {                             \
        t.residual ? FUNCTION<T, A, true>(g, t) : FUNCTION<T, A, false>(g, t);               \
    }                                                                                        \
    template <class T>                                                                       \
    void FUNCTION##_1(const G_##FUNCTION& g, const Tensors& t) {                             \
        switch (t.activation) {                                                              \
            case RELU: return FUNCTION##_2<T, RELU>(g, t);                                   \
            case RELU6: return FUNCTION##_2<T, RELU6>(g, t);                                 \
            case LEAKY_RELU: return FUNCTION##_2<T, LEAKY_RELU>(g, t);                       \
            case SILU: return FUNCTION##_2<T, SILU>(g, t);                                   \
            case GELU: return FUNCTION##_2<T, GELU>(g, t);                                   \
            case GELU_TANH: return FUNCTION##_2<T, GELU_TANH>(g, t);                         \
            case HARDSWISH: return FUNCTION##_2<T, HARDSWISH>(g, t);                         \
            default: return FUNCTION##_2<T, NONE>(g, t);                                     \
        }                                                                                    \
    }                                                                                        \
    void FUNCTION##_0(const G_##FUNCTION& g, const Tensors& t) {                             \
        t.type == BFLOAT16 ? FUNCTION##_1<bf16>(g, t) : FUNCTION##_1<float>(g, t);           \
    }

using G_rows_forward = Rows;
using G_rows_backward = Rows;
using G_columns_forward = Columns;
using G_columns_backward = Columns;
NORMKIT_CASES(rows_forward)
NORMKIT_CASES(rows_backward)
NORMKIT_CASES(columns_forward)
NORMKIT_CASES(columns_backward)

}  // namespace

namespace normkit {

#define NORMKIT_TEXT_(x) #x
#define NORMKIT_TEXT(x) NORMKIT_TEXT_(x)
extern const Table NORMKIT_TABLE = {NORMKIT_TEXT(NORMKIT_NAME), W,         rows_forward_0, rows_backward_0,
                                    columns_forward_0,          columns_backward_0};

}  // namespace normkit
