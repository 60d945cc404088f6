//! A number that is not finite never reaches the weights, and all ranks stop alike.

use crate::common::Job;
use crate::runs::{TIMEOUT, Training, alone};
use candle_core::{Device, Tensor};
use flowrl_dist::Error;
use flowrl_dist::advantage::Scores;
use flowrl_dist::comm::{Communicator, ReduceOp, ThreadGroup};
use flowrl_dist::data::PromptSet;
use flowrl_dist::error::EXIT_FAILED;
use flowrl_dist::optim::{OptimConfig, Sharded, StepReport};
use flowrl_dist::params::{Init, Layout, SpecList, Trainable};
use flowrl_dist::reward::check_scores;
use flowrl_dist::shard::Sharding;

fn layout() -> Layout {
    let mut specs = SpecList::new("", None);
    specs.base("weight", &[7], Init::Ones);
    Layout::new(&[&specs.finish()], Trainable::Full)
}

/// 7 elements on 2 ranks: rank 1's last is padding.
fn gradient(values: [f32; 7]) -> Tensor {
    Tensor::new(&values, &Device::Cpu).unwrap().pad_with_zeros(0, 0, 1).unwrap()
}

/// One update with this rank's gradients.
fn step(state: &mut Sharded, gradients: &Tensor, comm: &dyn Communicator) -> flowrl_dist::Result<StepReport> {
    let gradient = comm.reduce_scatter(gradients, ReduceOp::Sum)?;
    state.step(&gradient, &OptimConfig::default(), 0.1, comm)
}

fn bits(state: &Sharded) -> Vec<Vec<u32>> {
    state.snapshot().unwrap().vectors.into_values().map(|v| v.into_iter().map(f32::to_bits).collect()).collect()
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_on_any_rank() {
    let fine = gradient([1.0, -1.0, 0.5, 0.0, 2.0, 1.0, 3.0]);
    // Rank 1's gradient alone, or only the sum of both ranks', is not finite, in the shard of rank 0.
    for bad in [[f32::NAN; 2], [f32::INFINITY; 2], [f32::NEG_INFINITY, 1.0], [f32::MAX, f32::MAX]] {
        ThreadGroup::run(2, |world| {
            let comm: &dyn Communicator = &*world.device;
            let flat = Tensor::new(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], &Device::Cpu)?;
            let mut state = Sharded::new(&flat, &layout(), Sharding::Optimizer, comm)?;
            step(&mut state, &fine, comm)?;
            let before = bits(&state);
            let mine = if world.rank() == 1 || bad[0] == f32::MAX { [bad[0], bad[1]] } else { [0.0; 2] };
            let gradient = gradient([1.0, mine[0], 0.0, mine[1], 0.0, 0.0, 0.0]);
            match step(&mut state, &gradient, comm) {
                Err(Error::NotFinite(message)) => assert!(message.starts_with("update 2: "), "{message}"),
                other => panic!("rank {}, {bad:?}: {other:?}", world.rank()),
            }
            assert_eq!((bits(&state), state.update), (before.clone(), 1));
            step(&mut state, &fine, comm)?;
            assert_ne!(bits(&state), before);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_score_that_is_not_finite_is_named() {
    let prompts = PromptSet::train("glyphs").unwrap().prompts;
    for bad in [f64::NAN, f64::INFINITY] {
        let scores = vec![Some(0.5), None, Some(bad)];
        let colour = Scores::new("colour", 1.0, [1.0; 3]);
        let broken = Scores::new("broken", 0.0, scores);
        let error = check_scores(&[colour, broken], &prompts[..3]).unwrap_err();
        assert!(matches!(&error, Error::NotFinite(_)));
        let (text, index) = (&prompts[2].text, prompts[2].index);
        assert_eq!(error.to_string(), format!("reward broken: score {bad} for image 2, prompt {index} {text:?}"));
    }
}

/// A learning rate that makes the weights too large to work with: the next iteration finds out, on both ranks.
#[test]
fn a_run_that_diverges_stops_with_a_word() {
    let _alone = alone();
    let training = Training::new(&["optim.lr=1e30", "run.checkpoint_every=1"]);
    let output = Job::start(&mut training.command(2, 4)).finish(TIMEOUT);
    assert_eq!(output.code(), EXIT_FAILED, "{output}");
    assert!(output.stderr.contains("is not finite: the policy has diverged; start again"), "{output}");
    let record = training.record();
    assert!(record.vectors.values().flatten().all(|x| x.is_finite()));
    assert!(record.state.0 < 4, "{output}");
    output.assert_no_leftovers();
}
