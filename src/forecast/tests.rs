use super::*;
use crate::plan::Plan;
use std::path::Path;

fn machine() -> Machine {
    Machine {
        name: "a node".into(),
        devices: 2,
        memory_gib: 10.0,
        compute: Compute {
            sample_tflops: 1e-3,
            train_tflops: 2e-3,
            decode_s: 0.25,
            reward_s: 0.5,
            optimizer_gb_s: 1.0,
        },
        network: Network { intra_gb_s: 2.0, inter_gb_s: 0.5, latency_us: 0.0 },
    }
}

fn planned(set: &[&str], ranks: usize) -> (RunConfig, Plan) {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    let config = RunConfig::load(None, &set).unwrap();
    let plan = Plan::of(&config, ranks).unwrap();
    (config, plan)
}

fn forecast(set: &[&str], ranks: usize, per_node: usize) -> Forecast {
    let (config, plan) = planned(set, ranks);
    Forecast::new(&config, &plan, &machine(), per_node).unwrap()
}

const SMALL: [&str; 8] = [
    "batch.prompts=4",
    "batch.images_per_prompt=4",
    "batch.micro_batch=4",
    "batch.timesteps=3",
    "run.updates=10",
    "method.kl_coef=1e-4",
    "old_policy.schedule=1",
    "parallel.checkpoint_activations=1",
];

#[test]
fn phases_are_work_over_speed() {
    let flops = crate::pipeline::ModelConfig::default().flops().unwrap();
    let alone = forecast(&SMALL, 1, 1);
    let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
    close(alone.sample, 16.0 * 10.0 * flops / 1e9);
    // Forward, two backward products, the old policy and the base model; 5 of 6 blocks again.
    close(alone.train, 48.0 * (5.0 + 5.0 / 6.0) * flops / 2e9);
    close(alone.decode, 16.0 * 0.25);
    close(alone.reward, 16.0 * 0.5);
    assert_eq!(alone.communicate, 0.0);
    close(alone.run, 10.0 * alone.iteration);
    close(alone.images_per_s, 16.0 / alone.iteration);
}

#[test]
fn adapters_are_work_too() {
    let set = [&SMALL[..], &["model.trainable=lora"]].concat();
    // 6 blocks of width 160: four square layers and two between 160 and 640 with adapters of rank 32; 8 x 4 patches.
    let adapters = 2.0 * 6.0 * 32.0 * (4.0 * 320.0 + 2.0 * 800.0) * 32.0;
    let forward = crate::pipeline::ModelConfig::default().flops().unwrap() + adapters;
    let Forecast { sample, train, .. } = forecast(&set, 1, 1);
    assert!((sample / (16.0 * 10.0 * forward / 1e9) - 1.0).abs() < 1e-12, "{sample}");
    // Forward, one backward product, the old policy and the base model; three quarters of 5 of 6 blocks again.
    assert!((train / (48.0 * (4.0 + 0.75 * 5.0 / 6.0) * forward / 2e9) - 1.0).abs() < 1e-12, "{train}");
}

#[test]
fn ranks_share_the_images_and_take_turns_on_too_few_devices() {
    let (alone, two, four) = (forecast(&SMALL, 1, 1), forecast(&SMALL, 2, 2), forecast(&SMALL, 4, 4));
    assert_eq!(two.sample * 2.0, alone.sample);
    assert_eq!(four.sample, two.sample, "4 ranks on 2 devices");
    let apart = forecast(&SMALL, 4, 2);
    assert_eq!(apart.sample * 4.0, alone.sample);
    assert_eq!(apart.ranks, (4, 2));
    assert!(apart.communicate > 3.9 * four.communicate, "the slower link between nodes counts");
}

/// Each call goes through a tree of the ranks and back: what many small ones cost where bytes cost nothing.
#[test]
fn every_collective_waits_for_the_network() {
    let mut machine = machine();
    (machine.network.intra_gb_s, machine.network.latency_us) = (1e12, 1e6);
    for set in [&["parallel.shard=none"][..], &["parallel.shard=full", "model.trainable=lora"]] {
        let (config, plan) = planned(&[&SMALL[..], set].concat(), 4);
        let forecast = Forecast::new(&config, &plan, &machine, 4).unwrap();
        let calls = plan.iteration_sent().calls;
        assert!(calls >= config.model.build().unwrap().stages.len(), "{calls}");
        assert!((forecast.communicate / (4.0 * calls as f64) - 1.0).abs() < 1e-9, "{set:?}: {}", forecast.communicate);
        let alone = Forecast::new(&config, &Plan::of(&config, 1).unwrap(), &machine, 4).unwrap();
        assert_eq!(alone.communicate, 0.0);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_what_hardly_fits_is_told() {
    let (config, plan) = planned(&SMALL, 4);
    let held = plan.held() as f64 / f64::from(1 << 30);
    let with = |factor: f64, per_node| {
        let machine = Machine { memory_gib: factor * held, ..machine() };
        Forecast::new(&config, &plan, &machine, per_node).map(|forecast| forecast.to_string())
    };
    assert!(with(2.0, 2).unwrap().contains(" GiB (50 %), and activations\n"), "{}", with(2.0, 2).unwrap());
    assert!(with(1.05, 2).unwrap().contains("(95 %), and activations: warning: little is left for them\n"));
    let refused = with(0.9, 2).unwrap_err();
    assert!(matches!(refused, crate::Error::Usage(_)), "{refused}");
    assert!(refused.to_string().contains("(111 %), and activations: does not fit; use more ranks"), "{refused}");
    // Four ranks of a node share its two devices.
    assert!(with(1.5, 4).is_err() && with(2.5, 4).is_ok());
}

/// A ring over the ranks in their order leaves each node once.
#[test]
fn a_node_sends_what_its_last_rank_sends() {
    let links = |ranks, per_node| Links::new(10.0, ranks, per_node);
    assert_eq!(links(8, 8), Links { nodes: 1, inside: 80.0, between: 0.0 });
    assert_eq!(links(8, 4), Links { nodes: 2, inside: 30.0, between: 10.0 });
    assert_eq!(links(8, 1), Links { nodes: 8, inside: 0.0, between: 10.0 });
    assert_eq!(links(2, 8), Links { nodes: 1, inside: 20.0, between: 0.0 });
}

#[test]
fn the_machines_of_the_project_can_be_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/machines");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 2);
    files.iter().for_each(|file| assert!(Machine::read(file).unwrap().devices > 0));
}

#[test]
fn a_wrong_machine_is_one_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut wrong = machine();
    wrong.compute.train_tflops = 0.0;
    std::fs::write(file.path(), toml::to_string(&wrong).unwrap()).unwrap();
    let line = Machine::read(file.path()).unwrap_err().to_string();
    assert!(line.contains("compute.train_tflops = 0: must be a finite number above 0"), "{line}");
}
