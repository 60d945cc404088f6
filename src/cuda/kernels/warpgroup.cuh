// The matrix instructions of a warpgroup, four warps together, of compute capability 9.0 (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate"), and the copies to shared memory that feed them.
//
// A [64, 16] stands in registers: warp w has rows 16 w.. as in tensor_core.cuh, and so has it of C [64, 64], whose
// tiles of eight columns lie side by side. B is a tile of 64 rows of 64 numbers in shared memory, 128 bytes each, eight
// rows a kilobyte; of the eight pieces of a row, piece i lies at i ^ row % 8, so that neither rows nor columns meet in a
// bank.
//
// A product goes on while the threads do: its registers are not to be touched until it has been waited for. Where the
// assembler finds that they are, it lets one product wait for the other, and tells so with -Xptxas -v.
#pragma once
#include "common.cuh"

#define ROW 64        // numbers
#define TILE_ROWS 64
#define TILE_SIZE (TILE_ROWS * ROW)

#ifdef __CUDACC__
// 16 bytes (or 4) to shared memory, zeros where there is nothing; not there before wait_copies.
template <int BYTES> __device__ __forceinline__ void copy(void *shared, const void *from, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    int bytes = there ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
// Ends a batch of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until this thread's batches are there but for the last N, and the matrix units may see them; then a barrier is due.
template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile as operand B. It may begin at any feature or row that is a multiple of 16: see `feature` and `token`.
__device__ __forceinline__ u64 operand(const bf16 *tile) {
    // Eight rows further is a kilobyte further; 1 names the order of pieces in rows of 128 bytes.
    u64 address = (u32)__cvta_generic_to_shared(tile), kilobyte = 1024 >> 4, order = 1;
    return (address & 0x3ffff) >> 4 | kilobyte << 16 | kilobyte << 32 | order << 62;
}

// Keeps the compiler from moving what reads or writes these registers across.
template <int TILES> __device__ __forceinline__ void settle(float (&c)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}
__device__ __forceinline__ void settle(u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Before products whose registers have been written since the last ones.
template <typename... Registers> __device__ __forceinline__ void begin_products(Registers &...registers) {
    (settle(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a batch of products.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until the batches are done but for the last N; `registers`: of those that are done.
template <int N, typename... Registers> __device__ __forceinline__ void wait_products(Registers &...registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (settle(registers), ...);
}

// c = a b, added to c where ADD. With TOKENS b is 16 rows of the tile, else 16 features of it, transposed.
template <bool TOKENS, bool ADD>
__device__ __forceinline__ void start_product(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("{.reg .pred add;\n"
                 "setp.ne.b32 add, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
                 "{%32,%33,%34,%35}, %36, add, 1, 1, %38;}\n"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
                   "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
                   "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
                   "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
                   "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
                   "+f"(c[7][2]), "+f"(c[7][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)ADD), "n"((int)TOKENS)
                 : "memory");
}

// The memory that the launch asks for.
__device__ __forceinline__ bf16 *shared_memory() {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<bf16 *>(shared);
}
#endif

// True, for an x that is never negative. The assembler cannot know, so that it has to calculate x for a branch on it.
__device__ __forceinline__ bool calculated(float x) { return !__any_sync(FULL, x < 0.f); }

// The operand that begins at a later feature, or row, of a tile.
__device__ __forceinline__ u64 feature(u64 operand, int number) { return operand + number * sizeof(bf16) / 16; }
__device__ __forceinline__ u64 token(u64 operand, int number) { return operand + number * ROW * sizeof(bf16) / 16; }

// Starts c = a b^T, over 64 features, for a tile b.
__device__ __forceinline__ void start_logits(float (&c)[8][4], const u32 (&a)[4][4], const bf16 *tile) {
    u64 b = operand(tile);
    start_product<false, false>(c, a[0], b);
#pragma unroll
    for (int step = 1; step < 4; step++) start_product<false, true>(c, a[step], feature(b, step * 16));
}

// Starts c += a b, over the 64 rows of a tile b.
__device__ __forceinline__ void start_sums(float (&c)[8][4], const u32 (&a)[4][4], const bf16 *tile) {
    u64 b = operand(tile);
#pragma unroll
    for (int step = 0; step < 4; step++) start_product<true, true>(c, a[step], token(b, step * 16));
}

// Rounds C to what is A of the next product.
__device__ __forceinline__ void round_tiles(u32 (&a)[4][4], const float (&c)[8][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) a[i / 4][i % 4] = pair(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}
