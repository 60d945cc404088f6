// The matrix instructions of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix").
//
// With g = lane / 4 and t = lane % 4, a lane holds of
//   A [16, 16], row by row:  (g, 2t..) (g + 8, 2t..) (g, 2t + 8..) (g + 8, 2t + 8..), each two neighbours of a row
//   B [16, 8]:               (2t.., g) (2t + 8.., g), each two neighbours of a column
//   C [16, 8], f32:          (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// so two tiles of C, side by side and rounded to bf16, are one tile of A.
#pragma once
#include "common.cuh"

#ifdef __CUDACC__
// c += a b.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of shared memory, transposed: lane i names row i % 8 of tile i / 8.
__device__ __forceinline__ void load_transposed(u32 (&r)[4], const bf16 *row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// Two numbers in a register, the first in its lower half.
__device__ __forceinline__ u32 pair(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// 2^x in one instruction, to 2 units of the last place; 0 where f32 would need more than its exponent.
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

__device__ __forceinline__ u32 pair_at(const bf16 *at) { return *reinterpret_cast<const u32 *>(at); }
