//! What block-wise gradients save: peak heap above the weights, beside one graph of the whole model.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::engine::{self, Checkpointing, Gradients};
use flowrl_dist::model::{Model, glyphs};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::rng::{Purpose, Stream};
use std::alloc::{GlobalAlloc, Layout as Size, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, and how much of it is in use.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, size: Size) -> *mut u8 {
        let now = NOW.fetch_add(size.size(), Ordering::Relaxed) + size.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, size: Size) {
        NOW.fetch_sub(size.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// MiB at the peak of `work` above what was in use before.
fn peak(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work()?;
    Ok((PEAK.load(Ordering::Relaxed) - before) as f64 / f64::from(1 << 20))
}

/// 12 blocks, 384 wide, 256 image tokens and 7 of the condition.
fn model(lora: Option<&LoraConfig>) -> Model {
    let config = glyphs::Config {
        width: 384,
        heads: 6,
        depth: 12,
        patch: 6,
        picture: (96, 96),
        characters: 5,
        alphabet: 37,
        colours: 8,
    };
    glyphs::model(&config, lora)
}

const BATCH: usize = 4;

struct Inputs {
    x: Tensor,
    t: Tensor,
    conditioning: Vec<Tensor>,
}

fn inputs() -> Result<Inputs> {
    let device = &Device::Cpu;
    let normals = Stream::new(1, Purpose::Pretrain, [0; 4]).normals(BATCH * 3 * 96 * 96);
    Ok(Inputs {
        x: Tensor::from_vec(normals, (BATCH, 3, 96, 96), device)?,
        t: Tensor::new(&[0.2f32, 0.4, 0.6, 0.8], device)?,
        conditioning: vec![
            Tensor::ones((BATCH, 5), DType::U32, device)?,
            Tensor::ones((BATCH, 2), DType::U32, device)?,
        ],
    })
}

/// The whole model as one graph, as candle would have it.
fn monolithic(model: &Model, params: &ParamSet, inputs: &Inputs) -> Result<()> {
    let mut io = vec![inputs.x.clone(), inputs.t.clone()];
    io.extend(inputs.conditioning.iter().cloned());
    for (index, stage) in model.stages.iter().enumerate() {
        io = stage.forward(params.stage(index), &io)?;
    }
    let gradients = (&io[0] * &inputs.x)?.sum_all()?.backward()?;
    drop(gradients);
    Ok(())
}

fn block_wise(model: &Model, params: &ParamSet, layout: &Layout, inputs: &Inputs, each: usize) -> Result<()> {
    let Inputs { x, t, conditioning } = inputs;
    let (_, tape) = engine::forward(model, params, x, t, conditioning, Checkpointing(each))?;
    let mut gradients = Gradients::zeros(layout, layout.total, &Device::Cpu)?;
    engine::backward(model, params, tape, x, &mut gradients)?;
    drop(gradients.finish(false)?);
    Ok(())
}

#[test]
fn block_wise_gradients_take_a_quarter_of_the_memory() -> Result<()> {
    let inputs = inputs()?;
    for (trainable, lora) in [(Trainable::Full, None), (Trainable::Lora, Some(LoraConfig::default()))] {
        let model = model(lora.as_ref());
        let specs = model.specs();
        let layout = Layout::new(&specs, trainable);
        let set = ParamSet::init(&specs, 1, &Device::Cpu)?;
        let params = set.with_flat(&layout, &set.flatten(&layout)?)?;
        drop(set);
        let whole = peak(|| monolithic(&model, &params, &inputs))?;
        let [none, second, each] = [0, 2, 1].map(|n| peak(|| block_wise(&model, &params, &layout, &inputs, n)));
        let (none, second, each) = (none?, second?, each?);
        eprintln!(
            "{trainable:?}: MiB above the weights: one graph {whole:.0}, block-wise without checkpoints {none:.0}, each \
             second block {second:.0}, each block {each:.0} ({:.1} times less than one graph)",
            whole / each
        );
        assert!(each <= whole / 4.0, "{trainable:?}: {each} of {whole} MiB");
        assert!(each < second && second < none, "{trainable:?}: {each}, {second}, {none} MiB");
    }
    Ok(())
}
