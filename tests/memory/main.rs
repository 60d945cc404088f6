//! What block-wise gradients save: peak heap above weights and gradients, beside one graph of the whole model. And what
//! weights in parts save, from the moment when they are read. And that prompts take none.

mod blocks;
mod counting;

use blocks::{block_wise, composed, inputs, model, monolithic, trained, training_pass};
use candle_core::{DType, Device, Tensor};
use counting::{Counting, mib};
use flowrl_dist::Result;
use flowrl_dist::comm::{Solo, ThreadGroup, World};
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::evaluate::Evaluation;
use flowrl_dist::flow::{SamplerConfig, Solver};
use flowrl_dist::model::StartingParams;
use flowrl_dist::model::files::Weights as Files;
use flowrl_dist::model::random::{Size as ModelSize, write};
use flowrl_dist::optim::Sharded;
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::pipeline::{Kind, ModelConfig, Pipeline};
use flowrl_dist::policy::Policies;
use flowrl_dist::reward::{Overlap, Rewards};
use flowrl_dist::shard::{Sharding, Weights};
use std::alloc::System;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

/// One at a time: all share one heap.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// MiB at the peak of `work` above what was in use before.
fn peak(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = counting::restart();
    work()?;
    Ok(mib(counting::peak() - before))
}

#[test]
fn activations_take_a_quarter_of_the_memory_block_by_block() -> Result<()> {
    let _alone = alone();
    let inputs = inputs()?;
    for trainable in [Trainable::Full, Trainable::Lora] {
        let (model, layout, params) = trained(trainable)?;
        let whole = peak(|| monolithic(&model, &params, &inputs).map(drop))?;
        let candle = peak(|| composed(&model, &params, &inputs).map(drop))?;
        let [none, second, each] =
            [0, 2, 1].map(|n| peak(|| block_wise(&model, &params, &layout, &inputs, n).map(drop)));
        let (none, second, each) = (none?, second?, each?);
        // Both hold the gradients of all trained parameters at the end.
        let gradients = (4 * layout.total) as f64 / f64::from(1 << 20);
        let ratio = (whole - gradients) / (each - gradients);
        eprintln!(
            "{trainable:?}: MiB above the weights, {gradients:.0} of them gradients: one graph {whole:.0}, of candle's own \
             operations {candle:.0}; block-wise without checkpoints {none:.0}, each second block {second:.0}, each block \
             {each:.0}; activations {ratio:.1} times less"
        );
        assert!(4.0 * each <= candle, "{trainable:?}: {each} of {candle} MiB");
        assert!(ratio >= 4.0, "{trainable:?}: {each} of {whole} MiB, {gradients} of gradients");
        assert!(each < second && second < none, "{trainable:?}: {each}, {second}, {none} MiB");
    }
    Ok(())
}

/// A second opinion on the gradients, by operations that are not ours.
#[test]
fn gradients_are_those_of_candle_s_own_operations() -> Result<()> {
    let _alone = alone();
    let inputs = inputs()?.first()?;
    for trainable in [Trainable::Full, Trainable::Lora] {
        let (model, layout, params) = trained(trainable)?;
        let theirs = composed(&model, &params, &inputs)?;
        let ours = block_wise(&model, &params, &layout, &inputs, 1)?;
        let mut worst = 0f64;
        for e in &layout.entries {
            let (_, parameter) = params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("a parameter");
            let theirs = theirs.get(parameter).expect("a gradient").flatten_all()?.to_dtype(DType::F64)?;
            let ours = ours.sum().narrow(0, e.offset, e.len)?.to_dtype(DType::F64)?;
            let norm = |x: &Tensor| Ok::<_, candle_core::Error>(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt());
            let (error, size) = (norm(&(&ours - &theirs)?)?, norm(&theirs)?);
            assert!(size > 0.0 && error <= 1e-4 * size, "{}: {error} of {size}", e.name);
            worst = worst.max(error / size);
        }
        eprintln!("{trainable:?}: {} gradients, the worst differs by {worst:.1e} of its norm", layout.entries.len());
    }
    Ok(())
}

const RANKS: usize = 4;

/// MiB a rank of the whole model; held by policy, old policy and base model in parts, beside the optimizer's state; and
/// at the peak of a training point above that.
fn in_parts(trainable: Trainable, all: bool) -> Result<[f64; 4]> {
    let lora = (trainable == Trainable::Lora).then(LoraConfig::default);
    let (model, inputs) = (model(lora.as_ref()), inputs()?.first()?);
    let specs = model.specs();
    let (layout, set) = (Layout::new(&specs, trainable), ParamSet::init(&specs, 1, &Device::Cpu)?);
    let flat = set.flatten(&layout)?;
    // What the same takes where all weights are there.
    let leaves = set.with_flat(&layout, &flat)?;
    let others: &[&dyn Weights] = if all { &[&set, &set] } else { &[] };
    let activations = peak(|| training_pass(&model, &leaves, others, &inputs, |_, _| Ok(())))?;

    let measured = ThreadGroup::run(RANKS, |world| {
        let state = Sharded::new(&flat, &layout, Sharding::Full, &*world.device)?;
        world.host.barrier()?;
        let before = counting::now();
        world.host.barrier()?;
        let policies = Policies::new(&set, &specs, trainable, &state, false, &world)?;
        world.host.barrier()?;
        let held = counting::restart();
        world.host.barrier()?;
        let Policies { policy, old, reference, .. } = &policies;
        let others: &[&dyn Weights] = if all { &[&**old, &**reference] } else { &[] };
        training_pass(&model, &**policy, others, &inputs, |_, _| Ok(()))?;
        world.host.barrier()?;
        Ok([held - before, counting::peak() - held].map(|bytes| mib(bytes) / RANKS as f64))
    })?;
    let whole = mib(4 * specs.iter().flat_map(|s| s.iter()).map(|s| s.shape.iter().product::<usize>()).sum::<usize>());
    Ok([whole, measured[0][0], measured[0][1], activations])
}

#[test]
fn weights_in_parts_take_a_share_and_the_stages_in_use() -> Result<()> {
    let _alone = alone();
    for (trainable, all) in [(Trainable::Full, false), (Trainable::Lora, true)] {
        let stage = mib(4 * 18 * 384 * 384); // the weights of a block
        let [whole, held, peak, activations] = in_parts(trainable, all)?;
        let stages = (peak - activations) / stage;
        eprintln!(
            "{trainable:?} on {RANKS} ranks: {whole:.1} MiB of weights, {held:.1} held by a rank, {peak:.1} more at the peak, \
             {activations:.1} of them activations: {stages:.1} blocks of {stage:.1} MiB"
        );
        assert!(held < 1.02 * whole / RANKS as f64, "{held} of {whole} MiB");
        assert!(stages < 3.5, "{stages} stages were there at once");
    }
    Ok(())
}

/// Optimizer state and policies straight from a file: at no moment a rank has more than what it keeps and one tensor.
#[test]
fn parts_are_read_without_the_whole() -> Result<()> {
    let _alone = alone();
    for trainable in [Trainable::Full, Trainable::Lora] {
        let lora = (trainable == Trainable::Lora).then(LoraConfig::default);
        let model = model(lora.as_ref());
        let (specs, folder) = (model.specs(), tempfile::tempdir().expect("a folder"));
        let path = folder.path().join("model.safetensors");
        let set = ParamSet::init(&specs, 1, &Device::Cpu)?;
        let named = specs.iter().enumerate().flat_map(|(stage, specs)| {
            let tensors = set.stage(stage).iter().map(|(_, tensor)| tensor.clone());
            specs.iter().map(|spec| spec.name.clone()).zip(tensors)
        });
        safetensors::serialize_to_file(named, None, &path).expect("a file");
        drop(set);
        let elements = specs.iter().flat_map(|specs| specs.iter()).map(|spec| spec.shape.iter().product::<usize>());
        let (largest, whole) = (mib(4 * elements.clone().max().unwrap_or(0)), mib(4 * elements.sum::<usize>()));
        let layout = Layout::new(&specs, trainable);
        ThreadGroup::run(RANKS, |world| {
            for reader in 0..RANKS {
                world.host.barrier()?;
                if world.rank() != reader {
                    world.host.barrier()?;
                    continue;
                }
                let base = StartingParams::new(&model, Files::open(&path)?, DType::F32, 1, &Device::Cpu);
                let before = counting::now();
                let mut held = 0.0;
                let peak = peak(|| {
                    let state = Sharded::new(&base, &layout, Sharding::Full, &*world.device)?;
                    let policies = Policies::new(&base, &specs, trainable, &state, false, &world)?;
                    held = mib(counting::now() - before);
                    drop(policies);
                    Ok(())
                })?;
                eprintln!(
                    "{trainable:?}: rank {reader} of {RANKS} holds {held:.1} MiB, at the peak {peak:.1}; the largest tensor \
                     has {largest:.1}, the model {whole:.1}"
                );
                assert!(peak < held + 1.1 * largest, "{peak} MiB to hold {held}");
                world.host.barrier()?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Embeddings, samples and pictures are those of a few prompts, however many there are.
#[test]
fn memory_does_not_grow_with_the_number_of_prompts() -> Result<()> {
    const MOST: usize = 160;
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    write(ModelSize::Tiny, 1, &folder.path().join("model"), &|_| {})?;
    let config = ModelConfig {
        kind: Kind::named("sd35-medium").unwrap(),
        path: Some(folder.path().join("model")),
        prompt_cache: folder.path().join("cache"),
        resolution: 64,
        t5_tokens: 256,
        ..ModelConfig::default()
    };
    let prompts: Vec<Prompt> = (0..MOST).map(|i| format!("prompt {i}")).collect::<PromptSet>().prompts;
    let texts: Vec<&str> = prompts.iter().map(|prompt| &*prompt.text).collect();
    Pipeline::prepare(&config, &texts, &Device::Cpu, &Solo)?;
    let pipeline = Pipeline::load(&config, 1, &Device::Cpu)?;
    let params = pipeline.params()?;
    let conditioning = pipeline.encode(&prompts[..1])?;
    let embedding = mib(conditioning.iter().map(|c| c.elem_count() * c.dtype().size_in_bytes()).sum());
    drop(conditioning);
    let sampler = SamplerConfig { solver: Solver::Euler, steps: 1, ..SamplerConfig::default() };
    let [few, many] = [MOST / 4, MOST].map(|count| {
        let prompts = &prompts[..count];
        let overlap = Overlap::Off;
        let evaluation =
            Evaluation { prompts, images_per_prompt: 1, sampler: &sampler, micro_batch: 4, seed: 1, overlap };
        let none: Rewards = std::sync::Arc::new([]);
        peak(|| evaluation.run(&pipeline, &params, &none, &World::solo()).map(drop))
    });
    let (few, many) = (few?, many?);
    let more = embedding * (MOST - MOST / 4) as f64;
    eprintln!("{few:.2} MiB for {} prompts, {many:.2} for {MOST}, whose embeddings are {more:.1} MiB more", MOST / 4);
    assert!(more > 5.0 && many < few + 0.05 * more, "{few} and {many} MiB; {more} MiB of embeddings");
    Ok(())
}
