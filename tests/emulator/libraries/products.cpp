// libcublas and libcublasLt: matrix products, column by column as theirs, with what follows them.
//
// cuBLASLt has no way where the real one has none that we rely on, and with EMULATED_GPU_PLAIN_PRODUCTS=1 none for
// anything but the product itself: then the program takes the ways round it.
#include "stream.h"
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

// cudaDataType
enum Type { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };
const int INVALID_VALUE = 7, NOT_SUPPORTED = 15;

size_t size_of(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

float load(const void *from, size_t i, int type) {
    switch (type) {
    case F32: return static_cast<const float *>(from)[i];
    case F64: return static_cast<const double *>(from)[i];
    case BF16: {
        uint32_t bits = (uint32_t)static_cast<const uint16_t *>(from)[i] << 16;
        float value;
        return std::memcpy(&value, &bits, 4), value;
    }
    }
    std::abort();
}

void store(void *to, size_t i, int type, float value) {
    switch (type) {
    case F32: static_cast<float *>(to)[i] = value; return;
    case F64: static_cast<double *>(to)[i] = value; return;
    case BF16: {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        static_cast<uint16_t *>(to)[i] = std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        return;
    }
    }
    std::abort();
}

// A matrix whose columns are `stride` apart.
struct Matrix {
    const void *at;
    int type;
    size_t stride;
};

// op(a) [m, k] as rows of k numbers.
std::vector<float> rows_of(const Matrix &a, bool transposed, size_t m, size_t k) {
    std::vector<float> rows(m * k);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < k; j++)
            rows[i * k + j] = load(a.at, transposed ? i * a.stride + j : j * a.stride + i, a.type);
    return rows;
}

// Sixteen sums side by side, then their sum: always in one order.
float dot(const float *a, const float *b, size_t n) {
    float sums[16] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += a[i + lane] * b[i + lane];
    float sum = 0.f;
    for (; i < n; i++) sum += a[i] * b[i];
    for (float lane : sums) sum += lane;
    return sum;
}

// finish(row, column, sum) for each number of op(a) op(b).
template <typename F> void multiply(const Matrix &a, bool a_transposed, const Matrix &b, bool b_transposed, size_t m,
                                    size_t n, size_t k, F finish) {
    auto left = rows_of(a, a_transposed, m, k), right = rows_of(b, !b_transposed, n, k);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) finish(i, j, dot(&left[i * k], &right[j * k], k));
}

float gelu_inner(float x) { return (float)M_SQRT2 * (float)M_2_SQRTPI * 0.5f * (x + 0.044715f * x * x * x); }
float gelu(float x) { return 0.5f * x * (1.f + std::tanh(gelu_inner(x))); }
float gelu_slope(float x) {
    float t = std::tanh(gelu_inner(x));
    float inner = (float)M_SQRT2 * (float)M_2_SQRTPI * 0.5f * (1.f + 3.f * 0.044715f * x * x);
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * inner;
}

struct Handle {
    void *stream = nullptr;
};

// cublasLtMatrixLayoutOpaque and the like, as far as they are asked for.
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Operation {
    int32_t transposed_a = 0, transposed_b = 0, epilogue = 1;
    uint64_t bias = 0, beside = 0;
    int64_t beside_stride = 0;
};
struct Wishes {};

enum { DEFAULT = 1, BIAS = 4, GELU_BIAS = 36, GELU_AUX_BIAS = 164, DGELU = 192 };

struct Chosen {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

bool has_way(const Operation &operation, const Layout &d) {
    if (operation.epilogue == DEFAULT) return true;
    const char *plain = std::getenv("EMULATED_GPU_PLAIN_PRODUCTS");
    if (plain && *plain == '1') return false;
    bool beside = operation.epilogue == GELU_AUX_BIAS || operation.epilogue == DGELU;
    // Its documentation, cublasLtEpilogue_t: what lies beside in bf16 wants columns of eight numbers.
    return !beside || (d.type == BF16 && operation.beside_stride % 8 == 0);
}

} // namespace

extern "C" {

int cublasCreate_v2(void **handle) { return *handle = new Handle, 0; }
int cublasDestroy_v2(void *handle) { return delete static_cast<Handle *>(handle), 0; }
int cublasSetStream_v2(void *handle, void *stream) { return static_cast<Handle *>(handle)->stream = stream, 0; }
int cublasGemmStridedBatchedEx(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int stride_a, long long next_a, const void *b, int type_b, int stride_b,
                               long long next_b, const void *beta, void *c, int type_c, int stride_c, long long next_c,
                               int count, int sums, int) {
    // CUBLAS_COMPUTE_64F takes its factors in f64, all others that we meet in f32.
    auto factor = [&](const void *at) {
        return sums == 70 ? (float)*static_cast<const double *>(at) : *static_cast<const float *>(at);
    };
    float scale = factor(alpha), keep = factor(beta);
    host::stream_of(static_cast<Handle *>(handle)->stream).give([=] {
        for (int i = 0; i < count; i++) {
            auto at = [&](const void *from, int type, long long next) {
                return (const char *)from + i * next * (long long)size_of(type);
            };
            Matrix left = {at(a, type_a, next_a), type_a, (size_t)stride_a};
            Matrix right = {at(b, type_b, next_b), type_b, (size_t)stride_b};
            void *out = const_cast<char *>(at(c, type_c, next_c));
            multiply(left, op_a != 0, right, op_b != 0, m, n, k, [&](size_t row, size_t column, float sum) {
                size_t place = column * stride_c + row;
                store(out, place, type_c, scale * sum + (keep == 0.f ? 0.f : keep * load(out, place, type_c)));
            });
        }
    });
    return 0;
}

int cublasLtCreate(void **handle) { return *handle = new Handle, 0; }
int cublasLtDestroy(void *handle) { return delete static_cast<Handle *>(handle), 0; }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return *layout = new Layout{type, rows, columns, stride}, 0;
}
int cublasLtMatrixLayoutDestroy(void *layout) { return delete static_cast<Layout *>(layout), 0; }
int cublasLtMatmulDescCreate(void **operation, int, int) { return *operation = new Operation, 0; }
int cublasLtMatmulDescDestroy(void *operation) { return delete static_cast<Operation *>(operation), 0; }
int cublasLtMatmulDescSetAttribute(void *operation, int attribute, const void *value, size_t bytes) {
    auto *it = static_cast<Operation *>(operation);
    auto set = [&](auto &field) {
        return bytes == sizeof field ? (std::memcpy(&field, value, bytes), 0) : INVALID_VALUE;
    };
    switch (attribute) { // cublasLtMatmulDescAttributes_t
    case 3: return set(it->transposed_a);
    case 4: return set(it->transposed_b);
    case 7: return set(it->epilogue);
    case 8: return set(it->bias);
    case 11: return set(it->beside);
    case 12: return set(it->beside_stride);
    }
    return INVALID_VALUE;
}
int cublasLtMatmulPreferenceCreate(void **wishes) { return *wishes = new Wishes, 0; }
int cublasLtMatmulPreferenceDestroy(void *wishes) { return delete static_cast<Wishes *>(wishes), 0; }
int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *, void *operation, void *, void *, void *, void *d, void *, int,
                                   Chosen *chosen, int *count) {
    if (!has_way(*static_cast<Operation *>(operation), *static_cast<Layout *>(d))) return *count = 0, NOT_SUPPORTED;
    *chosen = {};
    return *count = 1, 0;
}
int cublasLtMatmul(void *, void *operation, const void *alpha, const void *a, void *layout_a, const void *b,
                   void *layout_b, const void *beta, const void *c, void *layout_c, void *d, void *layout_d,
                   const void *, void *, size_t, void *stream) {
    Operation op = *static_cast<Operation *>(operation);
    Layout la = *static_cast<Layout *>(layout_a), lb = *static_cast<Layout *>(layout_b),
           lc = *static_cast<Layout *>(layout_c), ld = *static_cast<Layout *>(layout_d);
    size_t m = ld.rows, n = ld.columns, k = op.transposed_a ? la.rows : la.columns;
    bool fits = (op.transposed_a ? la.columns : la.rows) == m && (op.transposed_b ? lb.rows : lb.columns) == n &&
                (op.transposed_b ? lb.columns : lb.rows) == k && lc.rows == m && lc.columns == n;
    if (!fits || !has_way(op, ld)) return INVALID_VALUE;
    bool beside = op.epilogue == GELU_AUX_BIAS || op.epilogue == DGELU,
         biased = op.epilogue != DEFAULT && op.epilogue != DGELU;
    if ((beside && (!op.beside || op.beside % 16)) || (biased && (!op.bias || op.bias % 16))) return INVALID_VALUE;
    float scale = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    host::stream_of(stream).give([=] {
        Matrix left = {a, la.type, (size_t)la.stride},
               right = {b, lb.type, (size_t)lb.stride};
        multiply(left, op.transposed_a, right, op.transposed_b, m, n, k, [&](size_t row, size_t column, float sum) {
            float value = scale * sum + (keep == 0.f ? 0.f : keep * load(c, column * lc.stride + row, lc.type));
            if (biased) value += load((void *)op.bias, row, ld.type);
            size_t place = column * op.beside_stride + row;
            if (op.epilogue == GELU_AUX_BIAS) store((void *)op.beside, place, ld.type, value);
            if (op.epilogue == GELU_BIAS || op.epilogue == GELU_AUX_BIAS) value = gelu(value);
            if (op.epilogue == DGELU) value *= gelu_slope(load((void *)op.beside, place, ld.type));
            store(d, column * ld.stride + row, ld.type, value);
        });
    });
    return 0;
}

} // extern "C"
