//! The device of a rank, chosen once, at the start of a run.

use crate::error::{Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// `parallel.device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or an error.
    Cuda,
}

/// The device of this rank, and a line on why it is that one: "GPU 0, NVIDIA H200" or "the CPU: there is no GPU ...".
///
/// `local_rank`: this rank among the `ranks_on_host`, which take the GPUs in order, one each. Where a launcher shows every rank a GPU of its own, that one.
///
/// # Errors
/// [`Error::Usage`] if a GPU is asked for and there is none that works, and if there are more ranks than GPUs.
pub fn select(choice: DeviceChoice, local_rank: usize, ranks_on_host: usize) -> Result<(Device, String)> {
    select_as(choice, (local_rank, ranks_on_host), ["parallel.device = \"cuda\"", "set parallel.device = \"cpu\""])
}

/// As [`select`], where an error says how a GPU was asked for, and what to do to have none.
///
/// # Errors
/// As there.
pub fn select_as(
    choice: DeviceChoice,
    (local_rank, ranks_on_host): (usize, usize),
    [asked, remedy]: [&str; 2],
) -> Result<(Device, String)> {
    match choice {
        DeviceChoice::Cpu => Ok((Device::Cpu, "the CPU".into())),
        DeviceChoice::Auto => match open(local_rank, ranks_on_host)? {
            Ok((device, name)) => Ok((device, name)),
            Err(why) if cfg!(feature = "cuda") => Ok((Device::Cpu, format!("the CPU: {why}"))),
            Err(why) if Path::new(NVIDIA).exists() => Ok((Device::Cpu, format!("the CPU: {why}"))),
            Err(_) => Ok((Device::Cpu, "the CPU".into())),
        },
        DeviceChoice::Cuda => {
            open(local_rank, ranks_on_host)?.map_err(|why| Error::Usage(format!("{asked}, but {why}; or {remedy}")))
        }
    }
}

/// There where a driver of NVIDIA's is loaded.
const NVIDIA: &str = "/dev/nvidiactl";

/// A device, or why there is none.
type Found = std::result::Result<(Device, String), String>;

#[cfg(not(feature = "cuda"))]
fn open(_: usize, _: usize) -> Result<Found> {
    Ok(Err("this program was built without CUDA: build it with --features cuda (docs/INSTALL.md)".into()))
}

#[cfg(feature = "cuda")]
use gpu::open;

/// Tests let several ranks share a GPU by setting this variable to 1.
#[cfg(feature = "cuda")]
const SHARE: &str = "FLOWRL_SHARE_GPU";

/// Whether ranks may share a GPU.
#[cfg(feature = "cuda")]
pub(crate) fn may_be_shared() -> bool {
    std::env::var(SHARE).is_ok_and(|value| value == "1")
}

/// What is the same for two ranks that are on the same GPU, wherever they run; nothing on the CPU.
pub(crate) fn identity(device: &Device) -> Result<Option<String>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::identity(gpu).map(Some),
        _ => Ok(None),
    }
}

/// GB of the device's memory that are in use; nothing on the CPU. What tensors gave back stays with the process, so that at
/// the end of an iteration this is the most that was in use at a time.
pub(crate) fn memory(device: &Device) -> Result<Option<f64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::memory(gpu).map(Some),
        _ => Ok(None),
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Found, SHARE, may_be_shared};
    use crate::cuda::library::Library;
    use crate::error::{Error, Result};
    use crate::hostname::hostname;
    use candle_core::{CudaDevice, Device};
    use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
    use cudarc::driver::{DriverError, result};
    use std::fmt::Write as _;

    /// The version of CUDA that made the kernels: 13000 for 13.0. A driver takes no newer ones than its own.
    const VERSION: &str = env!("FLOWRL_CUDA_VERSION");

    /// The GPUs that candle's kernels were made for, 90 for compute capability 9.0, where the build was told.
    const CAPABILITY: Option<&str> = option_env!("FLOWRL_CUDA_CAPABILITY");

    /// What our own kernels want.
    const LEAST: (i32, i32) = (8, 0);

    /// The GPU of this rank.
    pub fn open(local_rank: usize, ranks_on_host: usize) -> Result<Found> {
        let count = match count() {
            Ok(count) => count,
            Err(why) => return Ok(Err(why)),
        };
        let ordinal = ordinal(local_rank, ranks_on_host, count, may_be_shared())?;
        Ok(device(ordinal))
    }

    /// Which of `count` GPUs.
    fn ordinal(local_rank: usize, ranks_on_host: usize, count: usize, shared: bool) -> Result<usize> {
        if ranks_on_host <= count {
            return Ok(local_rank);
        }
        // One GPU may be another one for each rank, as Slurm's --gpus-per-task makes it: whether it is, the ranks will see.
        if shared || count == 1 {
            return Ok(local_rank % count);
        }
        let hostname = hostname();
        Err(Error::Usage(format!(
            "{ranks_on_host} ranks on {hostname}, but {count} GPUs: start one rank for each GPU (mpirun -n {count}, or Slurm's \
             --ntasks-per-node={count} with --gpus-per-node={count}), or set parallel.device = \"cpu\""
        )))
    }

    /// Number of GPUs, or why there is none.
    fn count() -> std::result::Result<usize, String> {
        Library::Driver.open().map_err(|e| {
            format!(
                "there is no NVIDIA driver ({e}): install it, or let the container have the GPU (docker --gpus all, \
                 apptainer --nv)"
            )
        })?;
        result::init().map_err(|DriverError(code)| refusal(code))?;
        let driver = driver_version();
        let built: i32 = VERSION.parse().unwrap_or(0);
        if driver < built {
            return Err(format!(
                "the NVIDIA driver is too old: it is of CUDA {}, this program of CUDA {}; update the driver, or build with \
                 an older CUDA",
                dotted(driver),
                dotted(built)
            ));
        }
        match result::device::get_count() {
            Ok(count) if count > 0 => Ok(count as usize),
            Ok(_) => Err(refusal(CUresult::CUDA_ERROR_NO_DEVICE)),
            Err(DriverError(code)) => Err(refusal(code)),
        }
    }

    /// Why the driver gives no GPU.
    fn refusal(code: CUresult) -> String {
        match code {
            CUresult::CUDA_ERROR_NO_DEVICE => match std::env::var("CUDA_VISIBLE_DEVICES") {
                Ok(visible) => format!("the driver shows no GPU: CUDA_VISIBLE_DEVICES is \"{visible}\""),
                Err(_) => "the driver finds no GPU: ask the scheduler for one, or see what nvidia-smi says".into(),
            },
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
                "the NVIDIA driver's library does not fit its kernel module: restart the machine after the update"
                    .into()
            }
            CUresult::CUDA_ERROR_STUB_LIBRARY => {
                "libcuda.so.1 is the toolkit's stub, not the driver: take its folder out of LD_LIBRARY_PATH".into()
            }
            code => format!("the NVIDIA driver does not start (code {}): see what nvidia-smi says", code as u32),
        }
    }

    fn driver_version() -> i32 {
        let mut version = 0;
        // SAFETY: the driver's library is open; it writes one int.
        match unsafe { sys::cuDriverGetVersion(&mut version) } {
            CUresult::CUDA_SUCCESS => version,
            _ => 0,
        }
    }

    fn dotted(version: i32) -> String {
        format!("{}.{}", version / 1000, version % 1000 / 10)
    }

    /// candle's device on a stream of its own.
    fn device(ordinal: usize) -> Found {
        let failed = |what: &str, e: &dyn std::fmt::Debug| format!("GPU {ordinal} {what}: {e:?}");
        let name = fits(ordinal)?;
        for library in [Library::Cublas, Library::CublasLt, Library::Curand] {
            library.open().map_err(|e| {
                format!(
                    "{} of CUDA {} is missing ({e}): load the CUDA module, or put the folder into LD_LIBRARY_PATH",
                    library.file(),
                    dotted(VERSION.parse().unwrap_or(0))
                )
            })?;
        }
        let device = Device::new_cuda_with_stream(ordinal).map_err(|e| failed("cannot be used", &e))?;
        if let Device::Cuda(gpu) = &device {
            // SAFETY: all work goes to the one stream of this device; the collectives, which have another, order the two by
            // events of their own (comm/nccl) and keep memory alive until both are done with it.
            unsafe { gpu.disable_event_tracking() };
            // Without pools memory is allocated and freed at once, which no setting changes.
            if gpu.cuda_stream().context().has_async_alloc() {
                keep_memory(ordinal).map_err(|e| failed("keeps no memory", &e))?;
            }
        }
        Ok((device, format!("GPU {ordinal}, {name}")))
    }

    /// The GPU's name, if our kernels and candle's can run on it.
    fn fits(ordinal: usize) -> std::result::Result<String, String> {
        let asked = |e: DriverError| format!("GPU {ordinal} does not answer: {e:?}");
        let gpu = result::device::get(ordinal as i32).map_err(asked)?;
        let name = result::device::get_name(gpu).map_err(asked)?;
        // SAFETY: `gpu` is one that the driver gave.
        let attribute = |attribute| unsafe { result::device::get_attribute(gpu, attribute) }.map_err(asked);
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < LEAST {
            let (most, least) = LEAST;
            return Err(format!(
                "GPU {ordinal} ({name}) has compute capability {major}.{minor}: {most}.{least} is the least"
            ));
        }
        let built = CAPABILITY.and_then(|text| text.parse::<i32>().ok());
        // For 9.0 and newer candle uses instructions of that one architecture alone.
        let fits = built.is_none_or(|built| match built {
            90.. => built == 10 * major + minor,
            _ => built <= 10 * major + minor,
        });
        match fits {
            true => Ok(name),
            false => Err(format!(
                "GPU {ordinal} ({name}) has compute capability {major}.{minor}, this program was built for another: build \
                 with CUDA_COMPUTE_CAP={}",
                10 * major + minor
            )),
        }
    }

    /// Memory that tensors give back stays with the process: else the driver takes it at every synchronisation.
    fn keep_memory(ordinal: usize) -> std::result::Result<(), DriverError> {
        let mut threshold = u64::MAX;
        // SAFETY: the device is one that the driver gave; the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32)?)?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
        }
    }

    /// The GPU's number, unique in the world.
    pub fn identity(gpu: &CudaDevice) -> Result<String> {
        let uuid = gpu.cuda_stream().context().uuid();
        let uuid = uuid.map_err(|e| Error::Failed(format!("the GPU does not tell its number: {e:?}")))?;
        Ok(uuid.bytes.iter().fold(String::from("GPU-"), |mut text, &byte| {
            let _ = write!(text, "{:02x}", byte as u8);
            text
        }))
    }

    /// GB in use, by whomever.
    pub fn memory(gpu: &CudaDevice) -> Result<f64> {
        let told = gpu.cuda_stream().context().mem_get_info();
        let (free, total) = told.map_err(|e| Error::Failed(format!("the GPU does not tell its memory: {e:?}")))?;
        Ok((total - free) as f64 / 1e9)
    }

    /// What to set to let ranks share a GPU, in words.
    pub fn how_to_share() -> String {
        format!("tests may set {SHARE}=1, and another NCCL_HOSTID for each rank")
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_rank_takes_the_gpu_of_its_number() {
            for (case, expected) in [((3, 4, 8), 3), ((7, 8, 8), 7), ((1, 2, 1), 0)] {
                assert_eq!(ordinal(case.0, case.1, case.2, false).unwrap(), expected, "{case:?}");
            }
            let refused = ordinal(0, 8, 4, false).unwrap_err().to_string();
            let words = format!("8 ranks on {}, but 4 GPUs: start one rank for each GPU", hostname());
            assert!(refused.starts_with(&words), "{refused}");
            assert_eq!(ordinal(5, 8, 4, true).unwrap(), 1);
        }
    }
}

#[cfg(feature = "cuda")]
pub(crate) use gpu::how_to_share;
