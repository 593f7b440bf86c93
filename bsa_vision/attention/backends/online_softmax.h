// Forward pass for one instruction set, included by cpu_kernel.cpp. TARGET: compiler attribute;
// LANES: floats per vector; KEYS x VECTORS: sums that a product keeps at a time.

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#undef INLINE
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE Vec load(const float *p) { return *(const Unaligned *)p; }
INLINE void store(float *p, Vec x) { *(Unaligned *)p = x; }
INLINE Vec splat(float x) { return Vec{} + x; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0, computed as 2^n * 2^f with integer n and |f| <= 1/2. 0 below x = -86.6; any NaN
// stays NaN.
INLINE Vec exp(Vec x) {
    // Adding 1.5 * 2^23 leaves the integer part in the low bits.
    const Vec low = splat(-86.6f), round = splat(12582912.f);
    const Vec shifted = x * LOG2E + round, f = x * LOG2E - (shifted - round);
    const Vec power = ((((C5 * f + C4) * f + C3) * f + C2) * f + C1) * f + 1.f;
    const Vec otherwise = x == x ? Vec{} : x;
    return x >= low ? (Vec)((IntVec)power + ((IntVec)shifted << 23)) : otherwise;
}

// One chunk of kept keys, as pointers: the tokens need not be adjacent.
struct Chunk {
    int64_t count = 0;
    int64_t tokens[CHUNK];
    const float *keys[CHUNK], *values[CHUNK];
    const float *rel_h[CHUNK], *rel_w[CHUNK];  // rows of the transposed relative terms
};

// State of one row of blocks. Matrices are transposed, (dims, width): `count` queries, padded to
// `width`.
struct Row {
    int64_t start, count, width;
    float *q, *out;
    float *m, *l;                              // (width,) row maximum and row sum of the softmax
    float *rel_h, *rel_w, *probs;
};

// N x V products: sums[r][n] += sum over d of rows[r][d] * columns[d][n].
template <int N, int V>
INLINE void multiply(Vec (&sums)[N][V], const float *const *rows, const float *columns,
                     int64_t stride, int64_t count) {
    const float *row[N];
    for (int r = 0; r < N; r++) row[r] = rows[r];
    for (int64_t d = 0; d < count; d++) {
        Vec column[V];
        for (int n = 0; n < V; n++) column[n] = load(columns + d * stride + n * LANES);
        for (int r = 0; r < N; r++)
            for (int n = 0; n < V; n++) sums[r][n] += row[r][d] * column[n];
    }
}

// out[j][i] = k_j . q_i + relative terms, for N keys from j on and V vectors of queries from i on.
// Updates their running maximum `m`.
template <int N, int V>
INLINE void logits(const Attend &a, const Chunk &chunk, int64_t j, const Row &row, int64_t i,
                   float *out, int64_t stride, Vec (&m)[V]) {
    Vec sums[N][V];
    for (int r = 0; r < N; r++)
        for (int n = 0; n < V; n++) {
            const int64_t at = i + n * LANES;
            sums[r][n] = a.rel_h ? load(chunk.rel_h[j + r] + at) + load(chunk.rel_w[j + r] + at)
                                 : Vec{};
        }
    multiply<N, V>(sums, chunk.keys + j, row.q + i, row.width, a.dim);
    for (int r = 0; r < N; r++)
        for (int n = 0; n < V; n++) {
            store(out + (j + r) * stride + n * LANES, sums[r][n]);
            m[n] = larger(sums[r][n], m[n]);
        }
}

// out[d][i] = alpha[i] * out[d][i] + sum over j of values[j][d] * probs[j][i] for N dims from d on.
template <int N, int V>
INLINE void accumulate_pv(const float *const *values, int64_t count, int64_t d, const float *probs,
                          int64_t stride, float *out, int64_t width, const Vec (&alpha)[V]) {
    Vec sums[N][V] = {};
    for (int64_t j = 0; j < count; j++) {
        Vec prob[V];
        for (int n = 0; n < V; n++) prob[n] = load(probs + j * stride + n * LANES);
        const float *value = values[j] + d;
        for (int r = 0; r < N; r++)
            for (int n = 0; n < V; n++) sums[r][n] += value[r] * prob[n];
    }
    for (int r = 0; r < N; r++)
        for (int n = 0; n < V; n++) {
            float *at = out + (d + r) * width + n * LANES;
            store(at, load(at) * alpha[n] + sums[r][n]);
        }
}

// The logits of one chunk of keys, in row.probs, and their maximum, for V vectors of queries.
template <int V>
INLINE void chunk_logits(const Attend &a, const Chunk &chunk, const Row &row, int64_t i,
                         Vec (&m)[V]) {
    for (int n = 0; n < V; n++) m[n] = splat(-INFINITY);
    int64_t j = 0;
    for (; j + KEYS <= chunk.count; j += KEYS)
        logits<KEYS, V>(a, chunk, j, row, i, row.probs, V * LANES, m);
    for (; j < chunk.count; j++) logits<1, V>(a, chunk, j, row, i, row.probs, V * LANES, m);
}

// Add one chunk of keys to the attention of V vectors of queries from i on.
template <int V>
INLINE void attend_chunk(const Attend &a, const Chunk &chunk, const Row &row, int64_t i) {
    Vec m[V], alpha[V], l[V] = {};
    chunk_logits<V>(a, chunk, row, i, m);
    for (int n = 0; n < V; n++) {
        const Vec before = load(row.m + i + n * LANES);
        m[n] = larger(m[n], before);
        alpha[n] = exp(before - m[n]);
        store(row.m + i + n * LANES, m[n]);
    }
    for (int64_t j = 0; j < chunk.count; j++)
        for (int n = 0; n < V; n++) {
            float *at = row.probs + (j * V + n) * LANES;
            const Vec prob = exp(load(at) - m[n]);
            l[n] += prob;
            store(at, prob);
        }
    // Sum within a chunk, then over chunks: one long sum over thousands of keys would lose a digit.
    for (int n = 0; n < V; n++) {
        float *at = row.l + i + n * LANES;
        store(at, load(at) * alpha[n] + l[n]);
    }
    int64_t d = 0;
    for (; d + KEYS <= a.dim_v; d += KEYS)
        accumulate_pv<KEYS, V>(chunk.values, chunk.count, d, row.probs, V * LANES, row.out + i,
                               row.width, alpha);
    for (; d < a.dim_v; d++)
        accumulate_pv<1, V>(chunk.values, chunk.count, d, row.probs, V * LANES, row.out + i,
                            row.width, alpha);
}

// Index in memory of packed token `place`.
INLINE int64_t token(const int64_t *order, int64_t place) { return order ? order[place] : place; }

// (count, dim) rows of `from`, times `scale` -> (dim, width), padded with 0.
INLINE void transpose(const Attend &a, const Row &row, const float *from, int64_t stride,
                      int64_t dim, float scale, float *to) {
    for (int64_t i = 0; i < row.width; i++) {
        const float *x = i < row.count ? from + token(a.order_q, row.start + i) * stride : nullptr;
        for (int64_t d = 0; d < dim; d++) to[d * row.width + i] = x ? x[d] * scale : 0;
    }
}

INLINE Row load_row(const Attend &a, int64_t number) {
    Row row;
    row.start = a.row_start[number];
    row.count = a.row_start[number + 1] - row.start;
    row.width = (row.count + LANES - 1) / LANES * LANES;
    row.q = a.scratch;
    row.out = row.q + a.dim * row.width;
    row.m = row.out + a.dim_v * row.width;
    row.l = row.m + row.width;
    row.rel_h = row.l + row.width;
    row.rel_w = row.rel_h + a.rel_rows * row.width;
    row.probs = row.rel_w + a.rel_columns * row.width;  // (CHUNK, VECTORS * LANES)
    transpose(a, row, a.q, a.q_stride, a.dim, a.scale, row.q);
    if (a.rel_h) {
        transpose(a, row, a.rel_h, a.rel_h_stride, a.rel_rows, 1, row.rel_h);
        transpose(a, row, a.rel_w, a.rel_w_stride, a.rel_columns, 1, row.rel_w);
    }
    for (int64_t i = 0; i < a.dim_v * row.width; i++) row.out[i] = 0;
    for (int64_t i = 0; i < row.width; i++) row.m[i] = LOWEST, row.l[i] = 0;
    return row;
}

// Collect the next kept keys of a row, starting at `key` of `range`; advances both.
INLINE void gather_chunk(const Attend &a, const Row &row, int64_t &range, int64_t end, int64_t &key,
                         Chunk &chunk) {
    chunk.count = 0;
    while (chunk.count < CHUNK && range < end) {
        const int64_t t = token(a.order_k, key), j = chunk.count++;
        chunk.tokens[j] = t;
        chunk.keys[j] = a.k + t * a.k_stride;
        chunk.values[j] = a.v + t * a.v_stride;
        if (a.rel_h) {
            chunk.rel_h[j] = row.rel_h + a.key_row[t] * row.width;
            chunk.rel_w[j] = row.rel_w + a.key_column[t] * row.width;
        }
        if (++key == a.key_ranges[2 * range + 1] && ++range < end) key = a.key_ranges[2 * range];
    }
}

// Write output and log-sum-exp of one row. They are 0 and +inf for a query without keys, or whose
// logits are all -inf.
INLINE void normalise_row(const Attend &a, const Row &row) {
    for (int64_t i = 0; i < row.count; i++) {
        const int64_t t = token(a.order_q, row.start + i);
        const float m = row.m[i], l = row.l[i], inverse = 1 / l;
        for (int64_t d = 0; d < a.dim_v; d++)
            a.out[t * a.out_stride + d] = l == 0 ? 0 : row.out[d * row.width + i] * inverse;
        if (a.lse)
            a.lse[t * a.lse_stride] = l == 0 || m == INFINITY ? INFINITY : m + std::log(l);
    }
}

// One row of blocks of one head.
TARGET static void attend_row(const Attend &a, int64_t number) {
    Chunk chunk;
    const Row row = load_row(a, number);
    const int64_t end = a.row_ptr[number + 1];
    int64_t range = a.row_ptr[number], key = range < end ? a.key_ranges[2 * range] : 0;
    while (range < end) {
        gather_chunk(a, row, range, end, key, chunk);
        int64_t i = 0;
        for (; i + VECTORS * LANES <= row.width; i += VECTORS * LANES)
            attend_chunk<VECTORS>(a, chunk, row, i);
        for (; i + 2 * LANES <= row.width; i += 2 * LANES) attend_chunk<2>(a, chunk, row, i);
        for (; i < row.width; i += LANES) attend_chunk<1>(a, chunk, row, i);
    }
    normalise_row(a, row);
}

static void attend(const Batch &b) {
    for (int64_t unit = b.first; unit < b.last; unit++) {
        const int64_t head = unit / b.rows;
        attend_row(resolve(b, head / b.heads, head % b.heads), unit % b.rows);
    }
}
