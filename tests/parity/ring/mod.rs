//! Every method trains a small model end to end: on a ring of eight modes it must move the samples towards the modes that
//! the reward prefers, in proportion to what its advantages say of them, without leaving the data.

mod law;
mod model;
mod run;

use flowrl_dist::Result;
use flowrl_dist::objective::{
    AdvantageFlowConfig, DiffusionNftConfig, FlowAwrConfig, Gamma, Method, MethodConfig, Variant,
};
use flowrl_dist::pipeline::Pipeline;
use law::{Look, MODES, correlation, reward_of, rewards};
use run::{Run, advantages, look};
use std::sync::LazyLock;

/// The base model and what its samples look like.
static BASE: LazyLock<(Pipeline, Look)> = LazyLock::new(|| {
    let pipeline = model::pretrained().expect("a base model");
    let look = look(&pipeline, &pipeline.params().expect("parameters")).expect("samples");
    (pipeline, look)
});

const ITERATIONS: u64 = 40;

/// The policy gradient of single steps is noisier than a regression to samples: fewer of AdamW's steps, which are all of one
/// length, go the same way.
fn lr(method: &MethodConfig) -> f64 {
    if method.kind() == Method::FlowGrpo { 6e-4 } else { 3e-4 }
}

fn flow_awr(variant: Variant) -> MethodConfig {
    FlowAwrConfig { variant, ..Default::default() }.into()
}

fn advantage_flow(gamma: Gamma) -> MethodConfig {
    AdvantageFlowConfig { gamma, ..Default::default() }.into()
}

fn diffusion_nft(nft_beta: f64) -> MethodConfig {
    DiffusionNftConfig { nft_beta, ..Default::default() }.into()
}

fn methods() -> Vec<(&'static str, MethodConfig)> {
    vec![
        ("FlowAWR, released", flow_awr(Variant::Released)),
        ("FlowAWR, paper", flow_awr(Variant::Paper)),
        ("FlowAWR, exact", flow_awr(Variant::Exact)),
        ("FlowAWR, robust", flow_awr(Variant::Robust)),
        ("AdvantageFlow, 1-A", advantage_flow(Gamma::OneMinusAdvantage)),
        ("AdvantageFlow, 1.1", advantage_flow(Gamma::Constant(1.1))),
        ("DiffusionNFT, beta 1", diffusion_nft(1.0)),
        ("DiffusionNFT, beta 0.2", diffusion_nft(0.2)),
        ("DiffusionNFT, beta 0.1", diffusion_nft(0.1)),
        ("AWM", MethodConfig::of(Method::Awm)),
        ("PEPG", MethodConfig::of(Method::Pepg)),
        ("Flow-GRPO", MethodConfig::of(Method::FlowGrpo)),
    ]
}

/// Trains with `sign` times the reward and checks what became of the samples.
fn check(name: &str, method: &MethodConfig, sign: f64) -> Result<()> {
    let (pipeline, before) = &*BASE;
    let mut run = Run::new(pipeline, method, lr(method))?;
    run.iterations(ITERATIONS, &|x0| Ok(rewards(x0)?.into_iter().map(|reward| sign * reward).collect()))?;
    let after = run.look()?;

    // A small step towards the tilt 1 + A of the policy's law moves the logarithm of a mode's share by as much as its A.
    let of_modes = (0..MODES).map(|mode| sign * reward_of(mode)).collect();
    let tilt = correlation(&after.tilt(before), &advantages(&run.map, of_modes, &[0; MODES])?);
    let rise = sign * (after.reward - before.reward) / (1.0 - sign * before.reward);
    let (best, worst) = if sign > 0.0 { (0, 4) } else { (4, 0) };
    let gain = |mode: usize| after.shares[mode] / before.shares[mode];
    eprintln!(
        "{name:22} reward {:+.3} -> {:+.3} ({:.0} % of the possible)  best mode {:.3} -> {:.3}  worst {:.3} -> {:.3}  \
         tilt {tilt:.3}  off ring {:.3} -> {:.3}  off modes {:.3} -> {:.3}",
        before.reward,
        after.reward,
        100.0 * rise,
        before.shares[best],
        after.shares[best],
        before.shares[worst],
        after.shares[worst],
        before.off_ring,
        after.off_ring,
        before.off_mode,
        after.off_mode
    );
    assert!(rise > 0.3, "{name}: {after:?}");
    assert!(gain(best) > 1.8 && gain(worst) < 0.6, "{name}: {after:?}");
    assert!(tilt > 0.93, "{name}: {:?}", after.tilt(before));
    // Points spread evenly over the ring would be 0.39 from the nearest mode.
    assert!(after.off_ring < 0.25 && after.off_mode < 0.33, "{name}: {after:?}");
    Ok(())
}

#[test]
fn the_base_model_samples_the_ring() {
    let (_, look) = &*BASE;
    assert!(look.shares.iter().all(|share| (share - 1.0 / MODES as f64).abs() < 0.03), "{look:?}");
    assert!(look.off_mode < 0.22 && look.reward.abs() < 0.05, "{look:?}");
}

#[test]
fn every_method_tilts_the_law_towards_the_reward() -> Result<()> {
    methods().iter().try_for_each(|(name, method)| check(name, method, 1.0))
}

#[test]
fn the_opposite_reward_tilts_the_other_way() -> Result<()> {
    check("FlowAWR, opposite", &flow_awr(Variant::Released), -1.0)
}

/// Where all rewards are equal the gradient is exactly zero: AdamW would scale up what else were left of it.
#[test]
fn equal_rewards_leave_the_parameters_alone() -> Result<()> {
    let (pipeline, _) = &*BASE;
    for (name, method) in methods() {
        let mut run = Run::new(pipeline, &method, lr(&method))?;
        let start = run.parameters()?;
        run.iterations(3, &|x0| Ok(vec![0.7; x0.dim(0)?]))?;
        assert!(run.parameters()? == start, "{name} moved the parameters");
    }
    Ok(())
}
