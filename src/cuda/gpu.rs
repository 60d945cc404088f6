//! What runs kernels.

use candle_core::{DType, Result, bail};

/// A tensor in the memory of a GPU, contiguous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Where it begins.
    pub pointer: u64,
    /// Its type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the last dimension.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Elements over the width.
    pub fn rows(&self) -> usize {
        self.len() / self.width().max(1)
    }

    /// Length of the first dimension.
    pub fn samples(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// The beginning of an array.
    Pointer(u64),
    /// A size, `u64`.
    Size(u64),
    /// A small number, `int`.
    Int(i32),
    /// A number, `float`.
    Real(f32),
}

impl From<&Array> for Argument {
    fn from(array: &Array) -> Self {
        Self::Pointer(array.pointer)
    }
}

impl From<usize> for Argument {
    fn from(size: usize) -> Self {
        Self::Size(size as u64)
    }
}

impl From<i32> for Argument {
    fn from(number: i32) -> Self {
        Self::Int(number)
    }
}

impl From<f32> for Argument {
    fn from(number: f32) -> Self {
        Self::Real(number)
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch<'a> {
    /// The file of its source, without `.cu`.
    pub file: &'static str,
    /// Its name there.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: [usize; 3],
    /// Bytes of shared memory of a block, beside what the source declares.
    pub shared: usize,
    /// Its arguments, in order.
    pub arguments: &'a [Argument],
}

/// A GPU, whose work is done in the order in which it is given.
pub trait Gpu {
    /// Memory that lives as long as its owner.
    type Memory;
    /// Memory for an array, with whatever lies there.
    fn allocate(&self, dtype: DType, len: usize) -> Result<Self::Memory>;
    /// The whole of a memory as an array.
    fn array(&self, memory: &Self::Memory, dtype: DType, shape: &[usize]) -> Result<Array>;
    /// Launches a kernel whose arguments fit its source; none where the grid is empty.
    fn launch(&self, launch: &Launch) -> Result<()>;
    /// Whether it is of compute capability 9, whose matrix instructions neither older nor newer GPUs have. Asked often.
    fn is_hopper(&self) -> Result<bool>;
}

/// `a / b`, up.
pub fn ceil(a: usize, b: usize) -> usize {
    a.div_ceil(b)
}

/// The suffix of the kernels for this type.
pub(super) fn suffix(dtype: DType, name: &str) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::BF16 => Ok("bf16"),
        other => bail!("{name}: the GPU computes in f32 or bf16, not {}", other.as_str()),
    }
}

/// Memory for an array, and the array.
pub(super) fn allocate<G: Gpu>(gpu: &G, dtype: DType, shape: &[usize]) -> Result<(G::Memory, Array)> {
    let memory = gpu.allocate(dtype, shape.iter().product())?;
    let array = gpu.array(&memory, dtype, shape)?;
    Ok((memory, array))
}
