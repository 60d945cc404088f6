// All kernels of ours, by name.
#include "common.cuh"
#include "attention.cuh"
#include "warpgroup.cuh"

namespace elementwise {
#include "elementwise.cu"
#undef KERNELS
}
namespace reduce {
#include "reduce.cu"
#undef LANES
#undef MOST_THREADS
#undef SUMS
#undef KERNELS
#undef THREADS
}
namespace norm {
#include "norm.cu"
#undef KERNELS
}
namespace deviation {
#include "deviation.cu"
#undef THREADS
#undef MOST
}
namespace picture {
#include "picture.cu"
#undef KERNELS
#undef THREADS
}
namespace attention {
#include "attention.cu"
#undef ROWS
#undef THREADS
}
namespace attention_hopper {
#include "attention_hopper.cu"
#undef ROWS
#undef THREADS
#undef TILE
#undef TILES
}
namespace attention_any {
#include "attention_any.cu"
}

using namespace elementwise;
using namespace reduce;
using namespace norm;
using namespace deviation;
using namespace picture;
using namespace attention;
using namespace attention_hopper;
using namespace attention_any;

#define ONE(kernel) {#kernel, host::Entry<kernel>::bind},
#define BOTH(kernel) ONE(kernel##_float) ONE(kernel##_bf16)

static host::Listed listed = {
    BOTH(gelu) BOTH(silu) BOTH(gelu_backward) BOTH(silu_backward) BOTH(bias) BOTH(gated_residual)
    BOTH(gated_residual_backward) BOTH(add_to) BOTH(add) ONE(adamw) ONE(lerp) ONE(time_features)
    ONE(bf16x3) ONE(bf16x3_backward)
    BOTH(sum_plain) BOTH(sum_product) BOTH(sum_normalised) BOTH(join_sums)
    BOTH(sum_plain_packs) BOTH(sum_product_packs) BOTH(sum_normalised_packs) ONE(square_sum)
    BOTH(layer_norm_modulate) BOTH(layer_norm_modulate_backward) BOTH(rms_norm) BOTH(rms_norm_backward)
    BOTH(rms_norm_head) BOTH(rms_norm_head_backward) ONE(copy_rows)
    ONE(gather) BOTH(channel_sums) BOTH(group_affine) BOTH(apply_affine)
    ONE(deviation_sums) ONE(deviation_backward)
    ONE(attention_delta) ONE(attention_forward) ONE(attention_backward_keys) ONE(attention_backward_queries)
    ONE(attention_hopper_forward) ONE(attention_hopper_backward_keys) ONE(attention_hopper_backward_queries)
    BOTH(attention_any) BOTH(attention_any_delta) BOTH(attention_any_backward_keys) BOTH(attention_any_backward_queries)
    BOTH(attention_wide) BOTH(attention_wide_delta) BOTH(attention_wide_backward_keys) BOTH(attention_wide_backward_queries)
};

// Runs a kernel for tests/cuda_kernels. 0, or 1 for an unknown name.
extern "C" int host_launch(const char *name, void **arguments, const unsigned *grid, const unsigned *threads) {
    const host::Kernel *kernel = host::find(name);
    if (!kernel) return 1;
    host::run(kernel->bind(arguments), grid, threads);
    return 0;
}
