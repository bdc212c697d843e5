// Normalization over two geometries: statistics over contiguous runs (rows) and over strided columns. Compiled once per
// instruction set, with NORMKIT_TABLE naming the table that it fills.
//
// Moments. The mean is guessed from a few values; then x is read once, for the sums of deviations from the guess and of
// their squares, in float within a block and in double across blocks. What the guess was off is taken out of both (Chan,
// Golub and LeVeque 1983). Where that would cost digits, since the guess was further from the mean than the values are, x is
// read again around the mean just found: no difference of two large numbers is taken anywhere. The mean is kept as two
// floats, so that x - mean keeps its digits far from zero.
#include "kernels.hpp"

#include <cmath>
#include <cstdlib>

#include <sched.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.hpp"

namespace {

using namespace normkit;

// A loop's body is written once and must be compiled twice: for whole vectors, and for the rest.
#define ALWAYS __attribute__((always_inline))

constexpr Index EXACT = 64;            // values that a lane adds up in float: more would cost digits
constexpr Index BLOCK = EXACT * 2 * W; // values of a run that are added up so
constexpr Index GUESSED = 64;          // values that the mean is guessed from
constexpr Index COLUMN_BLOCK = 32768;  // values of whole rows of a matrix that the second cache holds

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

// A statistic with its gamma and beta: z = (x - mean) * gain + shift. What the mean lost when it became a float is in
// the shift, where it is as small as the shift's own rounding. (x * gain + shift would lose the digits of a far mean.)
struct Line {
    float mean, gain, shift;
};

inline Line line(const Scale& s, const Tensors& t, Index entry) {
    const float gain = t.gamma ? s.rstd * t.gamma[entry] : s.rstd, beta = t.beta ? t.beta[entry] : 0.0f;
    return {s.mean, gain, beta - s.rest * gain};
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

// The same; where `past` the caches is written at p, with whole vectors that are aligned.
template <class T, class Body>
ALWAYS inline void along(const T* p, bool past, Index span, Body body) {
    const Index before = past ? -(Index)((std::uintptr_t)p / sizeof(T)) & (W - 1) : 0, head = before < span ? before : span;
    if (head) body(0, (int)head);
    along(span - head, [&](Index k, int lanes) ALWAYS { body(head + k, lanes); });
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
constexpr Index STREAMED = 12 << 20;

// The same, past the caches where `past`.
template <class T>
ALWAYS inline void write(T* p, vf v, int lanes, bool past) {
    if (past && lanes == W)
        stream(p, v);
    else
        write(p, v, lanes);
}

template <class T>
inline bool large(Index values) {
    return values * (Index)sizeof(T) >= STREAMED;
}

template <class T>
inline bool past_caches(const T* p, Index values) {
    return large<T>(values) && (std::uintptr_t)p % (W * sizeof(T)) == 0;
}

inline vf masked(vf v, int lanes) { return lanes == W ? v : keep(v, first(lanes)); }

// --- sums ------------------------------------------------------------------------------------------------------------

// In double, lane by lane.
typedef double vd __attribute__((vector_size(8 * W)));
ALWAYS inline vd wide(vf v) { return __builtin_convertvector(v, vd); }

// Sum body(place, lanes, sums) over runs of contiguous values: vectors within a block, in double across blocks. Meanwhile
// `ahead(place)` is told of every line in the next run: memory is far away, and a processor does not guess where to.
template <int N, class Body, class Ahead>
ALWAYS inline void add_runs(Index runs, Index stride, Index span, double (&total)[N], Body body, Ahead ahead) {
    constexpr int U = N > 1 ? 2 : 4;
    vf part[U][N] = {};
    vd whole[N] = {};
    Index pending = 0;
    const auto flush = [&]() ALWAYS {
        for (int n = 0; n < N; ++n) {
            vf s = part[0][n];
            for (int u = 1; u < U; ++u) s += part[u][n];
            whole[n] += wide(s);
            for (int u = 0; u < U; ++u) part[u][n] = vf{};
        }
        pending = 0;
    };
    for (Index run = 0; run < runs; ++run) {
        const Index start = run * stride;
        for (Index from = 0; from < span; from += BLOCK) {
            const Index to = span - from < BLOCK ? span : from + BLOCK;
            Index k = from;
            for (; k + U * W <= to; k += U * W)
                for (int u = 0; u < U; ++u) {
                    ahead(start + stride + k + u * W);
                    body(start + k + u * W, W, part[u]);
                }
            for (; k + W <= to; k += W) body(start + k, W, part[0]);
            if (k < to) body(start + k, (int)(to - k), part[0]);
            pending += to - from;
            if (pending >= BLOCK) flush();
        }
    }
    flush();
    for (int n = 0; n < N; ++n)
        for (int k = 0; k < W; ++k) total[n] += whole[n][k];
}

inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// --- threads that work together --------------------------------------------------------------------------------------
//
// To wake the threads of a parallel region takes longer than the work on a small tensor does. So a call has one region, in
// which threads wait for each other on their feet, and who wakes late finds less to do.

inline Index bound(Index length, Index part, Index parts) { return length * part / parts; }

// What the threads of a team have in common. (std::atomic would be symbols common to all instruction sets.)
struct Meeting {
    int arrived = 0, round = 0;
    bool answer = false;
    Array<Index> taken;  // of the share of every thread

    explicit Meeting(int threads) : taken(threads) {}
};

// The threads that work on something together: all of a region, or one alone.
struct Team {
    int thread, size;
    Meeting* meeting;

    static Team of_one() { return {0, 1, nullptr}; }

    // What one does for all once all have come here, and its answer.
    template <class Body>
    ALWAYS bool once(Body body) const {
        if (size == 1) return body();
        wait();
        if (thread == 0) {
            for (int k = 0; k < size; ++k) meeting->taken[k] = 0;
            meeting->answer = body();
        }
        wait();
        return meeting->answer;
    }

    // Call body(k) for k from 0 to count: each thread takes its own share in steps, which keeps to its caches, and then
    // what others have left of theirs. A second time only behind `once`.
    template <class Body>
    ALWAYS void share(Index count, Body body) const {
        for (int turn = 0; turn < size; ++turn) {
            const int whose = (thread + turn) % size;
            const Index from = bound(count, whose, size), to = bound(count, whose + 1, size);
            const Index step = size == 1 ? to : (to - from + STEPS - 1) / STEPS;
            for (Index k = from; k < to;) {
                if (size > 1) k = from + __atomic_fetch_add(&meeting->taken[whose], step, __ATOMIC_RELAXED);
                for (const Index end = to - k < step ? to : k + step; k < end; ++k) body(k);
            }
        }
    }

  private:
    static constexpr Index STEPS = 8;
    static constexpr int TURNS = 1000;  // some 30 microseconds, what it takes to wake a thread

    void wait() const {
        const int round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == size) {
            meeting->arrived = 0;
            __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turns = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; ++turns) {
            if (turns > TURNS) sched_yield();  // with more threads than cores the one waited for may need this one's
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

// Call body(team) on every thread of one region.
template <class Body>
ALWAYS inline void together(int threads, Body body) {
    Meeting meeting(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team{0, 1, &meeting};
#if defined(_OPENMP)
        team.thread = omp_get_thread_num();
        team.size = omp_get_num_threads();  // may be fewer than were asked for
#endif
        body(team);
    }
}

// Call body(k) for k from 0 to count.
template <class Body>
ALWAYS inline void shared(int threads, Index count, Body body) {
    together(threads, [&](const Team& team) ALWAYS { team.share(count, body); });
}

// The same with room for so many values of a thread's own, null for none: body(k, room).
template <class Body>
ALWAYS inline void shared(int threads, Index count, Index values, Body body) {
    together(threads, [&](const Team& team) ALWAYS {
        const Array<float> room(values);
        team.share(count, [&](Index k) ALWAYS { body(k, room.get()); });
    });
}

// Call body(block, team, number of the team) for every block: there is a team of one for every thread where there are
// enough blocks for that, else one of all threads.
struct Teams {
    Index blocks;
    int threads, count, members;

    Teams(Index blocks, int threads)
        : blocks(blocks), threads(threads), count(blocks < threads ? 1 : threads), members(blocks < threads ? threads : 1) {}

    template <class Body>
    ALWAYS void each(Body body) const {
        together(threads, [&](const Team& all) ALWAYS {
            // Not by who comes first: a team adds up the sums of its blocks, and runs are to repeat bit for bit.
            const bool apart = members == 1;
            const Index from = apart ? bound(blocks, all.thread, all.size) : 0;
            const Index to = apart ? bound(blocks, all.thread + 1, all.size) : blocks;
            for (Index block = from; block < to; ++block)
                body(block, apart ? Team::of_one() : all, apart ? all.thread : 0);
        });
    }
};

// --- statistics of a row ---------------------------------------------------------------------------------------------

// Whether a guess of the mean was too far from it: the distance makes up more than half of the squares.
inline bool far(double off, double squares, double n) { return off * off > squares * n * 0.5; }

template <class T>
Moments row_moments(const T* x, Index runs, Index stride, Index span, bool center) {
    if (stride == span) {
        span *= runs;
        runs = 1;
        stride = 0;
    }
    const double n = (double)(runs * span);
    float guess = 0;
    if (center) {
        double first[1] = {};
        const Index some = span < GUESSED ? span : GUESSED;
        add_runs(1, 0, some, first, [&](Index k, int lanes, vf* s) ALWAYS { s[0] += read(x + k, lanes); }, [](Index) {});
        guess = (float)(first[0] / some);
    }
    for (bool again = false;; again = true) {
        double s[2] = {};
        const vf about = splat(guess);
        add_runs(runs, stride, span, s, [&](Index k, int lanes, vf* part) ALWAYS {
            const vf d = masked(read(x + k, lanes) - about, lanes);
            part[0] += d;
            part[1] += d * d;
        }, [&](Index k) ALWAYS { fetch(x + k); });
        Moments m;
        m.count = n;
        if (!center) {
            m.squares = s[1];
            return m;
        }
        m.mean = guess + s[0] / n;
        m.squares = s[1] - s[0] * s[0] / n;
        if (again || !far(s[0], s[1], n)) return m;
        guess = (float)m.mean;
    }
}

// Neighbouring rows [row, row + size) with entries [b, b + size), the first starting at `start`.
struct Patch {
    Index row, b, size, start;

    Patch(const Rows& g, Index number, Index most) {
        const Index each = (g.inner + most - 1) / most;
        b = (number % each) * most;
        row = (number / each) * g.inner + b;
        size = g.inner - b < most ? g.inner - b : most;
        start = (number / each) * g.outer_stride + b * g.inner_stride;
    }
    static Index count(const Rows& g, Index most) { return g.rows / g.inner * ((g.inner + most - 1) / most); }
};

// --- patches: rows of runs so short that vectors do not fit them -----------------------------------------------------
//
// Neighbouring rows lie side by side in every run: 15 channels of 7 x 7 are 735 values in one piece. What belongs to a row
// (mean, gain, ...) is spread over an array as long as the piece, so that whole vectors serve, whatever rows they cross.

constexpr Index PATCHED = 256;    // values of a run, below which rows are patched together
constexpr Index PATCH = 768;      // values of a piece: eight arrays of them stay in the nearest cache

// With a single run each array would be filled as often as it is used.
inline bool patched(const Rows& g) {
    return g.affine == PER_ROW && g.runs > 1 && g.span < PATCHED && g.inner_stride == g.span;
}

inline Index patch_rows(const Rows& g) { return PATCH / g.span < 1 ? 1 : PATCH / g.span; }

// Sum an array of a patch over the values of every row.
inline void add_up(const float* values, Index rows, Index span, double* total) {
    for (Index i = 0; i < rows; ++i) {
        vd s = {};
        along(span, [&](Index k, int lanes) ALWAYS { s += wide(read(values + i * span + k, lanes)); });
        for (int k = 0; k < W; ++k) total[i] += s[k];
    }
}

inline void fill(float* values, Index row, Index span, float value) {
    for (Index k = 0; k < span; ++k) values[row * span + k] = value;
}

template <class T>
inline float run_mean(const T* p, Index span) {
    vf s = {};
    along(span, [&](Index k, int lanes) ALWAYS { s += read(p + k, lanes); });
    return (float)(sum(s) / span);
}

template <class T, int A, bool R>
void patches_forward(const Rows& g, const Tensors& t) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    const Index most = patch_rows(g), count = Patch::count(g, most);
    const bool past = large<T>(g.rows * g.runs * g.span);
    const double n = (double)(g.runs * g.span);
    shared(t.threads, count, [&](Index number) ALWAYS {
        const Patch patch(g, number, most);
        const Index width = patch.size * g.span;
        const T* const px = x + patch.start;
        float mean[PATCH], gain[PATCH], shift[PATCH], s1[PATCH], s2[PATCH];
        float about[PATCH] = {};
        double sums[PATCH], squares[PATCH];
        if (t.center && !t.given)
            for (Index i = 0; i < patch.size; ++i) about[i] = run_mean(px + i * g.span, g.span);
        for (bool again = false, done = t.given; !done; again = true) {
            for (Index i = 0; i < patch.size; ++i) {
                sums[i] = squares[i] = 0;
                fill(mean, i, g.span, about[i]);
            }
            for (Index from = 0; from < g.runs; from += EXACT) {
                for (Index k = 0; k < width; ++k) s1[k] = s2[k] = 0;
                for (Index run = from; run < g.runs && run < from + EXACT; ++run) {
                    const T *const p = px + run * g.run_stride, *const next = p + g.run_stride;
                    along(width, [&](Index k, int lanes) ALWAYS {
                        fetch(next + k);
                        const vf d = read(p + k, lanes) - read(mean + k, lanes);
                        write(s1 + k, read(s1 + k, lanes) + d, lanes);
                        write(s2 + k, read(s2 + k, lanes) + d * d, lanes);
                    });
                }
                add_up(s1, patch.size, g.span, sums);
                add_up(s2, patch.size, g.span, squares);
            }
            done = true;
            if (again || !t.center) continue;
            for (Index i = 0; i < patch.size; ++i)
                if (far(sums[i], squares[i], n)) {
                    about[i] = (float)(about[i] + sums[i] / n);
                    done = false;
                }
        }
        for (Index i = 0; i < patch.size; ++i) {
            Moments m;
            if (!t.given) {
                m.count = n;
                m.mean = t.center ? about[i] + sums[i] / n : 0.0;
                m.squares = squares[i] - (t.center ? sums[i] * sums[i] / n : 0.0);
            }
            const Scale found = t.given ? given(t, patch.b + i) : kept(t, patch.row + i, m);
            if (!y) continue;
            const Line s = line(found, t, patch.b + i);
            fill(mean, i, g.span, s.mean);
            fill(gain, i, g.span, s.gain);
            fill(shift, i, g.span, s.shift);
        }
        if (!y) return;
        for (Index run = g.runs; run-- > 0;) {
            const Index at = patch.start + run * g.run_stride;
            along(y + at, past, width, [&](Index k, int lanes) ALWAYS {
                vf z = (read(x + at + k, lanes) - read(mean + k, lanes)) * read(gain + k, lanes) + read(shift + k, lanes);
                if constexpr (R) z += read(residual + at + k, lanes);
                write(y + at + k, activate<A>(z), lanes, past);
            });
        }
    });
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class T, int A, bool R>
void rows_forward(const Rows& g, const Tensors& t) {
    T *const y = (T*)t.y, *const total = (T*)t.total;
    const T *const x = total ? total : (const T*)t.x, *const residual = (const T*)t.residual;
    if (patched(g)) return patches_forward<T, A, R>(g, t);
    const Index values = g.rows * g.runs * g.span;
    shared(t.threads, g.rows, [&](Index row) ALWAYS {
        const Index b = row % g.inner, start = (row / g.inner) * g.outer_stride + b * g.inner_stride;
        if (total)
            along(g.span, [&](Index k, int lanes) ALWAYS {
                write(total + start + k, read((const T*)t.x + start + k, lanes) + read(residual + start + k, lanes), lanes);
            });
        const Scale s = t.given ? given(t, b)
                                : kept(t, row, row_moments(x + start, g.runs, g.run_stride, g.span, t.center));
        if (!y) return;
        // Backwards: what was read last for the statistics is still in a cache.
        for (Index run = g.runs; run-- > 0;) {
            const Index at = start + run * g.run_stride;
            const T *px = x + at, *pr = R ? residual + at : nullptr;
            T* py = y + at;
            const bool past = past_caches(py, values);
            if (g.affine == PER_VALUE) {
                const float *const gamma = t.gamma, *const beta = t.beta;
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    const vf gain = gamma ? read(gamma + k, lanes) * s.rstd : splat(s.rstd);
                    vf z = (read(px + k, lanes) - s.mean) * gain + ((beta ? read(beta + k, lanes) : vf{}) - s.rest * gain);
                    if constexpr (R) z += read(pr + k, lanes);
                    write(py + k, activate<A>(z), lanes, past);
                });
                continue;
            }
            const Line l = line(s, t, g.affine == PER_ROW ? b : b * g.runs + run);
            along(g.span, [&](Index k, int lanes) ALWAYS {
                vf z = (read(px + k, lanes) - l.mean) * l.gain + l.shift;
                if constexpr (R) z += read(pr + k, lanes);
                write(py + k, activate<A>(z), lanes, past);
            });
        }
    });
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

// Whether the statistics do not depend on the input: nothing is subtracted then, nor an infinity times 0.
inline bool constants(const Tensors& t) { return t.given && !t.average_g; }

// Whether the sums of the backward pass are wanted. By given statistics they are those of gamma and beta alone.
inline bool sums_wanted(const Tensors& t) { return !t.given || t.dgamma || t.dbeta; }

// What is subtracted from the gradient of the input: one + off * two, where off = x - mean.
struct Correction {
    float one = 0, two = 0;

    // From the sums over n values, which hold gamma, or from the averages that are there for this entry of gamma.
    Correction(const Tensors& t, const Scale& s, Index entry, double sg, double sgx, double n) {
        if (constants(t)) return;
        const double rstd = s.rstd, gain = rstd * (t.given && t.gamma ? t.gamma[entry] : 1.0f);
        two = (float)(t.given ? t.average_gx[entry] * gain * rstd : sgx / n * rstd * rstd * rstd);
        one = (t.center ? (float)((t.given ? t.average_g[entry] : sg / n) * gain) : 0.0f) - s.rest * two;
    }
};

ALWAYS inline vf corrected(bool constants, vf d, vf one, vf off, vf two) {
    return constants ? d : (d - one) - off * two;
}

// Activations whose derivative takes longer than to keep it from the sums to the gradient, and the values of a row up to
// which the second cache holds what is kept.
constexpr bool costly(int activation) { return activation == SILU || activation == GELU || activation == GELU_TANH; }
constexpr Index KEPT = 1 << 17;

// `kept`, unless null, gets the gradient before the activation; then there is one run.
template <class T, int A, bool R>
Pair runs_sums(const T* x, const T* dy, const T* residual, Index runs, Index stride, Index span, const Line& l,
               float rest, float* kept) {
    double total[2] = {};
    const vf mean = splat(l.mean), gain = splat(l.gain), shift = splat(l.shift);
    add_runs(runs, stride, span, total, [&](Index k, int lanes, vf* part) ALWAYS {
        const vf off = read(x + k, lanes) - mean;
        const vf d = masked(before_activation<T, A, R>(dy, residual, k, lanes, off, gain, shift), lanes);
        if (costly(A) && kept) write(kept + k, d, lanes);
        part[0] += d;
        part[1] += d * off;
    }, [&](Index k) ALWAYS {
        fetch(x + k);
        fetch(dy + k);
    });
    return {total[0], total[1] - rest * total[0]};
}

template <class T, int A, bool R>
void patches_backward(const Rows& g, const Tensors& t, double* dgamma, double* dbeta) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const Index most = patch_rows(g), count = Patch::count(g, most);
    const bool past = large<T>(g.rows * g.runs * g.span);
    const double n = (double)(g.runs * g.span);
    shared(t.threads, count, [&](Index number) ALWAYS {
        const Patch patch(g, number, most);
        const Index width = patch.size * g.span;
        float mean[PATCH], gain[PATCH], shift[PATCH], s1[PATCH], s2[PATCH];
        double sums[PATCH] = {}, products[PATCH] = {};
        const Index statistic = t.given ? patch.b : patch.row;
        for (Index i = 0; i < patch.size; ++i) {
            const Line l = line(given(t, statistic + i), t, patch.b + i);
            fill(mean, i, g.span, l.mean);
            fill(gain, i, g.span, l.gain);
            fill(shift, i, g.span, l.shift);
        }
        for (Index from = 0; sums_wanted(t) && from < g.runs; from += EXACT) {
            for (Index k = 0; k < width; ++k) s1[k] = s2[k] = 0;
            for (Index run = from; run < g.runs && run < from + EXACT; ++run) {
                const Index at = patch.start + run * g.run_stride, next = at + g.run_stride;
                along(width, [&](Index k, int lanes) ALWAYS {
                    fetch(x + next + k);
                    fetch(dy + next + k);
                    const vf off = read(x + at + k, lanes) - read(mean + k, lanes);
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, off,
                                                            read(gain + k, lanes), read(shift + k, lanes));
                    write(s1 + k, read(s1 + k, lanes) + d, lanes);
                    write(s2 + k, read(s2 + k, lanes) + d * off, lanes);
                });
            }
            add_up(s1, patch.size, g.span, sums);
            add_up(s2, patch.size, g.span, products);
        }
        // s1 and s2 become what is subtracted.
        for (Index i = 0; i < patch.size; ++i) {
            const Scale s = given(t, statistic + i);
            const double gamma = t.gamma ? t.gamma[patch.b + i] : 1.0;
            const double product = products[i] - s.rest * sums[i];
            if (dgamma) dgamma[patch.row + i] = product * s.rstd;
            if (dbeta) dbeta[patch.row + i] = sums[i];
            const Correction c(t, s, patch.b + i, gamma * sums[i], gamma * product, n);
            fill(s1, i, g.span, c.one);
            fill(s2, i, g.span, c.two);
        }
        if (!dx && !dresidual) return;
        const bool fixed = constants(t);
        for (Index run = g.runs; run-- > 0;) {
            const Index at = patch.start + run * g.run_stride;
            along(dx + at, past, width, [&](Index k, int lanes) ALWAYS {
                const vf off = read(x + at + k, lanes) - read(mean + k, lanes), scale = read(gain + k, lanes);
                const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), k, lanes, off, scale,
                                                        read(shift + k, lanes));
                const vf one = read(s1 + k, lanes), two = read(s2 + k, lanes);
                if (dx) write(dx + at + k, corrected(fixed, d * scale, one, off, two), lanes, past);
                if (R && dresidual) write(dresidual + at + k, d, lanes);
            });
        }
    });
}

// In `pieces` of neighbouring rows; the shares of dgamma and dbeta as in rows_backward.
template <class T, int A, bool R>
void each_row_backward(const Rows& g, const Tensors& t, Index pieces, Index entries, double* dgamma, double* dbeta) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    const T* const dtotal = (const T*)t.dtotal;
    T* const dx = (T*)t.dx;
    T* const dresidual = (T*)t.dresidual;
    const bool each = g.affine == PER_VALUE;
    const bool keeps = costly(A) && !each && (dx || dresidual) && g.runs * g.span <= KEPT && sums_wanted(t);
    shared(t.threads, pieces, keeps ? g.runs * g.span : 0, [&](Index piece, float* kept) ALWAYS {
        // Sums of a block of rows in float, added to the double ones when the block ends.
        Array<float> block(each ? 2 * entries : 0);
        Index pending = 0;
        const auto flush = [&] {
            for (Index k = 0; k < entries; ++k) {
                if (dgamma) dgamma[piece * entries + k] += block[k];
                if (dbeta) dbeta[piece * entries + k] += block[entries + k];
                block[k] = block[entries + k] = 0;
            }
            pending = 0;
        };
        for (Index row = bound(g.rows, piece, pieces); row < bound(g.rows, piece + 1, pieces); ++row) {
            const Index b = row % g.inner, start = (row / g.inner) * g.outer_stride + b * g.inner_stride;
            const Scale s = given(t, t.given ? b : row);
            double sg = 0, sgx = 0;
            if (!each) {
                // One gamma for the whole row: its runs are summed together, unless each is kept. Else run by run.
                const Index joint = g.affine == PER_ROW && !keeps ? g.runs : 1;
                for (Index run = 0; sums_wanted(t) && run < g.runs; run += joint) {
                    const Index at = start + run * g.run_stride, entry = g.affine == PER_ROW ? b : b * g.runs + run;
                    const float gamma = t.gamma ? t.gamma[entry] : 1.0f;
                    const Pair p = runs_sums<T, A, R>(x + at, dy + at, residual + (R ? at : 0), joint, g.run_stride,
                                                      g.span, line(s, t, entry), s.rest,
                                                      keeps ? kept + run * g.span : nullptr);
                    sg += gamma * p.g;
                    sgx += gamma * p.gx;
                    const Index share = g.affine == PER_ROW ? row : row * g.runs + run;
                    if (dgamma) dgamma[share] += p.gx * s.rstd;
                    if (dbeta) dbeta[share] += p.g;
                }
            } else {
                vf a = {}, c = {};
                const T *px = x + start, *pd = dy + start, *pr = residual + (R ? start : 0);
                const float *const gammas = t.gamma, *const betas = t.beta;
                float *const own_gamma = dgamma ? block.get() : nullptr, *const own_beta = dbeta ? block.get() + entries : nullptr;
                along(g.span, [&](Index k, int lanes) ALWAYS {
                    const vf off = read(px + k, lanes) - s.mean, centred = off - s.rest;
                    const vf gamma = gammas ? read(gammas + k, lanes) : splat(1.0f), gain = gamma * s.rstd;
                    const vf shift = (betas ? read(betas + k, lanes) : vf{}) - s.rest * gain;
                    const vf d = masked(before_activation<T, A, R>(pd, pr, k, lanes, off, gain, shift), lanes);
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
            const Correction c(t, s, b, sg, sgx, (double)(g.runs * g.span));
            const vf one = splat(c.one), two = splat(c.two);
            const bool fixed = constants(t);
            for (Index run = g.runs; run-- > 0;) {
                const Index at = start + run * g.run_stride;
                const T *px = x + at, *pd = dy + at, *pr = residual + (R ? at : 0);
                const bool past = dx && past_caches(dx + at, g.rows * g.runs * g.span);
                const float* const own = keeps ? kept + run * g.span : nullptr;
                const auto body = [&](Index k, int lanes, vf gain, vf shift) ALWAYS {
                    const vf off = read(px + k, lanes) - s.mean;
                    const vf d = costly(A) && own ? read(own + k, lanes)
                                                  : before_activation<T, A, R>(pd, pr, k, lanes, off, gain, shift);
                    vf found = corrected(fixed, d * gain, one, off, two);
                    if (dtotal) found += read(dtotal + at + k, lanes);
                    if (dx) write(dx + at + k, found, lanes, past);
                    if (R && dresidual) write(dresidual + at + k, d, lanes);
                };
                if (each) {
                    const float *const gammas = t.gamma, *const betas = t.beta;
                    along(g.span, [&](Index k, int lanes) ALWAYS {
                        const vf gain = gammas ? read(gammas + k, lanes) * s.rstd : splat(s.rstd);
                        body(k, lanes, gain, (betas ? read(betas + k, lanes) : vf{}) - s.rest * gain);
                    });
                } else {
                    const Line l = line(s, t, g.affine == PER_ROW ? b : b * g.runs + run);
                    const vf gain = splat(l.gain), shift = splat(l.shift);
                    along(g.span, [&](Index k, int lanes) ALWAYS { body(k, lanes, gain, shift); });
                }
            }
        }
        if (each && (dgamma || dbeta)) flush();
    });
}

// Pieces of rows with sums of their own of dgamma and dbeta: more than threads, for who wakes late, but not so many that
// adding them up counts.
inline Index row_pieces(const Rows& g, int threads) {
    const Index few = g.rows / 8 < 16 ? g.rows / 8 : 16, each = g.rows < threads ? g.rows : threads;
    return few > each ? few : each;
}

template <class T, int A, bool R>
void rows_backward(const Rows& g, const Tensors& t) {
    const bool each = g.affine == PER_VALUE;
    const Index entries = each ? g.span : g.affine == PER_ROW ? g.inner : g.inner * g.runs;
    // Shares of dgamma and dbeta: of every piece for PER_VALUE, else of every row and run. Summed in a fixed order.
    const Index pieces = each ? row_pieces(g, t.threads) : g.rows;
    const Index shares = each ? pieces * entries : g.affine == PER_ROW ? g.rows : g.rows * g.runs;
    Array<double> dgamma(t.dgamma ? shares : 0);
    Array<double> dbeta(t.dbeta ? shares : 0);
    if (patched(g))
        patches_backward<T, A, R>(g, t, dgamma.get(), dbeta.get());
    else
        each_row_backward<T, A, R>(g, t, pieces, entries, dgamma.get(), dbeta.get());
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
    return rows < 8 ? 8 : rows > EXACT ? EXACT : rows;
}

ALWAYS inline void add_lanes(double* total, vf v, int lanes) {
    if (lanes < W) {
        for (int k = 0; k < lanes; ++k) total[k] += v[k];
        return;
    }
    vd sum;
    std::memcpy(&sum, total, sizeof sum);
    sum += wide(v);
    std::memcpy(total, &sum, sizeof sum);
}

constexpr Index AHEAD = 8;  // rows that are fetched before their turn

// Whether a matrix has left the caches when it is read again. Fetching what is still there costs more than it saves.
template <class T>
inline bool from_memory(const Columns& g) {
    return g.length * g.channels * (Index)sizeof(T) >= STREAMED;
}

// Sums over rows [from, to) of every column, of deviations from a guess of the mean and of their squares, added to those
// that are there.
template <class T>
void column_deviations(const T* x, Index from, Index to, Index channels, const float* guess, double* sums) {
    const Index rows = block_rows(channels);
    for (Index m = from; m < to; m += rows) {
        const Index end = to - m < rows ? to : m + rows;
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf about[N], off[N] = {}, squares[N] = {};
            for (int u = 0; u < N; ++u) about[u] = read(guess + c + u * W, lanes);
            for (Index r = m; r < end; ++r)
                for (int u = 0; u < N; ++u) {
                    const T* const p = x + r * channels + c + u * W;
                    fetch(p + AHEAD * channels);
                    const vf d = read(p, lanes) - about[u];
                    off[u] += d;
                    squares[u] += d * d;
                }
            for (int u = 0; u < N; ++u) {
                add_lanes(sums + c + u * W, off[u], lanes);
                add_lanes(sums + channels + c + u * W, squares[u], lanes);
            }
        });
    }
}

// The mean of a few rows, taken from everywhere: values of a batch may drift.
template <class T>
void guess_means(const T* x, Index length, Index channels, float* guess) {
    const Index some = length < 8 ? length : 8;
    for (Index c = 0; c < channels; ++c) guess[c] = 0;
    for (Index k = 0; k < some; ++k) {
        const T* const p = x + (k * length / some) * channels;
        along(channels, [&](Index c, int lanes) ALWAYS {
            write(guess + c, read(guess + c, lanes) + read(p + c, lanes) / (float)some, lanes);
        });
    }
}

// The statistics of a matrix as arrays over its columns, with gamma and beta.
struct Spread {
    float *mean, *gain, *shift;

    // In memory for 3 * channels values.
    Spread(float* values, Index channels) : mean(values), gain(mean + channels), shift(gain + channels) {}

    // Of a group of columns.
    void set(const Columns& g, const Tensors& t, Index group, const Scale& s) const {
        for (Index c = group * g.group; c < (group + 1) * g.group; ++c) {
            const Line l = line(s, t, c);
            mean[c] = l.mean;
            gain[c] = l.gain;
            shift[c] = l.shift;
        }
    }
};

// Whether any column's guess was too far from its mean; those are better then.
inline bool guess_again(const Columns& g, const Tensors& t, const double* sums, float* guess) {
    const double n = (double)g.length;
    bool any = false;
    for (Index c = 0; t.center && c < g.channels; ++c)
        if (far(sums[c], sums[g.channels + c], n)) {
            guess[c] = (float)(guess[c] + sums[c] / n);
            any = true;
        }
    return any;
}

// Statistics of a matrix from the sums about the guess.
inline void settle(const Columns& g, const Tensors& t, Index block, const double* sums, const float* guess, const Spread& s) {
    const double n = (double)g.length;
    const Index groups = g.channels / g.group;
    for (Index k = 0; k < groups; ++k) {
        Moments m;
        for (Index c = k * g.group; c < (k + 1) * g.group; ++c) {
            const double off = sums[c], squares = sums[g.channels + c];
            if (t.center)
                m.merge(n, guess[c] + off / n, squares - off * off / n);
            else
                m.merge(n, 0.0, squares);
        }
        s.set(g, t, k, kept(t, block * groups + k, m));
    }
}

inline void spread(const Columns& g, const Tensors& t, Index block, const Spread& s) {
    const Index groups = g.channels / g.group;
    for (Index k = 0; k < groups; ++k) s.set(g, t, k, given(t, t.given ? k : block * groups + k));
}

template <class T, int A, bool R>
void apply_columns(const Columns& g, const Tensors& t, Index from, Index to, const Spread& s) {
    const T* const x = (const T*)t.x;
    const T* const residual = (const T*)t.residual;
    T* const y = (T*)t.y;
    if (!y) return;
    const Index channels = g.channels, rows = block_rows(channels);
    const bool past = past_caches(y, g.blocks * g.length * channels) && channels % W == 0;
    const bool remote = from_memory<T>(g);
    // Backwards: what was read last for the statistics is still in a cache.
    for (Index end = to; end > from; end -= rows) {
        const Index m = end - from < rows ? from : end - rows;
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], gain[N], shift[N];
            for (int u = 0; u < N; ++u) {
                mean[u] = read(s.mean + c + u * W, lanes);
                gain[u] = read(s.gain + c + u * W, lanes);
                shift[u] = read(s.shift + c + u * W, lanes);
            }
            for (Index r = end; r-- > m;)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    if (remote) fetch(x + at - AHEAD * channels);
                    vf z = (read(x + at, lanes) - mean[u]) * gain[u] + shift[u];
                    if constexpr (R) z += read(residual + at, lanes);
                    write(y + at, activate<A>(z), lanes, past);
                }
        });
    }
}

// The sums of a matrix are those of its pieces, added in their order. How many there are depends on the matrix alone,
// neither on threads nor on other matrices: so a sample has the same statistics in every batch.
constexpr Index PIECE = 2;  // blocks, at least
constexpr int PIECES = 16;  // at most: each has sums of all columns

inline int pieces(const Columns& g) {
    const Index found = g.length / (PIECE * block_rows(g.channels));
    return found < 1 ? 1 : found > PIECES ? PIECES : (int)found;
}

template <class T>
void piece_sums(const Columns& g, const Tensors& t, Index start, int piece, const float* guess, double* sums) {
    for (Index c = 0; c < 2 * g.channels; ++c) sums[c] = 0;
    const int count = pieces(g);
    column_deviations((const T*)t.x, start + bound(g.length, piece, count), start + bound(g.length, piece + 1, count),
                      g.channels, guess, sums);
}

inline void add(double* to, const double* more, Index count) {
    for (Index k = 0; k < count; ++k) to[k] += more[k];
}

// The statistics of a block. `parts` has room for the sums of all pieces, `guesses` for a guess of every thread.
template <class T>
void block_statistics(const Columns& g, const Tensors& t, Index block, double* parts, float* guesses, const Spread& s,
                      const Team& team) {
    const Index width = 2 * g.channels, start = block * g.length;
    const int count = pieces(g);
    // Every thread guesses, and guesses the same: none has to wait for one that is still asleep.
    float* guess = guesses + team.thread * g.channels;
    if (t.center) guess_means((const T*)t.x + start * g.channels, g.length, g.channels, guess);
    for (bool again = false;; again = true, guess = guesses) {
        team.share(count, [&](Index piece) ALWAYS { piece_sums<T>(g, t, start, piece, guess, parts + piece * width); });
        const bool better = team.once([&] {
            for (int piece = 1; piece < count; ++piece) add(parts, parts + piece * width, width);
            if (!again && guess_again(g, t, parts, guesses)) return true;
            settle(g, t, block, parts, guesses, s);
            return false;
        });
        if (!better) return;
    }
}

template <class T, int A, bool R>
void columns_forward(const Columns& g, const Tensors& t) {
    const Teams teams(g.blocks, t.threads);
    const Index sums = t.given ? 0 : pieces(g) * 2 * g.channels, room = (3 + teams.members) * g.channels;
    Array<double> parts(teams.count * sums);
    Array<float> rooms(teams.count * room);
    teams.each([&](Index block, const Team& team, int number) {
        float* const own = rooms.get() + number * room;
        const Spread s(own, g.channels);
        if (t.given)
            team.once([&] { return spread(g, t, block, s), false; });
        else
            block_statistics<T>(g, t, block, parts.get() + number * sums, own + 3 * g.channels, s, team);
        const Index start = block * g.length;
        apply_columns<T, A, R>(g, t, start + bound(g.length, team.thread, team.size),
                               start + bound(g.length, team.thread + 1, team.size), s);
    });
}

// Sums over rows [from, to) of every column: of the gradient before the activation, and of that times the centred input.
template <class T, int A, bool R>
void column_sums(const Columns& g, const Tensors& t, Index from, Index to, const Spread& s, double* sums) {
    const T* const x = (const T*)t.x;
    const T* const dy = (const T*)t.dy;
    const T* const residual = (const T*)t.residual;
    if (!sums_wanted(t)) return;
    const Index channels = g.channels, rows = block_rows(channels);
    for (Index m = from; m < to; m += rows) {
        const Index end = to - m < rows ? to : m + rows;
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], gain[N], shift[N], a[N] = {}, b[N] = {};
            for (int u = 0; u < N; ++u) {
                mean[u] = read(s.mean + c + u * W, lanes);
                gain[u] = read(s.gain + c + u * W, lanes);
                shift[u] = read(s.shift + c + u * W, lanes);
            }
            for (Index r = m; r < end; ++r)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    fetch(x + at + AHEAD * channels);
                    fetch(dy + at + AHEAD * channels);
                    const vf off = read(x + at, lanes) - mean[u];
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), 0, lanes, off, gain[u],
                                                            shift[u]);
                    a[u] += d;
                    b[u] += d * off;
                }
            for (int u = 0; u < N; ++u) {
                add_lanes(sums + c + u * W, a[u], lanes);
                add_lanes(sums + channels + c + u * W, b[u], lanes);
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
    if (!dx && !dresidual) return;
    const Index channels = g.channels, rows = block_rows(channels);
    const bool past = dx && past_caches(dx, g.blocks * g.length * channels) && channels % W == 0;
    const bool remote = from_memory<T>(g);
    const bool fixed = constants(t);
    for (Index end = to; end > from; end -= rows) {
        const Index m = end - from < rows ? from : end - rows;
        tiles(channels, [&](Index c, int lanes, auto vectors) ALWAYS {
            constexpr int N = decltype(vectors)::value;
            vf mean[N], gain[N], shift[N], one[N], two[N];
            for (int u = 0; u < N; ++u) {
                const Index k = c + u * W;
                mean[u] = read(s.mean + k, lanes);
                gain[u] = read(s.gain + k, lanes);
                shift[u] = read(s.shift + k, lanes);
                one[u] = read(c1 + k, lanes);
                two[u] = read(c2 + k, lanes);
            }
            for (Index r = end; r-- > m;)
                for (int u = 0; u < N; ++u) {
                    const Index at = r * channels + c + u * W;
                    if (remote) fetch(x + at - AHEAD * channels), fetch(dy + at - AHEAD * channels);
                    const vf off = read(x + at, lanes) - mean[u];
                    const vf d = before_activation<T, A, R>(dy + at, residual + (R ? at : 0), 0, lanes, off, gain[u],
                                                            shift[u]);
                    if (dx) write(dx + at, corrected(fixed, d * gain[u], one[u], off, two[u]), lanes, past);
                    if (R && dresidual) write(dresidual + at, d, lanes);
                }
        });
    }
}

// What is subtracted in a block: of every column, from the sums over the columns of its group. The second sums become those
// of the normalized input, as dgamma is.
inline void corrections(const Columns& g, const Tensors& t, Index block, double* sums, float* one, float* two) {
    const Index groups = g.channels / g.group;
    for (Index k = 0; k < groups; ++k) {
        const Scale s = given(t, t.given ? k : block * groups + k);
        double sg = 0, sgx = 0;
        for (Index c = k * g.group; c < (k + 1) * g.group; ++c) {
            const double gamma = t.gamma ? t.gamma[c] : 1.0;
            double& product = sums[g.channels + c];
            product -= s.rest * sums[c];
            sg += gamma * sums[c];
            sgx += gamma * product;
            product *= s.rstd;
        }
        const Correction found(t, s, k, sg, sgx, (double)(g.length * g.group));
        for (Index c = k * g.group; c < (k + 1) * g.group; ++c) {
            one[c] = found.one;
            two[c] = found.two;
        }
    }
}

template <class T, int A, bool R>
void columns_backward(const Columns& g, const Tensors& t) {
    const Teams teams(g.blocks, t.threads);
    const Index channels = g.channels, width = 2 * channels, room = (2 + 3 * teams.members) * channels;
    const int count = teams.members > PIECES ? teams.members : pieces(g);
    // Per team: sums of all its blocks, and of the pieces of the current one.
    const Index sums = (1 + count) * width;
    Array<double> totals(teams.count * sums);
    Array<float> rooms(teams.count * room);
    teams.each([&](Index block, const Team& team, int number) {
        double *const total = totals.get() + number * sums, *const parts = total + width;
        float *const one = rooms.get() + number * room, *const two = one + channels;
        const Spread s(two + (1 + 3 * team.thread) * channels, channels);  // every thread's own: none has to wait
        const Index start = block * g.length;
        spread(g, t, block, s);
        team.share(count, [&](Index piece) ALWAYS {
            double* const part = parts + piece * width;
            for (Index k = 0; k < width; ++k) part[k] = 0;
            column_sums<T, A, R>(g, t, start + bound(g.length, piece, count), start + bound(g.length, piece + 1, count), s,
                                 part);
        });
        team.once([&] {
            for (int piece = 1; piece < count; ++piece) add(parts, parts + piece * width, width);
            corrections(g, t, block, parts, one, two);
            add(total, parts, width);
            return false;
        });
        column_gradients<T, A, R>(g, t, start + bound(g.length, team.thread, team.size),
                               start + bound(g.length, team.thread + 1, team.size), s, one, two);
    });
    for (int team = 1; team < teams.count; ++team) add(totals.get(), totals.get() + team * sums, width);
    for (Index c = 0; c < channels; ++c) {
        if (t.dgamma) t.dgamma[c] = (float)totals[channels + c];
        if (t.dbeta) t.dbeta[c] = (float)totals[c];
    }
}

// --- the steps of an LSTM that are no norms --------------------------------------------------------------------------

template <class Body>
ALWAYS inline void each_sample(const Cell& s, Body body) {
#pragma omp parallel for num_threads(s.threads) schedule(static) if (s.threads > 1)
    for (Index row = 0; row < s.rows; ++row)
        along(s.units, [&](Index k, int lanes) ALWAYS { body(row * 4 * s.units + k, row * s.units + k, lanes); });
}

// i, f, o = sigmoid, g = tanh; cell = f before + i g.
void cell_state(const Cell& s) {
    const Index u = s.units;
    each_sample(s, [&](Index gate, Index k, int lanes) ALWAYS {
        float* const z = s.gates + gate;
        const vf i = sigmoid(read(z, lanes)), f = sigmoid(read(z + u, lanes));
        const vf g = hyperbolic_tangent(read(z + 2 * u, lanes)), o = sigmoid(read(z + 3 * u, lanes));
        write(z, i, lanes);
        write(z + u, f, lanes);
        write(z + 2 * u, g, lanes);
        write(z + 3 * u, o, lanes);
        write(s.cell + k, f * read(s.before + k, lanes) + i * g, lanes);
    });
}

// shown = tanh(norm(cell)); out = o shown.
void cell_output(const Cell& s) {
    each_sample(s, [&](Index gate, Index k, int lanes) ALWAYS {
        const vf tanh = hyperbolic_tangent(read(s.shown + k, lanes));
        write(s.shown + k, tanh, lanes);
        write(s.out + k, read(s.gates + gate + 3 * s.units, lanes) * tanh, lanes);
    });
}

void cell_output_backward(const Cell& s) {
    each_sample(s, [&](Index gate, Index k, int lanes) ALWAYS {
        const Index last = gate + 3 * s.units;
        const vf o = read(s.gates + last, lanes), tanh = read(s.shown + k, lanes);
        vf d = read(s.dh + k, lanes);
        if (s.more_h) d += read(s.more_h + k, lanes);
        write(s.dgates + last, d * tanh * (o * (1.0f - o)), lanes);
        write(s.dshown + k, d * o * (1.0f - tanh * tanh), lanes);
    });
}

void cell_state_backward(const Cell& s) {
    const Index u = s.units;
    each_sample(s, [&](Index gate, Index k, int lanes) ALWAYS {
        const float* const a = s.gates + gate;
        float* const d = s.dgates + gate;
        const vf i = read(a, lanes), f = read(a + u, lanes), g = read(a + 2 * u, lanes);
        vf c = read(s.dc + k, lanes) + read(s.from_norm + k, lanes);
        if (s.more_c) c += read(s.more_c + k, lanes);
        write(d, c * g * (i * (1.0f - i)), lanes);
        write(d + u, c * read(s.before + k, lanes) * (f * (1.0f - f)), lanes);
        write(d + 2 * u, c * i * (1.0f - g * g), lanes);
        write(s.dc + k, c * f, lanes);
    });
}

// --- dispatch --------------------------------------------------------------------------------------------------------

#define NORMKIT_CASES(FUNCTION)                                                              \
    template <class T, int A>                                                                \
    void FUNCTION##_2(const G_##FUNCTION& g, const Tensors& t) {                             \
        t.residual && !t.total ? FUNCTION<T, A, true>(g, t) : FUNCTION<T, A, false>(g, t);   \
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
                                    columns_forward_0,          columns_backward_0,
                                    cell_state,                 cell_output,
                                    cell_output_backward,       cell_state_backward};

}  // namespace normkit
