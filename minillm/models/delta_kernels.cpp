// The gated delta rule of training on a CPU, in chunks of tokens: `gated_delta.py` has the
// equations, `cpu_delta.py` says when this is used. Inside a chunk, of the state S before it,
//
//     x_i = v_i - read_i k_i^T S + sum over j < i of l_ij u_j,   u_i = beta_i x_i
//     out_i = read_i q_i^T S + sum over j <= i of p_ij u_j
//     S <- end S + sum over j of write_j k_j u_j^T
//
// where p_ij = left_ij q_i^T k_j, l_ij = -left_ij k_i^T k_j, and left, read, write and end are what
// is left of token j at i, of S at i, of token j at the end and of S at the end. A thread takes a
// key head of a row, with its value heads, from end to end: nothing is added up between threads.
// Everything inside is fp32, in matrices whose rows are filled up to whole vectors with zeros.

#include "small_products.h"
#include "vector_math.h"

using T = NUMBER;  // float or bf16

namespace {

constexpr int64_t C = 32;           // tokens of a chunk
constexpr float NOTHING = -40.0f;   // log decay that leaves nothing, as in `gated_delta.py`
constexpr float FADED = -80.0f;     // e to this is 0, not a denormal number, which is slow
constexpr float UNIT_EPS = 1e-6f;

struct Sizes {
    int64_t rows, length, groups, ratio, keys, values, q_token, k_token, v_token;
    int64_t chunks() const { return (length + C - 1) / C; }
    int64_t heads() const { return groups * ratio; }
    int64_t key_row() const { return (keys + LANES - 1) / LANES * LANES; }
    int64_t value_row() const { return (values + LANES - 1) / LANES * LANES; }
};

// Rows of tokens, zeros for those after the end.
void read_tokens(const T* from, int64_t token, int64_t count, int64_t size, float* to,
                 int64_t row) {
    for (int64_t i = 0; i < count; ++i) copy(from + i * token, to + i * row, size);
    std::memset(to + count * row, 0, (C - count) * row * sizeof(float));
}

inline float fading(float x) { return x < FADED ? 0.0f : exp_of(x); }

// What the value heads of a key head share of a chunk.
struct Keys {
    explicit Keys(const Sizes& s)
        : qk(2 * C * s.key_row()), k_t(s.key_row() * C), dots(2 * C * C) {}

    void read(const Sizes& s, const T* q, const T* k, const int64_t* segment, int64_t at) {
        const int64_t row = s.key_row();
        count = at + C < s.length ? C : s.length - at;
        read_tokens(q + at * s.q_token, s.q_token, count, s.keys, qk, row);
        read_tokens(k + at * s.k_token, s.k_token, count, s.keys, qk + C * row, row);
        for (int64_t i = 0; i < 2 * C; ++i) {
            float* x = qk + i * row;
            const float root = std::sqrt((dot(x, x, row) + UNIT_EPS) * (i < C ? s.keys : 1));
            by[i] = 1.0f / root;
            scale(x, x, by[i], row);
        }
        transpose(qk + C * row, C, row, k_t);
        product({qk, row, 1, FULL}, k_t, 2 * C, row, C, 0, dots);
        for (int64_t i = 0; i < C; ++i) {
            const bool starts = segment && i < count && at + i > 0 &&
                                segment[at + i] != segment[at + i - 1];
            first[i] = starts ? i : i ? first[i - 1] : -1;
        }
    }

    // From the gradient d of unit rows that of rows as they were given.
    void write(const Sizes& s, const float* d, bool is_key, int64_t token, T* to) const {
        const int64_t row = s.key_row(), half = is_key ? C : 0;
        for (int64_t i = 0; i < count; ++i) {
            const float *x = qk + (half + i) * row, *grad = d + i * row, times = by[half + i];
            const float along = dot(x, grad, row) * (is_key ? 1 : s.keys);
            T* out = to + i * token;
#pragma omp simd
            for (int64_t n = 0; n < s.keys; ++n) store(out[n], times * (grad[n] - x[n] * along));
        }
    }

    Buffer qk, k_t, dots;  // unit q over unit k; k transposed; q k^T over k k^T
    float by[2 * C];       // that made them units
    int64_t first[C];      // of each token's document, -1 if that began before the chunk
    int64_t count;         // tokens
};

// What a value head has of a chunk: how it fades and is weighed.
struct Fades {
    Fades() : left(C * C), weights(2 * C * C) {}

    void read(const Keys& keys, const float* g, const float* b, int64_t token) {
        double total = 0;
        float sum[C], rest[C];  // of decays, in two parts: a difference of sums keeps its digits
        for (int64_t i = 0; i < C; ++i) {
            const float by = i < keys.count ? g[i * token] : 0.0f;
            if (keys.first[i] == i) total = 0;
            total += by < NOTHING ? NOTHING : by;
            sum[i] = static_cast<float>(total);
            rest[i] = static_cast<float>(total - sum[i]);
            beta[i] = i < keys.count ? b[i * token] : 0.0f;
        }
        const int64_t last = keys.first[C - 1];
        end = last < 0 ? fading(sum[C - 1]) : 0.0f;
        float *p = weights, *l = weights + C * C;
        for (int64_t i = 0; i < C; ++i) {
            const int64_t low = keys.first[i];
            read_at[i] = low < 0 ? fading(sum[i]) : 0.0f;
            write_at[i] = i < last ? 0.0f : fading(sum[C - 1] - sum[i] + (rest[C - 1] - rest[i]));
            const float *qk = keys.dots + i * C, *kk = qk + C * C;
            const int64_t whole = (i / LANES + 1) * LANES;  // beyond, all are zeros anyway
#pragma omp simd
            for (int64_t j = 0; j < whole; ++j) {
                const float value = fading(sum[i] - sum[j] + (rest[i] - rest[j]));
                const float kept = j >= low && j <= i ? value : 0.0f;
                left[i * C + j] = kept;
                p[i * C + j] = kept * qk[j];
                l[i * C + j] = j < i ? -kept * kk[j] : 0.0f;
            }
        }
    }

    Buffer left, weights;  // weights: p over l
    float beta[C], read_at[C], write_at[C], end;
};

// x += l u from the first token to the last, u = beta x
void solve(const float* l, const float* beta, float* x, float* u, int64_t size) {
    for (int64_t at = 0; at < C; at += TALL) {
        product({l + at * C, C, 1, FULL}, u, TALL, at, size, 1, x + at * size);
        for (int64_t i = at; i < at + TALL; ++i) {
            for (int64_t j = at; j < i; ++j) add(x + i * size, u + j * size, l[i * C + j], size);
            scale(u + i * size, x + i * size, beta[i], size);
        }
    }
}

// y += l^T w from the last token to the first, w = beta y
void solve_back(const float* l, const float* beta, float* y, float* w, int64_t size) {
    for (int64_t at = C - TALL; at >= 0; at -= TALL) {
        const int64_t next = at + TALL;
        product({l + next * C + at, 1, C, FULL}, w + next * size, TALL, C - next, size, 1,
                y + at * size);
        for (int64_t i = next - 1; i >= at; --i) {
            for (int64_t j = i + 1; j < next; ++j)
                add(y + i * size, w + j * size, l[j * C + i], size);
            scale(w + i * size, y + i * size, beta[i], size);
        }
    }
}

// What one thread needs for the backward pass of a value head.
struct Gradients {
    explicit Gradients(const Sizes& s)
        : given(2 * C * s.value_row()), x(C * s.value_row()), u(C * s.value_row()),
          y(C * s.value_row()), u_t(s.value_row() * C), state(s.key_row() * s.value_row()),
          state_t(s.key_row() * s.value_row()), d_state_t(s.key_row() * s.value_row()),
          d_weights(2 * C * C), seen(2 * C * s.key_row()) {}

    Buffer given;           // the gradient of out over that of x
    Buffer x, u, y;         // y: the gradient of u
    Buffer u_t, state, state_t, d_state_t, d_weights, seen;
    float d_sum[C], d_beta[C];
};

// The gradients of a value head: of x (in `given`), of beta, of the fades' exponents (d_sum), and,
// added, of unit q and k (d_qk) but for their products, of which is d_dots. d_state is that of S
// after the chunk, and becomes that before it.
void backward_chunk(const Sizes& s, const Keys& keys, const Fades& f, Gradients& d, float* d_state,
                    float* d_qk, float* d_dots) {
    const int64_t kr = s.key_row(), vr = s.value_row();
    const float *p = f.weights, *l = f.weights + C * C, *k = keys.qk + C * kr;
    float *w = d.given + C * vr, *d_k = d_qk + C * kr;

    // 1. through out and the state after to u; through u to x
    for (int64_t i = 0; i < C; ++i) scale(d.u + i * vr, d.x + i * vr, f.beta[i], vr);
    product({k, kr, 1, FULL}, d_state, C, kr, vr, 0, d.y);
    for (int64_t i = 0; i < C; ++i) scale(d.y + i * vr, d.y + i * vr, f.write_at[i], vr);
    product({p, 1, C, UPPER}, d.given, C, C, vr, 1, d.y);
    solve_back(l, f.beta, d.y, w, vr);
    for (int64_t i = 0; i < C; ++i) d.d_beta[i] = dot(d.y + i * vr, d.x + i * vr, vr);

    // 2. to p and l, and to what they are made of
    transpose(d.u, C, vr, d.u_t);
    product({d.given, vr, 1, FULL}, d.u_t, 2 * C, vr, C, 0, d.d_weights);
    float column[C] = {};
    for (int64_t i = 0; i < C; ++i) {
        const float *d_p = d.d_weights + i * C, *d_l = d_p + C * C, *left = f.left + i * C;
        float *d_qq = d_dots + i * C, *d_kk = d_qq + C * C, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < C; ++j) {
            const float change = p[i * C + j] * d_p[j] + l[i * C + j] * d_l[j];
            sum += change;
            column[j] += change;
            d_qq[j] += left[j] * d_p[j];
            d_kk[j] -= j < i ? left[j] * d_l[j] : 0.0f;
        }
        d.d_sum[i] = sum;
    }

    // 3. to the keys that were written, and to what was left of them
    transpose(d_state, kr, vr, d.d_state_t);
    transpose(d.state, kr, vr, d.state_t);
    float d_end = f.end * dot(d.state, d_state, kr * vr);
    product({d.u, vr, 1, FULL}, d.d_state_t, C, vr, kr, 0, d.seen);
    for (int64_t i = 0; i < C; ++i) {
        const float change = f.write_at[i] * dot(k + i * kr, d.seen + i * kr, kr);
        add(d_k + i * kr, d.seen + i * kr, f.write_at[i], kr);
        column[i] += change;
        d_end += change;
    }

    // 4. to queries and keys that read S, and to S before
    product({d.given, vr, 1, FULL}, d.state_t, 2 * C, vr, kr, 0, d.seen);
    for (int64_t i = 0; i < C; ++i) {
        const float *at_q = d.seen + i * kr, *at_k = at_q + C * kr, read = f.read_at[i];
        add(d_qk + i * kr, at_q, read, kr);
        add(d_k + i * kr, at_k, -read, kr);
        d.d_sum[i] += read * (dot(keys.qk + i * kr, at_q, kr) - dot(k + i * kr, at_k, kr));
        d.d_sum[i] -= column[i];
    }
    d.d_sum[C - 1] += d_end;
    for (int64_t i = 0; i < C; ++i) {  // `seen` has had its use, and is as long as qk
        scale(d.seen + i * kr, keys.qk + i * kr, f.read_at[i], kr);
        scale(d.seen + (C + i) * kr, k + i * kr, -f.read_at[i], kr);
    }
    product({d.seen, 1, kr, FULL}, d.given, kr, 2 * C, vr, f.end, d_state);
}

// Through q k^T and k k^T to unit q and k.
void backward_dots(const Sizes& s, const Keys& keys, const float* d_dots, float* d_qk) {
    const int64_t kr = s.key_row();
    const float *q = keys.qk, *k = q + C * kr, *d_kk = d_dots + C * C;
    float* d_k = d_qk + C * kr;
    product({d_dots, C, 1, LOWER}, k, C, C, kr, 1, d_qk);
    product({d_dots, 1, C, UPPER}, q, C, C, kr, 1, d_k);
    product({d_kk, C, 1, LOWER}, k, C, C, kr, 1, d_k);
    product({d_kk, 1, C, UPPER}, k, C, C, kr, 1, d_k);
}

// From gradients of the sums of g those of g.
void write_decay(const Keys& keys, const float* d_sum, const float* g, float* d_g, int64_t token) {
    float sum = 0;
    for (int64_t i = C - 1; i >= 0; --i) {
        sum += d_sum[i];
        if (i < keys.count) d_g[i * token] = g[i * token] < NOTHING ? 0.0f : sum;
        if (keys.first[i] == i) sum = 0;
    }
}

}  // namespace

extern "C" {

// Of rows x length tokens with `groups` key heads and `ratio` times as many value heads; tokens of
// q, k and v are q_token, k_token and v_token numbers apart. `x` (tokens x heads x values) and
// `states` (rows x heads x chunks x keys x values, S before each chunk) are for the backward pass,
// `last` is S after the last token. `segment` may be null.
void minillm_delta(const T* q, const T* k, const T* v, const float* g, const float* beta,
                   const int64_t* segment, T* out, float* x, float* states, float* last,
                   int64_t rows, int64_t length, int64_t groups, int64_t ratio, int64_t keys,
                   int64_t values, int64_t q_token, int64_t k_token, int64_t v_token) {
    const Sizes s{rows, length, groups, ratio, keys, values, q_token, k_token, v_token};
    const int64_t kr = s.key_row(), vr = s.value_row(), heads = s.heads(), size = heads * values;
#pragma omp parallel
    {
        Keys shared(s);
        Fades f;
        Buffer state(ratio * kr * vr), found(2 * C * vr), lack(C * vr), u(C * vr);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < rows * groups; ++item) {
            const int64_t b = item / groups, group = item % groups, token = b * length;
            std::memset(state, 0, ratio * kr * vr * sizeof(float));
            for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
                const int64_t at = chunk * C, now = token + at;
                shared.read(s, q + token * q_token + group * keys,
                            k + token * k_token + group * keys,
                            segment ? segment + token : nullptr, at);
                for (int64_t r = 0; r < ratio; ++r) {
                    const int64_t head = group * ratio + r;
                    float *matrix = state + r * kr * vr;
                    float* saved =
                        states + ((b * heads + head) * s.chunks() + chunk) * keys * values;
                    for (int64_t n = 0; n < keys; ++n)
                        copy(matrix + n * vr, saved + n * values, values);
                    f.read(shared, g + now * heads + head, beta + now * heads + head, heads);
                    read_tokens(v + now * v_token + head * values, v_token, shared.count, values,
                                lack, vr);
                    product({shared.qk, kr, 1, FULL}, matrix, 2 * C, kr, vr, 0, found);
                    for (int64_t i = 0; i < C; ++i) {
                        add(lack + i * vr, found + (C + i) * vr, -f.read_at[i], vr);
                        scale(found + i * vr, found + i * vr, f.read_at[i], vr);
                    }
                    solve(f.weights + C * C, f.beta, lack, u, vr);
                    product({f.weights, C, 1, LOWER}, u, C, C, vr, 1, found);
                    for (int64_t i = 0; i < shared.count; ++i) {
                        const int64_t to = (now + i) * size + head * values;
                        copy(lack + i * vr, x + to, values);
                        copy(found + i * vr, out + to, values);
                    }
                    for (int64_t i = 0; i < C; ++i)
                        scale(u + i * vr, u + i * vr, f.write_at[i], vr);
                    product({shared.qk + C * kr, 1, kr, FULL}, u, kr, C, vr, f.end, matrix);
                }
            }
            for (int64_t n = 0; n < ratio * keys; ++n)
                copy(state + (n / keys * kr + n % keys) * vr,
                     last + ((b * heads + group * ratio) * keys + n) * values, values);
        }
    }
}

// Gradients from those of out and, unless null, `last`; of q, k and v without gaps.
void minillm_delta_backward(const T* q, const T* k, const float* g, const float* beta,
                            const int64_t* segment, const float* x, const float* states,
                            const T* d_out, const float* d_last, T* d_q, T* d_k, T* d_v,
                            float* d_g, float* d_beta, int64_t rows, int64_t length,
                            int64_t groups, int64_t ratio, int64_t keys, int64_t values,
                            int64_t q_token, int64_t k_token) {
    const Sizes s{rows, length, groups, ratio, keys, values, q_token, k_token, 0};
    const int64_t kr = s.key_row(), vr = s.value_row(), heads = s.heads(), size = heads * values;
#pragma omp parallel
    {
        Keys shared(s);
        Fades f;
        Gradients d(s);
        Buffer d_state(ratio * kr * vr), d_qk(2 * C * kr), d_dots(2 * C * C);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < rows * groups; ++item) {
            const int64_t b = item / groups, group = item % groups, token = b * length;
            std::memset(d_state, 0, ratio * kr * vr * sizeof(float));
            for (int64_t n = 0; d_last && n < ratio * keys; ++n)
                copy(d_last + ((b * heads + group * ratio) * keys + n) * values,
                     d_state + (n / keys * kr + n % keys) * vr, values);
            for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
                const int64_t at = chunk * C, now = token + at;
                shared.read(s, q + token * q_token + group * keys,
                            k + token * k_token + group * keys,
                            segment ? segment + token : nullptr, at);
                std::memset(d_qk, 0, 2 * C * kr * sizeof(float));
                std::memset(d_dots, 0, 2 * C * C * sizeof(float));
                for (int64_t r = 0; r < ratio; ++r) {
                    const int64_t head = group * ratio + r, gate = now * heads + head;
                    const int64_t from = now * size + head * values;
                    const float* saved =
                        states + ((b * heads + head) * s.chunks() + chunk) * keys * values;
                    for (int64_t n = 0; n < keys; ++n)
                        copy(saved + n * values, d.state + n * vr, values);
                    f.read(shared, g + gate, beta + gate, heads);
                    read_tokens(d_out + from, size, shared.count, values, d.given, vr);
                    for (int64_t i = 0; i < shared.count; ++i)
                        copy(x + from + i * size, d.x + i * vr, values);
                    std::memset(d.x + shared.count * vr, 0,
                                (C - shared.count) * vr * sizeof(float));
                    backward_chunk(s, shared, f, d, d_state + r * kr * vr, d_qk, d_dots);
                    write_decay(shared, d.d_sum, g + gate, d_g + gate, heads);
                    for (int64_t i = 0; i < shared.count; ++i) {
                        d_beta[gate + i * heads] = d.d_beta[i];
                        copy(d.given + (C + i) * vr, d_v + from + i * size, values);
                    }
                }
                backward_dots(s, shared, d_dots, d_qk);
                const int64_t row = groups * keys, to = now * row + group * keys;
                shared.write(s, d_qk, false, row, d_q + to);
                shared.write(s, d_qk + C * kr, true, row, d_k + to);
            }
        }
    }
}

}  // extern "C"
