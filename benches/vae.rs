//! Decoding pictures with the autoencoder of Stable Diffusion 3, of full size (RAYON_NUM_THREADS chooses threads):
//! `cargo bench --bench vae` prints our convolution beside candle's, the whole decoder and each of its stages, in seconds of
//! the clock and of all cores (the latter hardly depends on what else the machine does), and the process's largest
//! memory (Linux).
//!
//! `cargo bench --bench vae -- SIDE f32|bf16 TILE` decodes one picture of SIDE pixels in tiles of TILE pixels: alone, so that
//! the largest memory is this decoding's.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::model::vae::{Config, Vae};
use flowrl_dist::ops::{Walk, convolution};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::{Error, Result};
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const REPETITIONS: usize = 2;

fn noise(shape: &[usize]) -> Result<Tensor> {
    let values = Stream::new(1, Purpose::Parameters, [0; 4]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// User and system seconds of this process, of all its threads; 0 where the system has no /proc.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = |field: &str| field.parse::<f64>().unwrap_or(0.0) / 100.0;
    stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2).map(ticks).sum()
}

/// Largest memory of this process so far, in MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// The fewest seconds of `work`, of the clock and of the cores.
fn measure<T>(name: &str, work: impl Fn() -> Result<T>) -> Result<T> {
    let (mut result, mut least) = (None, [f64::INFINITY; 2]);
    for _ in 0..REPETITIONS {
        let (since, cpu) = (Instant::now(), cpu_seconds());
        result = None; // the last repetition's result is not held beside the next one's
        result.replace(work()?);
        least = [least[0].min(since.elapsed().as_secs_f64()), least[1].min(cpu_seconds() - cpu)];
    }
    eprintln!("{name:>44}  {:7.3} s, {:7.3} CPU s", least[0], least[1]);
    Ok(result.expect("a repetition"))
}

/// One picture of `side` pixels in tiles of `tile`.
fn decode(side: &str, dtype: &str, tile: &str) -> Result<()> {
    let pixels = |text: &str| text.parse::<usize>().map_err(|_| Error::Usage(format!("{text} is no number of pixels")));
    let dtype = match dtype {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        other => return Err(Error::Usage(format!("{other} is neither f32 nor bf16"))),
    };
    let (config, (side, tile)) = (Config::sd3(), (pixels(side)?, pixels(tile)?));
    let (channels, scale) = (config.latent_channels, config.scale());
    let vae = Vae::random(config, 1, dtype, &Device::Cpu)?.with_tile(tile / scale)?;
    let x0 = noise(&[1, channels, side / scale, side / scale])?;
    let before = peak();
    let (since, cpu) = (Instant::now(), cpu_seconds());
    let picture = vae.decode(&x0)?;
    let (seconds, cpu) = (since.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    eprintln!(
        "{:?} {dtype:?}, tiles of {tile}: {seconds:.1} s, {cpu:.1} CPU s, {:.0} MiB at the peak, {before:.0} before",
        picture.dims(),
        peak()
    );
    Ok(())
}

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if let [side, dtype, tile] = arguments.as_slice() {
        return decode(side, dtype, tile);
    }
    eprintln!("{} threads, least of {REPETITIONS}", candle_core::utils::get_num_threads());
    for (channels, side) in [(512, 64), (256, 128), (128, 256)] {
        let (x, w) = (noise(&[1, side, side, channels])?, noise(&[3, 3, channels, channels])?);
        let bias = noise(&[channels])?;
        let name = format!("{channels} channels, {side} x {side}");
        measure(&format!("convolution, {name}"), || Ok(convolution(&x, &w, &bias, Walk::Same, None)?))?;
        let (x, w) = (x.permute((0, 3, 1, 2))?.contiguous()?, w.permute((3, 2, 0, 1))?.contiguous()?);
        measure(&format!("candle's, {name}"), || Ok(x.conv2d(&w, 1, 1, 1, 1)?))?;
    }
    let vae = Vae::random(Config::sd3(), 1, DType::F32, &Device::Cpu)?;
    eprintln!("{:.0} MiB with the weights", peak());
    let x0 = noise(&[1, 16, 64, 64])?;
    measure("decoding 512 x 512", || vae.decode(&x0))?;
    eprintln!("{:.0} MiB at the peak", peak());
    let mut io = vec![noise(&[1, 64, 64, 16])?];
    for (index, stage) in vae.decoder.stages.iter().enumerate() {
        let name = stage.specs()[0].name.replace(".weight", "");
        io = measure(&name, || stage.forward(vae.decoder.params.stage(index), &io))?;
    }
    Ok(())
}
