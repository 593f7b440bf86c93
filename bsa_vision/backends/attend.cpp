// Block-sparse attention of one head in float32, for x86-64: compiled once per instruction set, chosen by compiled.py.
//
// Keys and values are read where they lie, at any row stride and in any token order; nothing is copied together first.
// Logits are kept transposed, (keys, queries): then keys and values are only ever read as scalars, while vectors run along
// the queries, of which one block is transposed per row of blocks. Softmax is online (arXiv 2205.14135), per chunk of keys.
// No torch, no Python: plain C functions of pointers, called without the interpreter's lock.

#include <cmath>
#include <cstdint>

// All strides in elements. A null pointer means: not asked for, or tokens as they come. Mirrored by compiled._Attend.
struct Attend {
    const float *q, *k, *v;              // row t of this head at t * stride, elements of a row adjacent
    float *out;                          // (n_q, dim_v); read for gradients
    float *lse;                          // (n_q,) or null
    const float *rel_h, *rel_w;          // (n_q, rel_rows), (n_q, rel_columns): added to the logits; or null
    const int64_t *key_row, *key_column; // (n_k,) patch coordinates of the keys
    const int64_t *order_q, *order_k;    // index of each packed token, or null
    const int32_t *bounds;               // (rows + 1,) first packed query of each row of blocks
    const int32_t *run_at;               // (rows + 1,) first run of each row
    const int32_t *runs;                 // (runs, 2) first and one past the last packed key
    float *scratch;                      // see compiled.py for how much
    // Gradients only. grad_k and grad_v are added to and have rows of whole vectors; the other three have no gaps.
    const float *grad_out;
    float *grad_q, *grad_k, *grad_v, *grad_rel_h, *grad_rel_w;
    int64_t q_stride, k_stride, v_stride, out_stride, rel_h_stride, rel_w_stride;
    int64_t grad_out_stride, grad_k_stride, grad_v_stride;
    int64_t dim, dim_v, rel_rows, rel_columns;
    int64_t first, last;                 // rows of blocks to compute
    float scale;
};

constexpr int CHUNK = 128;               // keys per step of the online softmax
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LOWEST = -3e38f;         // finite: a maximum of -inf would make NaN of its differences
// 2^f for f in [-1/2, 1/2] as 1 + f * (C1 + f * (...)): least maximal relative error, 9e-8, with 2^0 = 1 exactly.
constexpr float C1 = 0.6931470036506653f, C2 = 0.24022242426872253f, C3 = 0.05550733581185341f,
                C4 = 0.009671512991189957f, C5 = 0.001326472731307149f;

#if defined(__x86_64__) && defined(__GNUC__)

#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#define LANES 16
#define KEYS 4    // keys, or dims, per step of a product, and vectors of queries: as many sums as fit the registers
#define VECTORS 4
namespace avx512 {
#include "attend_isa.h"
#include "attend_gradient_isa.h"
}
#undef TARGET
#undef LANES
#undef KEYS

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define KEYS 3
namespace avx2 {
#include "attend_isa.h"
#include "attend_gradient_isa.h"
}

extern "C" {
void attend_avx512(const Attend *a) { avx512::attend(*a); }
void attend_avx2(const Attend *a) { avx2::attend(*a); }
void attend_gradient_avx512(const Attend *a) { avx512::attend_gradient(*a); }
void attend_gradient_avx2(const Attend *a) { avx2::attend_gradient(*a); }
}

#endif
