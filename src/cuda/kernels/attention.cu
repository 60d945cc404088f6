// softmax(q k^T / sqrt(d)) v for heads of 64 features in bf16, on the matrix units, never holding T x T (Dao, FlashAttention-2,
// arXiv 2307.08691). Tensors [B, T, H, 64]. A block has four warps and 64 queries (keys in the pass for dk and dv); a warp
// has 16 of them, in registers, and walks over the tiles of the other side in shared memory.
//
// The gradients take two passes, one a block of keys (dk, dv), one a block of queries (dq): seven products instead of
// five, and no atomics, so that a gradient has the same bits every time.
#include "attention.cuh"

#define ROWS 64                // of a block
#define THREADS 128
#define STRIDE (DIM + 8)       // of a row in shared memory: rows of a tile fall into different banks

// A tile of N rows on its way from global through registers to shared memory; zeros past the end.
template <int N> struct Tile {
    static constexpr int PIECES = N * DIM / 8 / THREADS; // 16 bytes each
    uint4 pieces[PIECES];

    __device__ __forceinline__ void fetch(const bf16 *from, const Head &head, int first, int tokens) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int piece = threadIdx.x + i * THREADS, row = first + piece / 8;
            pieces[i] = row < tokens ? *reinterpret_cast<const uint4 *>(from + head.row(row) + piece % 8 * 8)
                                     : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ void put(bf16 *shared) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int piece = threadIdx.x + i * THREADS;
            *reinterpret_cast<uint4 *>(shared + piece / 8 * STRIDE + piece % 8 * 8) = pieces[i];
        }
    }
};

// c[N / 8] = a b^T for a tile b of N rows in shared memory.
template <int TILES> __device__ __forceinline__ void times_rows(float (&c)[TILES][4], const u32 (&a)[STEPS][4], const bf16 *b) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        c[tile][0] = c[tile][1] = c[tile][2] = c[tile][3] = 0.f;
        const bf16 *row = b + (tile * 8 + lane / 4) * STRIDE + lane % 4 * 2;
#pragma unroll
        for (int step = 0; step < STEPS; step++) multiply_add(c[tile], a[step], pair_at(row + step * 16), pair_at(row + step * 16 + 8));
    }
}

// c += p b for p [16, 8 TILES] as C tiles, rounded to bf16, and a tile b of 8 TILES rows in shared memory.
template <int TILES> __device__ __forceinline__ void add_product(float (&c)[DIM / 8][4], const float (&p)[TILES][4], const bf16 *b) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < TILES / 2; step++) {
        const float(&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
        u32 a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]), pair(right[2], right[3])};
        const bf16 *row = b + (step * 16 + lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll
        for (int tile = 0; tile < DIM / 8; tile += 2) {
            u32 r[4];
            load_transposed(r, row + tile * 8);
            multiply_add(c[tile], a, r[0], r[1]);
            multiply_add(c[tile + 1], a, r[2], r[3]);
        }
    }
}

// `scale`: 1 / sqrt(d) times log2(e). `lse` [B, H, T]: log2 of the sum of 2^logit.
// Blocks [ceil(T / ROWS), H, B].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *lse, int tokens, int heads, float scale) {
    const int TILE = 64;
    __shared__ __align__(16) bf16 keys[TILE * STRIDE], values[TILE * STRIDE];
    const Head head(tokens, heads);
    int lane = threadIdx.x % WARP, first = blockIdx.x * ROWS + threadIdx.x / WARP * 16;

    u32 queries[STEPS][4];
    load_rows(queries, q, head, first, tokens);
    float out[DIM / 8][4] = {};
    float largest[2] = {-INFINITE, -INFINITE}, sum[2] = {0.f, 0.f};
    Tile<TILE> next_keys, next_values;
    next_keys.fetch(k, head, 0, tokens);
    next_values.fetch(v, head, 0, tokens);

    for (int start = 0; start < tokens; start += TILE) {
        __syncthreads(); // the tile before is no longer read
        next_keys.put(keys);
        next_values.put(values);
        __syncthreads();
        next_keys.fetch(k, head, start + TILE, tokens);
        next_values.fetch(v, head, start + TILE, tokens);

        float p[TILE / 8][4];
        times_rows(p, queries, keys);
        if (start + TILE > tokens) mask_keys(p, start, tokens);
        float most[2] = {largest[0], largest[1]};
#pragma unroll
        for (int tile = 0; tile < TILE / 8; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) most[i / 2] = fmaxf(most[i / 2], p[tile][i]);
        }
        float keep[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = row_max(most[half]); // finite: every tile has a key
            keep[half] = power((largest[half] - most[half]) * scale);
            largest[half] = most[half];
            sum[half] *= keep[half];
        }
#pragma unroll
        for (int tile = 0; tile < TILE / 8; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[tile][i] = power(p[tile][i] * scale - largest[i / 2] * scale);
                sum[i / 2] += p[tile][i];
            }
        }
#pragma unroll
        for (int tile = 0; tile < DIM / 8; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[tile][i] *= keep[i / 2];
        }
        add_product(out, p, values);
    }

    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
    store_rows(o, head, out, first, tokens, 1.f / sum[0], 1.f / sum[1]);
    if (lane % 4 == 0) {
        float *line = lse + ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
        int row = first + lane / 4;
        if (row < tokens) line[row] = largest[0] * scale + log2f(sum[0]);
        if (row + 8 < tokens) line[row + 8] = largest[1] * scale + log2f(sum[1]);
    }
}

// Gradients of keys and values: a block has 64 keys. Here the logits stand transposed, [keys, queries].
// `delta` [B, H, T]: sum over features of o do.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_keys(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse,
                            const float *delta, bf16 *dk, bf16 *dv, int tokens, int heads, float scale, float factor) {
    const int TILE = 32;
    __shared__ __align__(16) bf16 queries[TILE * STRIDE], gradients[TILE * STRIDE];
    __shared__ float logs[TILE], deltas[TILE];
    const Head head(tokens, heads);
    const u64 line = ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
    int lane = threadIdx.x % WARP, first = blockIdx.x * ROWS + threadIdx.x / WARP * 16;

    u32 keys[STEPS][4], values[STEPS][4];
    load_rows(keys, k, head, first, tokens);
    load_rows(values, v, head, first, tokens);
    float key_gradient[DIM / 8][4] = {}, value_gradient[DIM / 8][4] = {};
    Tile<TILE> next_queries, next_gradients;
    next_queries.fetch(q, head, 0, tokens);
    next_gradients.fetch(d_o, head, 0, tokens);

    for (int start = 0; start < tokens; start += TILE) {
        __syncthreads();
        next_queries.put(queries);
        next_gradients.put(gradients);
        if (threadIdx.x < TILE) {
            int query = start + threadIdx.x;
            // No weight falls on a query past the end.
            logs[threadIdx.x] = query < tokens ? lse[line + query] : INFINITE;
            deltas[threadIdx.x] = query < tokens ? delta[line + query] : 0.f;
        }
        __syncthreads();
        next_queries.fetch(q, head, start + TILE, tokens);
        next_gradients.fetch(d_o, head, start + TILE, tokens);

        float p[TILE / 8][4], dp[TILE / 8][4];
        times_rows(p, keys, queries);
        times_rows(dp, values, gradients);
#pragma unroll
        for (int tile = 0; tile < TILE / 8; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int query = tile * 8 + lane % 4 * 2 + i % 2;
                p[tile][i] = power(p[tile][i] * scale - logs[query]);
                dp[tile][i] = p[tile][i] * (dp[tile][i] - deltas[query]);
            }
        }
        add_product(value_gradient, p, gradients);
        add_product(key_gradient, dp, queries);
    }
    store_rows(dk, head, key_gradient, first, tokens, factor, factor);
    store_rows(dv, head, value_gradient, first, tokens, 1.f, 1.f);
}

// Gradient of queries: a block has 64 queries. `factor`: 1 / sqrt(d).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_queries(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse,
                               const float *delta, bf16 *dq, int tokens, int heads, float scale, float factor) {
    const int TILE = 32;
    __shared__ __align__(16) bf16 keys[TILE * STRIDE], values[TILE * STRIDE];
    const Head head(tokens, heads);
    const u64 line = ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
    int lane = threadIdx.x % WARP, first = blockIdx.x * ROWS + threadIdx.x / WARP * 16;

    u32 queries[STEPS][4], gradients[STEPS][4];
    load_rows(queries, q, head, first, tokens);
    load_rows(gradients, d_o, head, first, tokens);
    float logs[2], deltas[2], out[DIM / 8][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + half * 8;
        logs[half] = row < tokens ? lse[line + row] : INFINITE;
        deltas[half] = row < tokens ? delta[line + row] : 0.f;
    }
    Tile<TILE> next_keys, next_values;
    next_keys.fetch(k, head, 0, tokens);
    next_values.fetch(v, head, 0, tokens);

    for (int start = 0; start < tokens; start += TILE) {
        __syncthreads();
        next_keys.put(keys);
        next_values.put(values);
        __syncthreads();
        next_keys.fetch(k, head, start + TILE, tokens);
        next_values.fetch(v, head, start + TILE, tokens);

        float p[TILE / 8][4], dp[TILE / 8][4];
        times_rows(p, queries, keys);
        times_rows(dp, gradients, values);
        if (start + TILE > tokens) mask_keys(p, start, tokens);
#pragma unroll
        for (int tile = 0; tile < TILE / 8; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                dp[tile][i] = power(p[tile][i] * scale - logs[i / 2]) * (dp[tile][i] - deltas[i / 2]);
        }
        add_product(out, dp, keys);
    }
    store_rows(dq, head, out, first, tokens, factor, factor);
}

// delta [B, H, T]: sum over features of o do. Eight lanes a row of o [n, 64].
extern "C" __global__ void attention_delta(const bf16 *o, const bf16 *d_o, float *delta, u64 n, int tokens, int heads) {
    const int LANES = DIM / Pack<bf16>::SIZE;
    u64 row = FIRST / LANES, lane = threadIdx.x % LANES;
    Pack<bf16> left = {}, right = {};
    if (row < n) {
        left = reinterpret_cast<const Pack<bf16> *>(o)[row * LANES + lane];
        right = reinterpret_cast<const Pack<bf16> *>(d_o)[row * LANES + lane];
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < (int)Pack<bf16>::SIZE; i++) sum += widen(left.at[i]) * widen(right.at[i]);
    sum = group_sum<LANES>(sum);
    if (row >= n || lane != 0) return;
    u64 token = row / heads, line = token / tokens * heads + row % heads;
    delta[line * tokens + token % tokens] = sum;
}
