//! Rewards over HTTP: a server that behaves, servers that do not, and the program's own.

mod server;
mod serving;
mod training;

use candle_core::{Device, Tensor};
use flowrl_dist::advantage::Score;
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::reward::remote::{OnFailure, WireFormat};
use flowrl_dist::reward::{
    Overlap, Remote, RemoteConfig, Reward, RewardConfig, RewardKind, Rewards, Scoring, build, serve,
};
use server::{Does, Server};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn right() -> Does {
    Does::Says(200, r#"{"results": [{n}]}"#.into())
}

fn says(text: &str) -> Does {
    Does::Says(200, text.into())
}

/// Five images of 8 x 8 and their prompts.
fn five() -> (Tensor, Vec<Prompt>) {
    let values: Vec<f32> = (0..5 * 3 * 64).map(|i| (i % 251) as f32 / 250.0).collect();
    let prompts = (0..5).map(|i| format!("picture {i}")).collect::<PromptSet>().prompts;
    (Tensor::from_vec(values, (5, 3, 8, 8), &Device::Cpu).unwrap(), prompts)
}

#[test]
fn a_good_server_scores_every_image_in_its_place() {
    let server = Server::start(|_| right());
    let remote = server.remote(|_| ());
    let (images, mut prompts) = five();
    let metadata: serde_json::Map<_, _> = serde_json::from_str(r#"{"tag": "colors", "include": []}"#).unwrap();
    prompts[0].metadata = Some(metadata.into());
    remote.ready().unwrap();
    assert_eq!(remote.score(&images, &prompts).unwrap(), [Some(0.5); 5]);
    assert_eq!((server.asked(), remote.name()), (3, "good")); // 2 + 2 + 1 images
    let bodies = server.bodies.lock().unwrap();
    let first = bodies.iter().find(|body| body.contains("picture 0")).unwrap();
    let body: serde_json::Value = serde_json::from_str(first).unwrap();
    assert_eq!(body["rewards"], serde_json::json!(["good"]));
    assert_eq!(body["requests"][0]["metadata"]["tag"], "colors");
    assert_eq!(body["requests"][1]["metadata"], serde_json::json!({}));
}

#[test]
fn what_passes_is_tried_again() {
    for trouble in [
        Does::HangsUp,
        Does::BreaksOff,
        Does::NeverEnds,
        Does::Sleeps(Duration::from_secs(60)),
        Does::Says(503, "busy".into()),
        Does::Says(429, "slower".into()),
        says("<html>oops"),
        says(r#"{"results": []}"#),
        says(r#"{"results": [{"good": NaN}, {"good": 1}]}"#),
    ] {
        let timeout = trouble.timeout();
        let server = Server::start(move |n| if n == 0 { trouble.clone() } else { right() });
        let remote = server.remote(|config| (config.connections, config.timeout_s) = (1, timeout));
        let (images, prompts) = five();
        assert_eq!(remote.score(&images, &prompts).unwrap(), [Some(0.5); 5]);
        assert_eq!(server.asked(), 4);
    }
}

/// Every way to fail ends within the time that the configuration allows, in one line with server and reason.
#[test]
fn what_does_not_pass_stops_the_run_with_the_servers_name() {
    for (trouble, what) in [
        (Does::HangsUp, "(2 attempts)"),
        (Does::BreaksOff, "(2 attempts)"),
        (Does::NeverEnds, "its answer is longer than"),
        (Does::Sleeps(Duration::from_secs(60)), "no answer in time"),
        (Does::Says(500, "CUDA out of memory".into()), "it answers 500 Internal Server Error: CUDA out of memory"),
        (Does::Says(401, "no".into()), "set token_env"),
        (Does::Says(307, "no".into()), "it answers 307"),
        (Does::Says(413, "too large".into()), "use a smaller batch"),
        (says("<html>oops"), "is not JSON"),
        (says(r#"{"results": [{n}, {n}]}"#), "it gave 4 scores for 2 images"),
        (says(r#"{"results": [{"good": NaN}, {"good": 1}]}"#), "is not JSON"),
        (says(r#"{"results": [{n}], "errors": [null, {"good": "no face"}]}"#), "no face"),
    ] {
        let timeout = trouble.timeout();
        let server = Server::start(move |_| trouble.clone());
        let remote = server.remote(|config| (config.connections, config.timeout_s) = (1, timeout));
        let (images, prompts) = five();
        let begun = Instant::now();
        let error = remote.score(&images.narrow(0, 0, 4).unwrap(), &prompts[..4]).unwrap_err().to_string();
        // Two times 2 s for the silent server, and the longest pause.
        assert!(begun.elapsed() < Duration::from_secs(16), "{error} took {:?}", begun.elapsed());
        assert!(error.starts_with(&format!("reward good: {}: ", server.url)), "{error}");
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
        assert!(server.asked() <= 3, "{error}: asked {} times", server.asked());
    }
}

#[test]
fn a_server_that_dies_in_the_middle_costs_the_images_that_it_did_not_score() {
    let server = Server::start(|n| if n == 0 { right() } else { Does::HangsUp });
    let remote = server.remote(|config| {
        config.connections = 1;
        config.on_failure = OnFailure::Drop;
    });
    let (images, prompts) = five();
    let scores = remote.try_score(&images, &prompts).unwrap().scores;
    assert_eq!(scores, [Score::Value(0.5), Score::Value(0.5), Score::Failed, Score::Failed, Score::Failed]);
    assert_eq!(server.asked(), 3, "after the second batch failed twice, the third is not tried");
    assert!(remote.score(&images, &prompts).is_err());

    // One image of a batch: only it is lost, after a second attempt; one to which the reward does not apply is not.
    let server = Server::start(|n| match n {
        0 => says(r#"{"results": [{"good": 1}, {}], "errors": [null, {"good": "no face"}]}"#),
        1 => says(r#"{"results": [{}], "errors": [{"good": "no face"}]}"#),
        2 => says(r#"{"results": [{"good": null}, {"good": 2}]}"#),
        _ => right(),
    });
    let remote = server.remote(|config| {
        config.connections = 1;
        config.on_failure = OnFailure::Drop;
    });
    let scores = remote.try_score(&images, &prompts).unwrap().scores;
    let [one, two, half] = [1.0, 2.0, 0.5].map(Score::Value);
    assert_eq!(scores, [one, Score::Failed, Score::NotApplicable, two, half]);
}

/// An image that the server could not score this time, its GPU's memory being short, has its score a little later; only
/// it is asked for again, and it ends nothing.
#[test]
fn an_image_that_fails_is_tried_again_alone() {
    for policy in [OnFailure::Stop, OnFailure::Drop] {
        let server = Server::start(|n| match n {
            0 => says(r#"{"results": [{"good": 1}, {}], "errors": [null, {"good": "CUDA out of memory"}]}"#),
            1 => says(r#"{"results": [{"good": 2}]}"#),
            _ => right(),
        });
        let remote = server.remote(|config| (config.connections, config.on_failure) = (1, policy));
        let (images, prompts) = five();
        let scores = remote.try_score(&images, &prompts).unwrap().scores;
        assert_eq!(scores, [1.0, 2.0, 0.5, 0.5, 0.5].map(Score::Value));
        assert_eq!(server.asked(), 4);
        let again = &server.bodies.lock().unwrap()[1];
        assert!(again.contains("picture 1") && !again.contains("picture 0"), "{again}");
    }
}

/// Batches go out as they come: with two connections the server has two of them, and no more, while others are still to
/// be sampled, though it answers none; without overlap it is asked when all are there.
#[test]
fn a_slow_server_is_asked_while_images_are_sampled() {
    for overlap in [Overlap::Auto, Overlap::On, Overlap::Off] {
        let held = Arc::new(AtomicBool::new(true));
        let holds = held.clone();
        let server = Server::start(move |_| {
            while holds.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
            }
            right()
        });
        let remote = server.remote(|config| (config.connections, config.timeout_s) = (2, 60));
        let rewards: Rewards = Arc::new([Box::new(remote) as _]);
        let (images, prompts) = five();
        let mut scoring = Scoring::new(&rewards, overlap, &Device::Cpu).unwrap();
        scoring.add(0, &images.narrow(0, 0, 3).unwrap(), &prompts[..3]).unwrap(); // requests of 2 and 1
        if overlap != Overlap::Off {
            server.until_asked(2);
        }
        scoring.add(3, &images.narrow(0, 3, 2).unwrap(), &prompts[3..]).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(server.asked(), if overlap == Overlap::Off { 0 } else { 2 }, "{overlap:?}");
        held.store(false, Ordering::SeqCst);
        let (results, _) = scoring.finish().unwrap();
        assert_eq!((&results[0].scores[..], server.asked()), (&[Score::Value(0.5); 5][..], 3), "{overlap:?}");
    }
}

#[test]
fn a_server_that_dies_while_images_are_sampled_is_asked_no_further() {
    for (policy, error) in [(OnFailure::Stop, true), (OnFailure::Drop, false)] {
        let server = Server::start(|n| if n == 0 { right() } else { Does::HangsUp });
        let remote = server.remote(|config| (config.connections, config.on_failure) = (1, policy));
        let url = server.url.clone();
        let rewards: Rewards = Arc::new([Box::new(remote) as _]);
        let (images, prompts) = five();
        let mut scoring = Scoring::new(&rewards, Overlap::Auto, &Device::Cpu).unwrap();
        for i in 0..5 {
            scoring.add(i, &images.narrow(0, i, 1).unwrap(), &prompts[i..=i]).unwrap();
        }
        match scoring.finish() {
            Err(failed) => {
                assert!(error && failed.to_string().starts_with(&format!("reward good: {url}: ")), "{failed}")
            }
            Ok((results, _)) => {
                assert!(!error);
                assert_eq!(results[0].scores, [&[Score::Value(0.5)][..], &[Score::Failed; 4]].concat());
            }
        }
        assert_eq!(server.asked(), 3, "the second request and its second attempt, but no third");
    }
}

#[test]
fn a_server_that_is_not_there_is_found_before_training() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let config = RemoteConfig { url: url.clone(), reward: "good".into(), retries: 0, ..RemoteConfig::default() };
    let error = Remote::new(&config).unwrap().ready().unwrap_err().to_string();
    assert!(error.starts_with(&format!("reward good: {url}: ")) && error.contains("start the server"), "{error}");
    let token = RemoteConfig { token_env: Some("FLOWRL_NO_SUCH_TOKEN".into()), ..config };
    let error = Remote::new(&token).unwrap_err().to_string();
    assert!(error.contains("token_env = \"FLOWRL_NO_SUCH_TOKEN\": there is no such variable"), "{error}");
}

#[test]
fn other_servers_languages_are_spoken() {
    let server = Server::start(|_| says(r#"{"rewards": [1, 2]}"#));
    let remote = server.remote(|config| config.format = WireFormat::FlowFactory);
    let (images, prompts) = five();
    let two = images.narrow(0, 0, 2).unwrap();
    assert_eq!(remote.score(&two, &prompts[..2]).unwrap(), [Some(1.0), Some(2.0)]);
    assert!(server.bodies.lock().unwrap()[0].starts_with(r#"{"prompt":["picture 0","picture 1"],"image":["iVBOR"#));

    let server =
        Server::start(|_| says(r#"{"results": [{"good": {"v2": 1, "v3": 2}}, {"good": {"v2": 3, "v3": 4}}]}"#));
    let remote = server.remote(|config| {
        config.format = WireFormat::Unirl;
        config.reward = "good/v3".into();
    });
    assert_eq!(remote.score(&two, &prompts[..2]).unwrap(), [Some(2.0), Some(4.0)]);
    let body: serde_json::Value = serde_json::from_str(&server.bodies.lock().unwrap()[0]).unwrap();
    assert_eq!(body["requests"][1]["history"][0]["text"], "picture 1");
    assert_eq!(body["requests"][0]["required_rewards"], serde_json::json!(["good"]));
}

/// The program's own server, asked by the program's own client, gives what the reward itself gives, bit for bit.
#[test]
fn a_served_reward_is_the_reward() {
    let names = [RewardKind::JpegIncompressibility, RewardKind::Colour];
    let rewards: Rewards = build(&names.map(RewardConfig::new), 1).unwrap().into();
    let (listener, address) = serve::listen("127.0.0.1:0", false).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    // Red on yellow; the reward scores the first three prompts, all differently, and not the others.
    let picture: Vec<f32> = (0..3 * 64).map(|i| [1.0, f32::from(u8::from(i % 8 != 3)), 0.0][i / 64]).collect();
    let images = Tensor::from_vec(picture.repeat(5), (5, 3, 8, 8), &Device::Cpu).unwrap();
    let texts = [r#""1" in red on yellow"#, r#""1" in green on yellow"#, r#""1" in green on sky"#, "a cat", "a dog"];
    let prompts = texts.into_iter().map(String::from).collect::<PromptSet>().prompts;
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let remote = |reward: &str| {
                let config = RemoteConfig {
                    url: format!("http://{address}"),
                    reward: reward.into(),
                    retries: 0,
                    batch: 2,
                    ..RemoteConfig::default()
                };
                Remote::new(&config).unwrap()
            };
            let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let jpeg = remote("jpeg-incompressibility");
                jpeg.ready().unwrap();
                let none = remote("beauty").ready().unwrap_err();
                assert_eq!(none.exit_code(), 2);
                let none = none.to_string();
                assert!(none.contains("has no such reward, but jpeg-incompressibility, colour"), "{none}");
                let refused = remote("beauty").score(&images, &prompts).unwrap_err().to_string();
                assert!(refused.contains("400 Bad Request") && refused.contains("there is no reward"), "{refused}");
                let colour = remote("colour").score(&images, &prompts).unwrap();
                (jpeg.score(&images, &prompts).unwrap(), colour)
            }));
            stop.send(()).unwrap();
            asked
        });
        serve::serve(rewards.clone(), listener, None, stopped).unwrap();
        let (jpeg, colour) = asking.join().unwrap().unwrap();
        assert_eq!(jpeg, rewards[0].score(&images, &prompts).unwrap());
        assert_eq!(colour, [Some(1.0), Some(0.5), Some(0.0), None, None]);
        assert_eq!(colour, rewards[1].score(&images, &prompts).unwrap());
    });
    assert!(TcpStream::connect(address).is_err(), "stopped");
}

#[test]
fn a_server_open_to_others_needs_a_token() {
    let error = serve::listen("0.0.0.0:0", false).unwrap_err().to_string();
    assert!(error.contains("--token-file"), "{error}");
    serve::listen("0.0.0.0:0", true).unwrap();
    assert!(serve::listen("nowhere", true).unwrap_err().to_string().contains("HOST:PORT"));
}
