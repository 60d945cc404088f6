//! The CUDA libraries, opened when a GPU is asked for, so that one program runs on machines with and without them.
//!
//! candle links CUDA by name: its program would not even start where a library is missing. So the build defines every
//! function of these libraries itself (build.rs, functions.txt), as a jump to wherever its slot points. Opening a library
//! fills its slots; until then, and for functions that an older library lacks, they point to [`flowrl_absent`].

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

include!(concat!(env!("OUT_DIR"), "/functions.rs"));

/// One library: the files it may be, newest first, and its functions.
struct Entry {
    files: &'static [&'static str],
    names: &'static [&'static str],
    slots: &'static [AtomicPtr<c_void>],
}

/// A library, in the order of functions.txt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Library {
    /// The driver's own.
    Driver,
    /// Matrix products.
    Cublas,
    /// Matrix products with what follows them.
    CublasLt,
    /// Random numbers; candle makes a generator for every device.
    Curand,
    /// Collectives.
    Nccl = 5,
}

/// Functions that the libraries opened so far lack.
static MISSING: Mutex<Vec<&str>> = Mutex::new(Vec::new());

impl Library {
    /// Opens the library, once in a process.
    ///
    /// # Errors
    /// The system's word on why it cannot be opened.
    pub fn open(self) -> Result<(), String> {
        static OPENED: Mutex<[bool; LIBRARIES.len()]> = Mutex::new([false; LIBRARIES.len()]);
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut opened[self as usize], true) {
            return Ok(());
        }
        let Entry { files, names, slots } = &LIBRARIES[self as usize];
        let handle = files.iter().find_map(|file| open(file).ok()).map_or_else(|| open(files[0]), Ok);
        let handle = handle.inspect_err(|_| opened[self as usize] = false)?;
        for (name, slot) in names.iter().zip(*slots) {
            match function(handle, name) {
                Some(function) => slot.store(function, Ordering::Release),
                None => MISSING.lock().unwrap_or_else(PoisonError::into_inner).push(name),
            }
        }
        Ok(())
    }

    /// The file that it is.
    pub fn file(self) -> &'static str {
        LIBRARIES[self as usize].files[0]
    }
}

/// What a function that is not there does.
#[unsafe(no_mangle)]
extern "C" fn flowrl_absent() -> ! {
    let missing = MISSING.lock().unwrap_or_else(PoisonError::into_inner);
    let some = missing.iter().take(10).copied().collect::<Vec<_>>().join(" ");
    eprintln!(
        "a function of CUDA was called that is not there: its library was not opened, or is too old and lacks it ({} missing: \
         {some} ...)",
        missing.len(),
    );
    std::process::abort()
}

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

/// RTLD_NOW, with names of its own.
const NOW: c_int = 2;

fn open(file: &str) -> Result<*mut c_void, String> {
    let path = CString::new(file).map_err(|e| e.to_string())?;
    // SAFETY: `path` is a string that ends in zero; the error is one of the loader's, valid until its next call on this thread.
    unsafe {
        let handle = dlopen(path.as_ptr(), NOW);
        if !handle.is_null() {
            return Ok(handle);
        }
        let message = dlerror();
        if message.is_null() {
            return Err(format!("{file} cannot be opened"));
        }
        Err(CStr::from_ptr(message).to_string_lossy().into_owned())
    }
}

fn function(handle: *mut c_void, name: &str) -> Option<*mut c_void> {
    let name = CString::new(name).ok()?;
    // SAFETY: the handle is one that dlopen gave and nothing closes.
    let function = unsafe { dlsym(handle, name.as_ptr()) };
    (!function.is_null()).then_some(function)
}
