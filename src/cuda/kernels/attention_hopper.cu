// attention.cu for compute capability 9.0 (Hopper): the same tensors and sums, with the matrix instructions of a
// warpgroup (warpgroup.cuh). A warpgroup has 64 queries (keys in the pass for dk and dv), in registers, and walks over
// tiles of 64 rows of the other side, which arrive in a ring in shared memory. Forward a block has two warpgroups, which
// share what arrives; going back one, and two such blocks that do not wait for each other fill a multiprocessor better.
//
// A head of 64 features needs as long for its exponentials as for its products, so neither may wait for the other: the
// products of one tile go on while the exponentials of the next are taken (Shah et al., FlashAttention-3, arXiv
// 2407.08608). The assembler would rather wait first and calculate later; it does not where a product takes up what is
// calculated, or a branch. nvdisasm shows the order that came out.
#include "attention.cuh"
#include "warpgroup.cuh"

#define ROWS 64 // of a warpgroup
#define THREADS 128
#define TILE TILE_ROWS
#define TILES (TILE / 8) // of C, side by side in a product

// How many tiles have `tokens` rows.
__device__ __forceinline__ int tiles_of(int tokens) { return (tokens + TILE - 1) / TILE; }

// Starts copying the tile with row `first` of a head, by GROUPS warpgroups; zeros past the end.
template <int GROUPS>
__device__ __forceinline__ void copy_tile(bf16 *tile, const bf16 *from, const Head &head, int first, int tokens) {
#pragma unroll
    for (int i = 0; i < TILE_SIZE / 8 / (GROUPS * THREADS); i++) {
        int piece = threadIdx.x + i * GROUPS * THREADS, row = piece / 8, column = piece % 8;
        bool there = first + row < tokens;
        const bf16 *source = from + head.row(there ? first + row : 0) + column * 8;
        copy<16>(tile + row * DIM + (column ^ row % 8) * 8, source, there);
    }
}

// Turns a tile of logits, before `scale`, into weights; what was summed so far is to be multiplied by `keep`.
//
// A row's `largest` logit is only a reference to which its sums relate: it follows the true one where that is 2^8 times
// heavier, which hardly ever happens after the first tile, and else the sums stay as they are.
__device__ __forceinline__ void weigh(float (&p)[TILES][4], float (&largest)[2], float (&sum)[2], float (&keep)[2],
                                      float scale) {
    const float SLACK = 8.f;
    float most[2] = {largest[0], largest[1]}, reference[2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) most[i / 2] = fmaxf(most[i / 2], p[tile][i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        most[half] = row_max(most[half]); // finite: every tile has a key
        keep[half] = 1.f;
        if ((most[half] - largest[half]) * scale > SLACK) {
            keep[half] = power((largest[half] - most[half]) * scale);
            largest[half] = most[half];
        }
        sum[half] *= keep[half];
        reference[half] = largest[half] * scale;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[tile][i] = power(p[tile][i] * scale - reference[i / 2]);
            sum[i / 2] += p[tile][i];
        }
    }
}

// `scale`: 1 / sqrt(d) times log2(e). `lse` [B, H, T]: log2 of the sum of 2^logit.
// Blocks [ceil(T / (2 ROWS)), H, B].
extern "C" __global__ void __launch_bounds__(2 * THREADS, 2)
    attention_hopper_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *lse, int tokens, int heads,
                             float scale) {
    // A place of the ring has a tile of keys, and of the values one tile earlier: those go together in the loop.
    const int PLACES = 3;
    bf16 *ring = shared_memory();
    const Head head(tokens, heads);
    const int tiles = tiles_of(tokens), first = blockIdx.x * 2 * ROWS + threadIdx.x / WARP * 16;
    auto place = [&](int tile) { return ring + tile % PLACES * 2 * TILE_SIZE; };
    auto fetch = [&](int tile) {
        if (tile < tiles) copy_tile<2>(place(tile), k, head, tile * TILE, tokens);
        if (tile > 0 && tile <= tiles) copy_tile<2>(place(tile) + TILE_SIZE, v, head, (tile - 1) * TILE, tokens);
        commit_copies();
    };
    fetch(0);
    fetch(1);

    u32 queries[STEPS][4], weights[TILE / 16][4];
    load_rows(queries, q, head, first, tokens);
    float out[TILES][4] = {}, p[TILES][4] = {};
    float largest[2] = {-INFINITE, -INFINITE}, sum[2] = {0.f, 0.f}, keep[2];

    wait_copies<1>();
    __syncthreads();
    fetch(2);
    begin_products(p, queries);
    start_logits(p, queries, place(0));
    commit_products();
    wait_products<0>(p);
    if (tiles == 1) mask_keys(p, 0, tokens);
    weigh(p, largest, sum, keep, scale);
    round_tiles(weights, p);

    for (int tile = 1; tile < tiles; tile++) {
        wait_copies<1>();
        __syncthreads(); // the tile is there, and the one before is no longer read
        begin_products(p, out, weights);
        start_logits(p, queries, place(tile));
        commit_products();
        start_sums(out, weights, place(tile) + TILE_SIZE);
        commit_products();
        wait_products<1>(p);
        if (tile == tiles - 1) mask_keys(p, tile * TILE, tokens);
        weigh(p, largest, sum, keep, scale);
        if (calculated(sum[0] + sum[1])) fetch(tile + 2);
        wait_products<0>(out);
        if (__any_sync(FULL, keep[0] != 1.f || keep[1] != 1.f)) {
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) out[i / 4][i % 4] *= keep[i % 4 / 2];
        }
        round_tiles(weights, p);
    }

    wait_copies<0>();
    __syncthreads();
    begin_products(out, weights);
    start_sums(out, weights, place(tiles) + TILE_SIZE);
    commit_products();
    wait_products<0>(out);

    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
    store_rows(o, head, out, first, tokens, 1.f / sum[0], 1.f / sum[1]);
    int lane = threadIdx.x % WARP, row = first + lane / 4;
    if (lane % 4 == 0) {
        float *line = lse + ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
        if (row < tokens) line[row] = largest[0] * scale + log2f(sum[0]);
        if (row + 8 < tokens) line[row + 8] = largest[1] * scale + log2f(sum[1]);
    }
}

// Gradients of keys and values: a block has 64 keys. Here the logits stand transposed, [keys, queries].
// `delta` [B, H, T]: sum over features of o do.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_hopper_backward_keys(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse,
                                   const float *delta, bf16 *dk, bf16 *dv, int tokens, int heads, float scale,
                                   float factor) {
    // A place of the ring has a tile of queries, one of gradients, and for each two queries (lse, lse, delta, delta);
    // tiles begin at whole kilobytes. Products read this tile and the one before, while the next is on its way and the
    // next but one is asked for.
    const int PLACES = 4, SIZE = 2 * TILE_SIZE + 512;
    bf16 *ring = shared_memory();
    const Head head(tokens, heads);
    const u64 line = ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
    const int tiles = tiles_of(tokens), first = blockIdx.x * ROWS + threadIdx.x / WARP * 16;
    auto place = [&](int tile) { return ring + tile % PLACES * SIZE; };
    auto fetch = [&](int tile) {
        if (tile < tiles) {
            copy_tile<1>(place(tile), q, head, tile * TILE, tokens);
            copy_tile<1>(place(tile) + TILE_SIZE, d_o, head, tile * TILE, tokens);
            // A thread a number. Past the end all is zero, and so is what a query there adds to any gradient.
            int i = threadIdx.x % TILE, which = threadIdx.x / TILE, query = tile * TILE + i;
            float *to = reinterpret_cast<float *>(place(tile) + 2 * TILE_SIZE) + i / 2 * 4 + which * 2 + i % 2;
            bool there = query < tokens;
            copy<4>(to, (which ? delta : lse) + line + (there ? query : 0), there);
        }
        commit_copies();
    };
    fetch(0);
    fetch(1);

    u32 keys[STEPS][4], values[STEPS][4], weights[TILE / 16][4], slopes[TILE / 16][4] = {};
    load_rows(keys, k, head, first, tokens);
    load_rows(values, v, head, first, tokens);
    float key_gradient[TILES][4] = {}, value_gradient[TILES][4] = {}, p[TILES][4] = {}, dp[TILES][4] = {};

    auto step = [&](int tile, bool begun) {
        wait_copies<1>();
        __syncthreads(); // the tile is there, and the last but one is no longer read
        const float4 *lines = reinterpret_cast<const float4 *>(place(tile) + 2 * TILE_SIZE) + threadIdx.x % 4;
        begin_products(p, dp, key_gradient, slopes);
        start_logits(p, keys, place(tile));
        commit_products();
        if (begun) start_sums(key_gradient, slopes, place(tile - 1));
        start_logits(dp, values, place(tile) + TILE_SIZE);
        commit_products();
        fetch(tile + 2);
        wait_products<1>(p, value_gradient);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            float4 at = lines[i * 4];
            p[i][0] = power(p[i][0] * scale - at.x), p[i][1] = power(p[i][1] * scale - at.y);
            p[i][2] = power(p[i][2] * scale - at.x), p[i][3] = power(p[i][3] * scale - at.y);
        }
        round_tiles(weights, p);
        begin_products(value_gradient, weights);
        start_sums(value_gradient, weights, place(tile) + TILE_SIZE);
        commit_products();
        wait_products<1>(dp, key_gradient);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            float4 at = lines[i * 4];
            p[i][0] *= dp[i][0] - at.z, p[i][1] *= dp[i][1] - at.w;
            p[i][2] *= dp[i][2] - at.z, p[i][3] *= dp[i][3] - at.w;
        }
        round_tiles(slopes, p);
    };
    step(0, false);
    for (int tile = 1; tile < tiles; tile++) step(tile, true);
    begin_products(key_gradient, slopes);
    start_sums(key_gradient, slopes, place(tiles - 1));
    commit_products();
    wait_products<0>(key_gradient, value_gradient);
    store_rows(dk, head, key_gradient, first, tokens, factor, factor);
    store_rows(dv, head, value_gradient, first, tokens, 1.f, 1.f);
}

// Gradient of queries: a block has 64 queries. `factor`: 1 / sqrt(d).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_hopper_backward_queries(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse,
                                      const float *delta, bf16 *dq, int tokens, int heads, float scale, float factor) {
    const int PLACES = 4, SIZE = 2 * TILE_SIZE;
    bf16 *ring = shared_memory();
    const Head head(tokens, heads);
    const u64 line = ((u64)blockIdx.z * heads + blockIdx.y) * tokens;
    const int tiles = tiles_of(tokens), first = blockIdx.x * ROWS + threadIdx.x / WARP * 16;
    auto place = [&](int tile) { return ring + tile % PLACES * SIZE; };
    auto fetch = [&](int tile) {
        if (tile < tiles) {
            copy_tile<1>(place(tile), k, head, tile * TILE, tokens);
            copy_tile<1>(place(tile) + TILE_SIZE, v, head, tile * TILE, tokens);
        }
        commit_copies();
    };
    fetch(0);
    fetch(1);

    u32 queries[STEPS][4], gradients[STEPS][4], slopes[TILE / 16][4] = {};
    load_rows(queries, q, head, first, tokens);
    load_rows(gradients, d_o, head, first, tokens);
    float logs[2], deltas[2], out[TILES][4] = {}, p[TILES][4] = {}, dp[TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + (int)threadIdx.x % WARP / 4 + half * 8;
        logs[half] = row < tokens ? lse[line + row] : INFINITE;
        deltas[half] = row < tokens ? delta[line + row] : 0.f;
    }

    auto step = [&](int tile, bool begun) {
        wait_copies<1>();
        __syncthreads();
        begin_products(p, dp, out, slopes);
        start_logits(p, queries, place(tile));
        commit_products();
        if (begun) start_sums(out, slopes, place(tile - 1));
        start_logits(dp, gradients, place(tile) + TILE_SIZE);
        commit_products();
        wait_products<1>(p);
        if (tile == tiles - 1) mask_keys(p, tile * TILE, tokens);
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) p[i / 4][i % 4] = power(p[i / 4][i % 4] * scale - logs[i % 4 / 2]);
        settle(p);
        fetch(tile + 2);
        wait_products<0>(dp, out);
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) p[i / 4][i % 4] *= dp[i / 4][i % 4] - deltas[i % 4 / 2];
        round_tiles(slopes, p);
    };
    step(0, false);
    for (int tile = 1; tile < tiles; tile++) step(tile, true);
    begin_products(out, slopes);
    start_sums(out, slopes, place(tiles - 1));
    commit_products();
    wait_products<0>(out);
    store_rows(dq, head, out, first, tokens, factor, factor);
}
