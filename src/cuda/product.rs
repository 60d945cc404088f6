//! Matrix products by cuBLASLt, with what candle's do in passes of their own: a bias, GELU, a factor, a sum to add to.

use super::elementwise;
use super::gpu::{Array, allocate};
use super::library::Library;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Error, Result, bail};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Wish};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Rows of numbers one after the other, or the transposed of that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    array: &'a Array,
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl<'a> Matrix<'a> {
    /// An array `[.., width]`, whatever its shape.
    pub fn new(array: &'a Array, width: usize) -> Self {
        Self { array, rows: array.len() / width.max(1), columns: width, is_transposed: false }
    }

    /// Its transposed matrix.
    pub fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, is_transposed: !self.is_transposed, ..self }
    }

    /// Length of a row as it lies in memory.
    fn stride(&self) -> usize {
        if self.is_transposed { self.rows } else { self.columns }
    }
}

/// What is done to a product on its way to memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Then<'a> {
    /// Nothing.
    Store,
    /// It is added to what is there.
    Add,
    /// A bias `[n]` is added to each row.
    Bias(&'a Array),
    /// A bias `[n]` is added to each row, and an array of y's shape.
    BiasOnto(&'a Array, &'a Array),
    /// A bias is added and GELU taken, in bf16; what was before GELU goes to the array.
    BiasGelu(&'a Array, Option<&'a Array>),
    /// It is multiplied by the slope of GELU at the numbers of an array of y's shape.
    GeluSlope(&'a Array),
}

impl Then<'_> {
    fn epilogue(&self) -> sys::cublasLtEpilogue_t {
        use sys::cublasLtEpilogue_t as Epilogue;
        match self {
            Then::Store | Then::Add => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            Then::Bias(_) | Then::BiasOnto(..) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            Then::BiasGelu(_, None) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
            Then::BiasGelu(_, Some(_)) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Then::GeluSlope(_) => Epilogue::CUBLASLT_EPILOGUE_DGELU,
        }
    }
}

/// `y = factor a b`, and then: a `[m, k]`, b `[k, n]`, y `[m, n]`, all of one type, sums in f32. What the library does not do
/// in one pass for these sizes follows in passes of its own.
///
/// # Errors
/// Shapes or types that do not fit, and the library's.
pub(crate) fn multiply(gpu: &CudaDevice, factor: f32, a: Matrix, b: Matrix, y: &Array, then: Then) -> Result<()> {
    if multiplied(gpu, factor, a, b, y, then)? {
        return Ok(());
    }
    match then {
        Then::Store | Then::Add => bail!("cuBLASLt has no way to multiply {a:?} and {b:?}"),
        Then::Bias(bias) => {
            multiply(gpu, factor, a, b, y, Then::Store)?;
            elementwise::add_bias(gpu, y, bias)
        }
        Then::BiasOnto(bias, other) => {
            let (_memory, product) = allocate(gpu, y.dtype, &y.shape)?;
            multiply(gpu, factor, a, b, &product, Then::Bias(bias))?;
            elementwise::add_into(gpu, &product, other, y)
        }
        Then::BiasGelu(bias, before) => {
            let (_memory, own) = allocate(gpu, y.dtype, &y.shape)?;
            let before = before.unwrap_or(&own);
            multiply(gpu, factor, a, b, before, Then::Bias(bias))?;
            elementwise::activate(gpu, "gelu", before, y)
        }
        Then::GeluSlope(before) => {
            let (_memory, product) = allocate(gpu, y.dtype, &y.shape)?;
            multiply(gpu, factor, a, b, &product, Then::Store)?;
            elementwise::activate_backward(gpu, "gelu", before, &product, y)
        }
    }
}

/// [`multiply`] in one pass, or the answer that the library has no way to do that.
fn multiplied(gpu: &CudaDevice, factor: f32, a: Matrix, b: Matrix, y: &Array, then: Then) -> Result<bool> {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    if b.rows != k || y.len() != m * n {
        bail!("a product of {a:?} and {b:?} is no {y:?}");
    }
    if m * n == 0 {
        return Ok(true);
    }
    let (number, sums) = match (y.dtype, [a.array.dtype, b.array.dtype] == [y.dtype; 2]) {
        (DType::F32, true) => (sys::cudaDataType_t::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
        (DType::BF16, true) => (sys::cudaDataType_t::CUDA_R_16BF, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
        _ => bail!("a product of {a:?} and {b:?} as {y:?}"),
    };
    let blas = Blas::of(gpu)?;
    // The library's matrices lie column by column, so that it sees each of ours transposed: y^T = b^T a^T.
    let (left, right) = (Layout::of(number, &b)?, Layout::of(number, &a)?);
    let out = Layout::new(number, n, m, n)?;
    let operation = Operation::new(sums)?;
    operation.set(Of::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(b.is_transposed))?;
    operation.set(Of::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(a.is_transposed))?;
    operation.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE, then.epilogue())?;
    // The library is told how the matrices are aligned, not how these are; a bias may lie anywhere in a flat vector.
    let beside = match then {
        Then::Store | Then::Add => [None, None],
        Then::Bias(bias) | Then::BiasOnto(bias, _) => [Some(bias), None],
        Then::BiasGelu(bias, before) => [Some(bias), before],
        Then::GeluSlope(before) => [Some(before), None],
    };
    if beside.into_iter().flatten().any(|array| !array.pointer.is_multiple_of(16)) {
        return Ok(false);
    }
    if let Then::Bias(bias) | Then::BiasOnto(bias, _) | Then::BiasGelu(bias, _) = then {
        if bias.len() != n || bias.dtype != y.dtype {
            bail!("a bias {bias:?} does not fit {y:?}");
        }
        operation.set(Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.pointer)?;
    }
    if let Then::BiasGelu(_, Some(before)) | Then::GeluSlope(before) = then {
        if before.len() != y.len() || before.dtype != y.dtype {
            bail!("{before:?} is not of the size of {y:?}");
        }
        operation.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, before.pointer)?;
        operation.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, n as i64)?;
    }
    let addend = if let Then::BiasOnto(_, other) = then { other } else { y };
    if addend.len() != y.len() || addend.dtype != y.dtype {
        bail!("{addend:?} cannot be added to {y:?}");
    }
    let key = Key {
        dtype: y.dtype,
        sizes: [m, k, n],
        transposed: [a.is_transposed, b.is_transposed],
        epilogue: then.epilogue() as u32,
        adds: matches!(then, Then::Add | Then::BiasOnto(..)),
        alignments: [b.array.pointer, a.array.pointer, y.pointer | addend.pointer].map(alignment),
    };
    let Some(way) = blas.way(key, &operation, [&left, &right, &out])? else { return Ok(false) };
    let beta = f32::from(u8::from(key.adds));
    // One product may be several kernels with the workspace between them: no other thread's may come in between.
    let workspace = blas.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let place = workspace.device_ptr(&blas.stream).0;
    // SAFETY: arrays hold as many numbers as their shapes say, which have been compared; the workspace is this product's until
    // all its kernels are on the stream, and theirs in the order of the stream.
    unsafe {
        result::matmul(
            blas.handle.0,
            operation.0,
            (&raw const factor).cast(),
            (&raw const beta).cast(),
            b.array.pointer as *const c_void,
            left.0,
            a.array.pointer as *const c_void,
            right.0,
            addend.pointer as *const c_void,
            out.0,
            y.pointer as *mut c_void,
            out.0,
            &way,
            place as *mut c_void,
            WORKSPACE,
            blas.stream.cu_stream().cast(),
        )
    }
    .map_err(failed)?;
    Ok(true)
}

fn failed(e: CublasError) -> Error {
    Error::Msg(format!("cuBLASLt: {e}")).bt()
}

/// The largest power of two, up to 256, that divides an address.
fn alignment(pointer: u64) -> u32 {
    1 << pointer.trailing_zeros().min(8)
}

/// What the library's choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dtype: DType,
    sizes: [usize; 3],
    transposed: [bool; 2],
    epilogue: u32,
    adds: bool,
    alignments: [u32; 3],
}

/// The library on one stream, and the ways it has chosen.
struct Blas {
    handle: Handle,
    stream: Arc<CudaStream>,
    workspace: Mutex<CudaSlice<u8>>,
    ways: Mutex<HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>>,
}

impl Blas {
    /// That of a device, made at its first product; it lives as long as the program.
    fn of(gpu: &CudaDevice) -> Result<Arc<Self>> {
        static ALL: Mutex<Vec<Arc<Blas>>> = Mutex::new(Vec::new());
        let stream = gpu.cuda_stream();
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(blas) = all.iter().find(|blas| Arc::ptr_eq(&blas.stream, &stream)) {
            return Ok(blas.clone());
        }
        Library::CublasLt.open().map_err(|e| Error::Msg(format!("{}: {e}", Library::CublasLt.file())).bt())?;
        let handle = Handle(result::create_handle().map_err(failed)?);
        // SAFETY: the library writes what it reads there.
        let workspace = Mutex::new(unsafe { stream.alloc::<u8>(WORKSPACE) }.w()?);
        let blas = Arc::new(Self { handle, stream, workspace, ways: Mutex::default() });
        all.push(blas.clone());
        Ok(blas)
    }

    /// The library's first choice, if it has any: the same for the same sizes, whatever else runs.
    fn way(&self, key: Key, operation: &Operation, layouts: [&Layout; 3]) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(way) = ways.get(&key) {
            return Ok(*way);
        }
        let wishes = Wishes::new()?;
        let [left, right, out] = key.alignments;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, left)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, right)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out)?;
        let [left, right, out] = layouts;
        // SAFETY: all handles are alive.
        let chosen = unsafe {
            let Handle(handle) = self.handle;
            result::get_matmul_algo_heuristic(handle, operation.0, left.0, right.0, out.0, out.0, wishes.0)
        };
        let way = match chosen {
            Ok(chosen) => Some(chosen.algo),
            Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
            )) => None,
            Err(e) => return Err(failed(e)),
        };
        ways.insert(key, way);
        Ok(way)
    }
}

/// The library's handle.
struct Handle(sys::cublasLtHandle_t);
// SAFETY: cuBLASLt's handle may be used by any thread (its documentation, "Thread Safety").
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// How a matrix lies.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(number: sys::cudaDataType_t, rows: usize, columns: usize, stride: usize) -> Result<Self> {
        result::create_matrix_layout(number, rows as u64, columns as u64, stride as i64).map(Self).map_err(failed)
    }

    /// One of ours as it lies in memory: to the library its transposed.
    fn of(number: sys::cudaDataType_t, matrix: &Matrix) -> Result<Self> {
        let stride = matrix.stride();
        Self::new(number, stride, matrix.array.len() / stride.max(1), stride)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used any more. An error can only be that of a wrong handle.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// A product with what follows it.
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(sums: sys::cublasComputeType_t) -> Result<Self> {
        result::create_matmul_desc(sums, sys::cudaDataType_t::CUDA_R_32F).map(Self).map_err(failed)
    }

    fn set<T>(&self, attribute: Of, value: T) -> Result<()> {
        // SAFETY: the handle is alive, the value is read at once.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const value).cast(), size_of::<T>()) }
            .map_err(failed)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: as for layouts.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What the library's choice has to keep to.
struct Wishes(sys::cublasLtMatmulPreference_t);

impl Wishes {
    fn new() -> Result<Self> {
        result::create_matmul_pref().map(Self).map_err(failed)
    }

    fn set<T>(&self, wish: Wish, value: T) -> Result<()> {
        // SAFETY: the handle is alive, the value is read at once.
        unsafe { result::set_matmul_pref_attribute(self.0, wish, (&raw const value).cast(), size_of::<T>()) }
            .map_err(failed)
    }
}

impl Drop for Wishes {
    fn drop(&mut self) {
        // SAFETY: as for layouts.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
