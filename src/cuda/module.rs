//! Our kernels as a GPU takes them: for each source a fat binary, with machine code for the GPUs that the build names
//! (build.rs) and PTX for those that came later.
//!
//! The driver takes what fits. So a rank on a GPU that the build names compiles nothing when it starts.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{Context, Result, bail};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

/// The fat binary of a source.
fn image(file: &str) -> Result<&'static [u8]> {
    Ok(match file {
        "elementwise" => include_bytes!(concat!(env!("OUT_DIR"), "/elementwise.fatbin")),
        "reduce" => include_bytes!(concat!(env!("OUT_DIR"), "/reduce.fatbin")),
        "norm" => include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")),
        "picture" => include_bytes!(concat!(env!("OUT_DIR"), "/picture.fatbin")),
        "deviation" => include_bytes!(concat!(env!("OUT_DIR"), "/deviation.fatbin")),
        "attention" => include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
        "attention_hopper" => include_bytes!(concat!(env!("OUT_DIR"), "/attention_hopper.fatbin")),
        "attention_any" => include_bytes!(concat!(env!("OUT_DIR"), "/attention_any.fatbin")),
        other => bail!("there are no kernels in {other}.cu"),
    })
}

/// The kernel `name` of a source, whose module each GPU loads once.
pub(super) fn kernel(context: &Arc<CudaContext>, file: &'static str, name: &str) -> Result<CudaFunction> {
    /// By GPU and source.
    type Modules = HashMap<(usize, &'static str), Arc<CudaModule>>;
    static MODULES: Mutex<Option<Modules>> = Mutex::new(None);
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let modules = modules.get_or_insert_default();
    let module = match modules.entry((context.ordinal(), file)) {
        Entry::Occupied(loaded) => loaded.into_mut(),
        Entry::Vacant(place) => {
            let module = context.load_module(Ptx::from_binary(image(file)?.to_vec())).w();
            place.insert(module.with_context(|| format!("the kernels in {file}.cu do not fit this GPU or its driver"))?)
        }
    };
    module.load_function(name).w()
}
