//! What a rank samples does not depend on how many other images it has.

use candle_core::{Device, Tensor};
use flowrl_dist::batching::share;
use flowrl_dist::config::RunConfig;
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::pipeline::Pipeline;
use flowrl_dist::reward::{Ocr, Reward};
use flowrl_dist::rng::Purpose;
use flowrl_dist::rollout::{Request, Sampling};

const MICRO_BATCH: usize = 4;

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Samples, and their scores, of one rank.
fn rollout(pipeline: &Pipeline, reward: &Ocr, requests: &[Request]) -> (Vec<u32>, Vec<Option<u64>>) {
    let set = ["sampler.steps=4".to_string()];
    let sampler = RunConfig::load(None, &set).unwrap().sampler;
    let prompts: Vec<Prompt> = requests.iter().map(|request| request.prompt.clone()).collect();
    let sampling = Sampling {
        pipeline,
        params: &pipeline.params().unwrap(),
        sampler: &sampler,
        micro_batch: MICRO_BATCH,
        seed: 42,
        purpose: Purpose::Rollout,
        iteration: 3,
    };
    let samples = sampling.run(requests, requests.len()).unwrap();
    let scores = reward.score(&pipeline.decode(&samples.x0).unwrap(), &prompts).unwrap();
    (bits(&samples.x0), scores.into_iter().map(|score| score.map(f64::to_bits)).collect())
}

#[test]
fn samples_and_scores_do_not_depend_on_the_number_of_ranks() {
    let config = RunConfig::load(None, &[]).unwrap();
    let pipeline = Pipeline::load(&config.model, 42, &Device::Cpu).unwrap();
    let prompts = PromptSet::train("glyphs").unwrap().draw(42, 0, 3, 3);
    let requests: Vec<Request> = (0..15).map(|i| Request { prompt: prompts[i / 5].clone(), image: i % 5 }).collect();
    let whole = rollout(&pipeline, &Ocr::new(2).unwrap(), &requests);
    assert!(whole.1.iter().any(|score| *score != whole.1[0]), "scores differ between images");
    let reward = Ocr::new(1).unwrap();
    for ranks in [2, 3, 4, 8] {
        let parts = (0..ranks).map(|rank| rollout(&pipeline, &reward, &requests[share(15, rank, ranks)]));
        let (samples, scores): (Vec<_>, Vec<_>) = parts.unzip();
        assert!(samples.concat() == whole.0, "samples differ on {ranks} ranks");
        assert_eq!(scores.concat(), whole.1, "{ranks} ranks");
    }
}
