#[path = "../tests/blocks/mod.rs"]
mod blocks;
use blocks::*;
use flowrl_dist::Result;
use flowrl_dist::params::Trainable;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::pipeline::{ModelConfig, Pipeline};
use flowrl_dist::params::Layout;
use flowrl_dist::shard::*;
use candle_core::*;
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn stat() -> [f64; 3] {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = s[s.rfind(')').unwrap() + 2..].split(' ').collect();
    [f[11].parse::<f64>().unwrap() / 100.0, f[12].parse::<f64>().unwrap() / 100.0, f[7].parse().unwrap()]
}
fn measure(name: &str, n: usize, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    work()?;
    let mut best = [f64::MAX; 3];
    for _ in 0..3 {
        let a = stat();
        for _ in 0..n { work()?; }
        let b = stat();
        for i in 0..3 { best[i] = best[i].min((b[i] - a[i]) / n as f64); }
    }
    eprintln!("{name:>40}: user {:.3} s, sys {:.3} s, {:.0} faults", best[0], best[1], best[2]);
    Ok(())
}
fn main() -> Result<()> {
    let pipeline = Pipeline::load(&ModelConfig::default(), 1, &Device::Cpu)?;
    let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
    let params = pipeline.base.with_flat(&layout, &pipeline.base.flatten(&layout)?)?;
    for b in [16usize] {
        let x = Tensor::randn(0f32, 1f32, (b, 3, 24, 48), &Device::Cpu)?;
        let t = Tensor::full(0.5f32, b, &Device::Cpu)?;
        let c = vec![Tensor::ones((b, 6), DType::U32, &Device::Cpu)?, Tensor::ones((b, 2), DType::U32, &Device::Cpu)?];
        let c = if pipeline.encode(&[]).is_ok() { vec![Tensor::ones((b, flowrl_dist::data::glyphs::MAX_TEXT), DType::U32, &Device::Cpu)?, c[1].clone()] } else { c };
        measure(&format!("glyphs B={b} velocity"), 10, || engine::velocity(&pipeline.model, &params, &x, &t, &c).map(drop))?;
        for k in [1, 2, 0] {
            measure(&format!("glyphs B={b} forward only, checkpoint {k}"), 10, || engine::forward(&pipeline.model, &params, &x, &t, &c, Checkpointing(k)).map(drop))?;
            measure(&format!("glyphs B={b} forward+backward, checkpoint {k}"), 10, || {
                let (v, tape) = engine::forward(&pipeline.model, &params, &x, &t, &c, Checkpointing(k))?;
                let mut g = Gradients::zeros(&layout, &Partition::new(&layout, 1), &Device::Cpu)?;
                engine::backward(&pipeline.model, &params, tape, &v, |s, o| g.add(s, o))
            })?;
        }
    }
    let inputs = inputs()?.first()?;
    let (model, layout, params) = trained(Trainable::Full)?;
    for k in [1, 0] {
        measure(&format!("12x384 B=1 forward+backward, checkpoint {k}"), 1, || block_wise(&model, &params, &layout, &inputs, k))?;
    }
    Ok(())
}
