//! A GPU whose kernels run on the CPU: their own sources, compiled as C++ (tests/emulator).

use candle_core::{DType, Device, Result, Tensor};
use flowrl_dist::cuda::{Argument, Array, Gpu, Launch};
use half::bf16;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

/// On both sides of every array: what no kernel may touch. As numbers it is NaN, and so is what no kernel has written.
const UNTOUCHED: u128 = u128::MAX;
const GUARD: usize = 64;

/// Memory of the "GPU", aligned as a GPU's is.
pub struct Memory(Box<[u128]>);

impl Memory {
    fn new(bytes: usize) -> Self {
        Self(vec![UNTOUCHED; bytes.div_ceil(16) + 2 * GUARD].into())
    }

    fn pointer(&self) -> *const u8 {
        self.0[GUARD..].as_ptr().cast()
    }

    /// Fails where a kernel wrote past an end.
    pub fn check(&self) {
        let (start, end) = (&self.0[..GUARD], &self.0[self.0.len() - GUARD..]);
        assert!(start.iter().chain(end).all(|&word| word == UNTOUCHED), "a kernel wrote outside an array");
    }

    fn numbers<T: Copy>(&self, len: usize) -> Vec<T> {
        self.check();
        assert!(len * size_of::<T>() <= (self.0.len() - 2 * GUARD) * 16);
        // SAFETY: as many numbers as fit, in memory of this struct's own, of a type that takes all bits.
        unsafe { std::slice::from_raw_parts(self.pointer().cast::<T>(), len) }.to_vec()
    }

    /// As an f32 tensor of the CPU.
    pub fn read(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        let values: Vec<f32> = match dtype {
            DType::BF16 => self.numbers::<bf16>(len).into_iter().map(f32::from).collect(),
            DType::F64 => self.numbers::<f64>(len).into_iter().map(|x| x as f32).collect(),
            _ => self.numbers(len),
        };
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }
}

/// Holds memory until the end of a test, so that arrays may be passed around.
#[derive(Default)]
pub struct Host {
    memory: Mutex<Vec<Memory>>,
    hopper: bool,
}

impl Host {
    /// One that passes for a GPU of compute capability 9.
    pub fn hopper() -> Self {
        Self { hopper: true, ..Self::default() }
    }

    /// A tensor's values, rounded to `dtype`, on the "GPU".
    pub fn put(&self, tensor: &Tensor, dtype: DType) -> Array {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let memory = Memory::new(values.len() * dtype.size_in_bytes());
        let bytes: Vec<u8> = match dtype {
            DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        // SAFETY: the memory was made for as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.pointer().cast_mut(), bytes.len()) };
        let array = self.array(&memory, dtype, tensor.dims()).unwrap();
        self.memory.lock().unwrap().push(memory);
        array
    }

    /// The values that an array holds now.
    pub fn get(&self, array: &Array) -> Tensor {
        let all = self.memory.lock().unwrap();
        let memory = all.iter().find(|memory| memory.pointer() as u64 == array.pointer).unwrap();
        memory.read(array.dtype, &array.shape)
    }
}

impl Gpu for Host {
    type Memory = Memory;

    fn allocate(&self, dtype: DType, len: usize) -> Result<Memory> {
        Ok(Memory::new(len * dtype.size_in_bytes()))
    }

    fn array(&self, memory: &Memory, dtype: DType, shape: &[usize]) -> Result<Array> {
        Ok(Array { pointer: memory.pointer() as u64, dtype, shape: shape.to_vec() })
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let name = CString::new(launch.kernel).unwrap();
        let mut arguments: Vec<*const c_void> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Pointer(number) | Argument::Size(number) => (&raw const *number).cast(),
                Argument::Int(number) => (&raw const *number).cast(),
                Argument::Real(number) => (&raw const *number).cast(),
            })
            .collect();
        let (grid, threads) = (launch.grid.map(|n| n as u32), launch.threads.map(|n| n as u32));
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the function has this type, and the kernel the arguments that crate::cuda gives it on any GPU.
        let known = unsafe { entry()(name.as_ptr(), arguments.as_mut_ptr(), grid.as_ptr(), threads.as_ptr()) };
        assert_eq!(known, 0, "{} is not listed in tests/emulator/ours/kernels.cpp", launch.kernel);
        Ok(())
    }

    fn is_hopper(&self) -> Result<bool> {
        Ok(self.hopper)
    }
}

/// The kernels' threads share the library's variables.
static ALONE: Mutex<()> = Mutex::new(());

type Entry = unsafe extern "C" fn(*const c_char, *mut *const c_void, *const u32, *const u32) -> c_int;

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Compiles the kernels, once.
fn entry() -> Entry {
    static ENTRY: OnceLock<Entry> = OnceLock::new();
    *ENTRY.get_or_init(|| {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{}.so", std::process::id()));
        let folders = ["tests/emulator/ours", "src/cuda/kernels"].map(|folder| root.join(folder));
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"]).arg(&library);
        command.args(folders.iter().map(|folder| format!("-I{}", folder.display())));
        let output =
            command.arg(folders[0].join("kernels.cpp")).output().unwrap_or_else(|e| panic!("{compiler:?}: {e}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: strings that end in zero; the library defines the function with this type.
        let entry = unsafe {
            let handle = dlopen(path.as_ptr(), 2);
            assert!(!handle.is_null(), "{} cannot be opened", library.display());
            let symbol = dlsym(handle, c"host_launch".as_ptr());
            assert!(!symbol.is_null());
            std::mem::transmute::<*mut c_void, Entry>(symbol)
        };
        std::fs::remove_file(library).unwrap();
        entry
    })
}
