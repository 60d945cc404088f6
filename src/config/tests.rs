//! Every mistake in a configuration is one line: where it was made, key, value, remedy. And the reference is complete.

use super::*;
use crate::advantage::{Aggregate, Map, Normaliser};
use crate::flow::sde::SdeConfig;
use crate::objective::{Form, Gamma, Objective};
use crate::reward::remote::{OnFailure, WireFormat};
use std::collections::BTreeSet;
use toml::{Table, Value};

/// Settings over the embedded configuration, and what the line must contain after its beginning, `--set`.
const SETTINGS: &[(&[&str], &[&str])] = &[
    // Keys that there are not.
    (&["optm.lr=1"], &["optm: no such key", "did you mean optim?", "parallel"]),
    (&["optimizer.lr=1"], &["optimizer: no such key", "did you mean optim?"]),
    (
        &["batch.image_per_prompt=8"],
        &["batch.image_per_prompt: no such key", "mean batch.images_per_prompt?", "micro_batch"],
    ),
    (&["run.colour=1"], &["run.colour: no such key; known here: name, seed"]),
    (&["model.lora={rank=4, alpha=1, target=[]}"], &["model.lora.target: no such key", "model.lora.targets?"]),
    (&["reward.0.wieght=2"], &["reward[0].wieght: no such key", "did you mean reward[0].weight?"]),
    // Settings that are none.
    (&["run"], &["--set run: there is no =", "section.key=value"]),
    (&["lr=1"], &["lr: no such key; known here: run, model"]),
    (&["optim..lr=1"], &["--set optim..lr=1: a key is empty"]),
    (&["reward.1.weight=2"], &["--set reward.1.weight=2: the list has 1 entries"]),
    (&["reward.ocr.weight=2"], &["a list takes a number, counted from 0"]),
    (&["run.name.x=1"], &["--set run.name.x=1: ", "no section"]),
    // Types.
    (&["optim.lr=fast"], &["optim.lr = \"fast\": must be a number"]),
    (&["optim.lr="], &["optim.lr = \"\": must be a number"]),
    (&["optim.lr={a = 1}"], &["optim.lr = { a = 1 }: must be a number"]),
    (&["batch.prompts=1.5"], &["batch.prompts = 1.5: must be a whole number"]),
    (&["batch.prompts=-1"], &["batch.prompts = -1: must be a whole number, 0 or above"]),
    (&["batch.prompts=[8]"], &["batch.prompts = [8]: must be a whole number"]),
    (&["run.name=7"], &["run.name = 7: must be text in quotes"]),
    (&["run.out=true"], &["run.out = true: must be a path in quotes"]),
    (&["method.adaptive_scale=1"], &["method.adaptive_scale = 1: must be true or false"]),
    (&["optim.betas=0.9"], &["optim.betas = 0.9: must be a list of two numbers"]),
    (&["optim.betas=[0.9]"], &["optim.betas = [0.9]: must be a list of two numbers"]),
    (&["optim.betas=[0.9, 0.99, 1]"], &["optim.betas = [0.9, 0.99, 1]: must be a list of two numbers"]),
    (&["optim.betas=[0.9, \"x\"]"], &["optim.betas[1] = \"x\": must be a number"]),
    (&["batch=8"], &["batch = 8: must be a section with keys"]),
    (&["model.lora=8"], &["model.lora = 8: must be a section"]),
    // Names.
    (
        &["method.name=ppo"],
        &["method.name = \"ppo\": must be one of \"flow-awr\", \"advantage-flow\", \"diffusion-nft\""],
    ),
    (&["method.name=1"], &["method.name = 1: must be a name in quotes"]),
    (&["sampler.solver=ddim"], &["sampler.solver = \"ddim\": must be one of \"euler\", \"dpm2\", \"sde\""]),
    (&["advantage.map=relu"], &["advantage.map = \"relu\": must be one of \"linear\", \"softmax\", \"gated-softmax\""]),
    (&["advantage.normaliser=std"], &["advantage.normaliser = \"std\": must be one of \"global-std\""]),
    (&["reward.0.name=clip"], &["reward[0].name = \"clip\": must be one of \"ocr\", \"colour\", \"jpeg-"]),
    (&["old_policy.schedule=3"], &["old_policy.schedule = 3: must be 0 (on policy), 1 (linear) or 2 (delayed)"]),
    (&["old_policy.schedule=linear"], &["old_policy.schedule = \"linear\": must be 0 (on policy), 1 (linear) or 2"]),
    (&["old_policy.schedule=-1"], &["old_policy.schedule = -1: must be 0"]),
    (&["parallel.shard=params"], &["parallel.shard = \"params\": must be one of \"none\", \"optimizer\", \"full\""]),
    (&["parallel.backend=nccl"], &["parallel.backend = \"nccl\": must be one of \"auto\", \"solo\", \"mpi\""]),
    (&["model.kind=sd4"], &["model.kind = \"sd4\": must be \"glyphs\" or \"sd35-medium\""]),
    (&["model.lora.path=lora"], &["model.lora.path = \"lora\": belongs to sd35-medium; remove it"]),
    (&["model.kind=sd35-medium"], &["needs model.path; name the folder"]),
    (
        &["model.kind=sd35-medium", "model.path=sd35", "reward.0.name=ocr"],
        &["reward[0].name = \"ocr\": reads a whole picture as one line; add detector"],
    ),
    (
        &["model.kind=sd35-medium", "model.path=sd35", "model.resolution=500"],
        &["model.resolution = 500: use a multiple of 16"],
    ),
    (&["model.kind=sd35-medium", "model.path=sd35", "model.t5_tokens=0"], &["model.t5_tokens = 0: must be at least 1"]),
    (&["model.trainable=half"], &["model.trainable = \"half\": must be \"full\" or \"lora\""]),
    (&["log.level=inof"], &["log.level = \"inof\": must be one of error, warn"]),
    // Rewards.
    (
        &["reward.0.path=\"clip\""],
        &["reward[0].path = \"clip\": belongs to clip-score, pick-score, hps, aesthetic; remove it"],
    ),
    (&["reward.0.retries=1"], &["reward[0].retries = 1: belongs to remote; remove it"]),
    (
        &["reward.0.name=pick-score"],
        &["reward[0].name = \"pick-score\": needs path, the folder or file of its model; add it"],
    ),
    (&["reward.0.name=remote"], &["reward[0].name = \"remote\": needs url, the server's address"]),
    (&["reward.0.name=remote", "reward.0.url=\"node7:8000\""], &["reward[0].url = \"node7:8000\": must be"]),
    (
        &["reward.0.name=remote", "reward.0.url=\"http://a:1\""],
        &["reward[0].name = \"remote\": needs reward, the server's name"],
    ),
    (
        &["reward.0.name=\"remote\"", "reward.0.url=\"http://a:1\"", "reward.0.reward=\"b\"", "reward.0.timeout_s=200"],
        &["reward[0].timeout_s = 200: a silent server would hold a rank for 836 s", "parallel.deadline_s = 600"],
    ),
    (
        &["reward.0.name=\"remote\"", "reward.0.url=\"http://a:1\"", "reward.0.reward=\"b\"", "reward.0.batch=0"],
        &["reward[0].batch = 0: must be from 1 to 4096"],
    ),
    (
        &[
            "reward.0.name=\"remote\"",
            "reward.0.url=\"http://a:1\"",
            "reward.0.reward=\"b\"",
            "reward.0.on_failure=\"skip\"",
        ],
        &["reward[0].on_failure = \"skip\": must be \"stop\" or \"drop\""],
    ),
    // Counts.
    (&["run.updates=0"], &["run.updates = 0: must be at least 1"]),
    (&["run.keep_last=0"], &["run.keep_last = 0: must be at least 1"]),
    (&["batch.prompts=0"], &["batch.prompts = 0: must be at least 1"]),
    (&["batch.prompts=1000000"], &["batch.prompts = 1000000: data.train = \"glyphs\" holds", "use at most"]),
    (&["batch.images_per_prompt=1"], &["batch.images_per_prompt = 1: ", "use 2 or more"]),
    (&["batch.images_per_prompt=9000000000000000000"], &["batch.images_per_prompt = 9", "must be at most 1000000"]),
    (&["batch.micro_batch=0"], &["batch.micro_batch = 0: must be at least 1"]),
    (&["batch.updates_per_iteration=0"], &["batch.updates_per_iteration = 0: must be at least 1"]),
    (&["batch.updates_per_iteration=17"], &["batch.updates_per_iteration = 17: ", "use at most 16"]),
    (&["batch.timesteps=0"], &["batch.timesteps = 0: ", "use 1 or more"]),
    (&["batch.timesteps=11"], &["batch.timesteps = 11: ", "sampler.steps = 10", "use at most"]),
    (&["sampler.steps=0", "batch.timesteps=0"], &["batch.timesteps = 0"]),
    (&["sampler.shift=0"], &["sampler.shift = 0: must be a finite number above 0"]),
    (&["eval.steps=0"], &["eval.steps = 0: must be at least 1"]),
    (&["eval.images_per_prompt=0"], &["eval.images_per_prompt = 0: must be at least 1"]),
    (&["parallel.device=gpu"], &["parallel.device = \"gpu\": must be one of \"auto\", \"cpu\", \"cuda\""]),
    (&["parallel.deadline_s=0"], &["parallel.deadline_s = 0: must be at least 1"]),
    (&["parallel.deadline_s=9223372036854775807"], &["parallel.deadline_s = 9", "at most"]),
    // Numbers.
    (&["optim.lr=0"], &["optim.lr = 0: must be a finite number above 0"]),
    (&["optim.lr=-1e-4"], &["optim.lr = -0.0001: must be a finite number above 0"]),
    (&["optim.lr=nan"], &["optim.lr = NaN: must be a finite number above 0"]),
    (&["optim.lr=inf"], &["optim.lr = inf: must be a finite number above 0"]),
    (&["optim.eps=0"], &["optim.eps = 0: must be"]),
    (&["optim.clip=0"], &["optim.clip = 0: must be a finite number above 0"]),
    (&["optim.weight_decay=-1"], &["optim.weight_decay = -1: must be a finite number, 0 or above"]),
    (&["optim.betas=[0.9, 1.0]"], &["optim.betas[1] = 1: must lie in [0, 1)"]),
    (&["ema.decay=1.0"], &["ema.decay = 1: must lie in [0, 1)"]),
    (&["method.kl_coef=-0.1"], &["method.kl_coef = -0.1: must be a finite number, 0 or above"]),
    (&["advantage.clip=0"], &["advantage.clip = 0: must be a finite number above 0"]),
    (&["advantage.temperature=0"], &["advantage.temperature = 0: must be a finite number above 0"]),
    (&["advantage.map_clip=nan"], &["advantage.map_clip = NaN: must be"]),
    // Methods.
    (&["method.gamma=1.1"], &["method.gamma = 1.1: belongs to FlowAWR's robust form", "set method.form = \"robust\""]),
    (
        &["method.name=awm", "method.gamma=1.1"],
        &["method.gamma = 1.1: belongs to advantage-flow, flow-awr; remove it or set method.name = \"advantage-flow\""],
    ),
    (&["method.name=awm", "method.form=paper"], &["method.form = \"paper\": belongs to flow-awr"]),
    (&["method.form=true"], &["method.form = true: must be a name in quotes"]),
    (&["method.ratio_clip=0.1"], &["method.ratio_clip = 0.1: belongs to flow-grpo, awm"]),
    (&["method.anchor=0.1"], &["method.anchor = 0.1: belongs to awm"]),
    (&["method.name=awm", "method.adaptive_scale=true"], &["method.adaptive_scale = true: belongs to flow-awr, "]),
    (&["method.name=awm", "method.ratio_clip=0"], &["method.ratio_clip = 0: must be a finite number above 0"]),
    (&["method.name=awm", "method.anchor=-1"], &["method.anchor = -1: must be a finite number, 0 or above"]),
    (
        &["method.form=exact"],
        &["method.form = \"exact\": needs advantages of -1 or more, and this map goes down to -inf", "\"softmax\""],
    ),
    (
        &["method.form=robust", "advantage.map=softmax", "method.gamma=1"],
        &["method.gamma = 1: must be a number above 1", "use 1.1 or"],
    ),
    // What the objective needs of the rollouts.
    (
        &["method.name=flow-grpo"],
        &[
            "method.name = \"flow-grpo\": trains on the steps of stochastic rollouts, and sampler.solver = \"dpm2\"; set",
        ],
    ),
    (
        &["method.name=flow-grpo", "sampler.solver=sde", "sampler.sde.window=3", "batch.timesteps=4"],
        &["batch.timesteps = 4: only 3 steps of a rollout are stochastic"],
    ),
    (
        &["method.name=awm", "batch.updates_per_iteration=2"],
        &["batch.updates_per_iteration = 2: awm's ratio", "set it to 1"],
    ),
    (&["sampler.sde.window=0"], &["sampler.sde.window = 0: "]),
    (&["sampler.sde.window=11"], &["sampler.sde.window = 11: ", "10"]),
    (&["sampler.sde.first=8", "sampler.sde.window=3"], &["sampler.sde.window = 3: ", "2"]),
    (&["sampler.sde.first=10"], &["sampler.sde.first = 10: ", "9"]),
    (&["sampler.sde.noise_level=0"], &["sampler.sde.noise_level = 0: must be a finite number above 0"]),
    (&["sampler.sde.kind=cps"], &["sampler.sde.kind = \"cps\": must be \"flow\" or \"dance\""]),
    (&["sampler.guidance=-1"], &["sampler.guidance = -1: must be a finite number, 0 or above"]),
    (&["eval.guidance=nan"], &["eval.guidance = NaN: must be a finite number"]),
    (&["old_policy.rate=-1"], &["old_policy.rate = -1: must be a finite number, 0 or above"]),
    (&["old_policy.most=1"], &["old_policy.most = 1: must lie in [0, 1)"]),
    (&["method.mix=0.1"], &["method.mix = 0.1: belongs to diffusion-nft", "remove it or set method.name"]),
    (&["method.name=diffusion-nft", "method.mix=0"], &["method.mix = 0: must be a finite number above 0"]),
    (&["method.gamma=A"], &["method.gamma = \"A\": ", "\"1-A\" or a number such as 1.1"]),
    (&["method.gamma=true"], &["method.gamma = true: must be \"1-A\" or a number such as 1.1"]),
    (
        &["method.name=advantage-flow", "method.gamma=0.5", "advantage.map=linear", "advantage.clip=1"],
        &[
            "method.gamma = 0.5: must be a number above 1, or the loss has no minimum for a sample of advantage -1; use 1.1",
        ],
    ),
    (&["method.name=advantage-flow", "method.gamma=nan"], &["method.gamma = NaN: must be a number above"]),
    // Rewards.
    (&["reward.0.weight=nan"], &["reward[0].weight = NaN: must be a finite number"]),
    (&["reward.0.weight=-inf"], &["reward[0].weight = -inf: must be a finite number"]),
    (&["reward.0.weight=0"], &["reward: every weight = 0", "give one a weight"]),
    // The model and the prompts.
    (
        &["model.path=none.safetensors"],
        &["model.path = \"none.safetensors\": there is no such file", "give an existing one"],
    ),
    (&["data.train=none.txt"], &["data.train = \"none.txt\": there is no such file", "give an existing one"]),
    (&["data.eval=\"\""], &["data.eval = \"\": there is no such file"]),
    (&["run.out=Cargo.toml"], &["run.out = \"Cargo.toml\": is a file; name a folder"]),
    (&["run.out=\"\""], &["run.out = \"\": name a folder"]),
];

const LORA: &str = "[[reward]]\nname = \"ocr\"\n[model]\ntrainable = \"lora\"\n[model.lora]\n";

/// Files, and what the line must contain after its beginning, the file's name.
const FILES: &[(&str, &[&str])] = &[
    ("[run]\nupdates 5\n", &["line 2: updates 5: is not TOML", "write key = value"]),
    ("[run]\n\nname = \"a\nseed = 1", &["line 3: name = \"a: is not TOML"]),
    ("[run]\nseed = 1\nseed = 2\n", &["line 3: seed = 2: is not TOML (duplicate key)"]),
    ("[run]\nseed = 99999999999999999999\n", &["line 2: seed = 99999999999999999999: is not TOML"]),
    ("lr = 1e-4\n", &["lr: no such key", "optim"]),
    ("batch = 5\n", &["batch = 5: must be a section"]),
    ("ema = [0.5]\n", &["ema = [0.5]: is no list; write one value, or one section [ema]"]),
    ("[[batch]]\nprompts = 3\n", &["batch = [{ prompts = 3 }]: is no list", "one section [batch]"]),
    ("", &["reward: none is given; add [[reward]]"]),
    ("[reward]\nname = \"ocr\"\n", &["reward = { name = \"ocr\" }: is a list; write a section [[reward]]"]),
    ("reward = [\"ocr\"]\n", &["reward[0] = \"ocr\": must be a section"]),
    ("[[reward]]\nweight = 1\n", &["reward[0].name is missing: add it"]),
    (
        "[[reward]]\nname = \"ocr\"\n[[reward]]\nname = \"ocr\"\nweight = 2",
        &["reward[1].name = \"ocr\": is named twice; name it once"],
    ),
    ("[method]\nkl_coef = 1.0\n[[reward]]\nname = \"ocr\"\n", &["method.name is missing: add it"]),
    ("@rank = 8\nalpha = 8\ntargets = []", &["model.lora.targets = []: ", "choose from attn.to_q"]),
    ("@rank = 8\nalpha = 8\ntargets = [\"q\"]", &["model.lora.targets = [\"q\"]: ", "choose from attn.to_q"]),
    ("@rank = 8\nalpha = 8\ntargets = \"attn.to_q\"", &["model.lora.targets = \"attn.to_q\": must be a list"]),
    ("@rank = 8\nalpha = 8\ntargets = [1]", &["model.lora.targets[0] = 1: must be text in quotes"]),
    ("@rank = 0\nalpha = 8\ntargets = [\"attn.to_q\"]", &["model.lora.rank = 0: must be at least 1"]),
    ("@rank = 8\nalpha = 0\ntargets = [\"attn.to_q\"]", &["model.lora.alpha = 0: must be a finite number above 0"]),
];

fn settings(set: &[&str]) -> Vec<String> {
    set.iter().map(|s| s.to_string()).collect()
}

/// The one line of a refused configuration, which begins with `origin` and contains `parts`.
fn refused(file: Option<&Path>, set: &[&str], origin: &str, parts: &[&str]) {
    let line = match RunConfig::load(file, &settings(set)) {
        Err(Error::Usage(line)) => line,
        other => panic!("{set:?} {parts:?}: {other:?}"),
    };
    assert!(!line.contains('\n') && line.starts_with(origin), "{line}");
    parts.iter().for_each(|part| assert!(line.contains(part), "no {part:?} in\n{line}"));
    assert!(!["serde", "untagged", "struct", "usize", "u64", "f64"].iter().any(|word| line.contains(word)), "{line}");
}

#[test]
fn mistakes_in_settings_are_one_line_with_the_remedy() {
    for (set, parts) in SETTINGS {
        refused(None, set, "--set", parts);
    }
}

#[test]
fn mistakes_in_a_file_are_one_line_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for (text, parts) in FILES {
        let file = folder.path().join("mine.toml");
        std::fs::write(&file, text.replace('@', LORA)).unwrap();
        refused(Some(&file), &[], &format!("{}: ", file.display()), parts);
    }
    let none = folder.path().join("none.toml");
    refused(Some(&none), &[], &none.display().to_string(), &["cannot be read", "give a TOML file to --config"]);
    refused(Some(folder.path()), &[], &folder.path().display().to_string(), &["cannot be read", "directory"]);
}

#[test]
fn prompt_files_are_read_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &str, &[&str]); 4] = [
        ("", "--set: data.train = ", &["no prompt in this file; write one prompt a line"]),
        ("\"417\" in red on yellow\na cat\n", "--set: data.train = ", &["\"a cat\"", "not of the form"]),
        ("\"417\" in red on red\n", "--set: data.train = ", &["red on red", "use "]),
        (
            "\"417\" in red on yellow\n",
            "the embedded configuration: batch.prompts = 8: data.train = ",
            &["holds 1 prompts; use at most 1"],
        ),
    ];
    for (text, origin, parts) in cases {
        let file = folder.path().join("prompts.txt");
        std::fs::write(&file, text).unwrap();
        refused(None, &[&format!("data.train={}", file.display())], origin, parts);
    }
}

#[test]
fn a_mistake_is_told_of_where_it_was_made() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[optim]\nlr = 0\n[[reward]]\nname = \"ocr\"\n").unwrap();
    let origin = format!("{}: optim.lr = 0", file.path().display());
    refused(Some(file.path()), &["optim.lrs=1"], "--set: optim.lrs", &[]);
    refused(Some(file.path()), &["run.seed=7", "optim.eps=1e-6"], &origin, &[]);
    refused(None, &["sampler.steps=2"], "the embedded configuration: batch.timesteps = 4", &["sampler.steps = 2"]);
    RunConfig::load(Some(file.path()), &settings(&["optim.lr=1e-4"])).unwrap();
}

#[test]
fn files_that_only_training_needs_are_asked_for_later() {
    let config = RunConfig::load(None, &settings(&["reward.0.detector=none.onnx"])).unwrap();
    let line = config.check_files().unwrap_err().to_string();
    assert!(line.contains("reward[0].detector = ") && line.contains("launch/fetch-ocr.sh"), "{line}");
}

#[test]
fn a_file_may_extend_another() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    write("base.toml", "[optim]\nlr = 1e-5\neps = 1e-6\n[[reward]]\nname = \"ocr\"\n[[reward]]\nname = \"colour\"\n");
    write("more/middle.toml", "extends = \"../base.toml\"\n[run]\nseed = 3\n");
    let mine = write("mine.toml", "extends = \"more/middle.toml\"\n[optim]\nlr = 1e-3\n[[reward]]\nname = \"ocr\"\n");
    let config = RunConfig::load(Some(&mine), &settings(&["run.updates=7"])).unwrap();
    assert_eq!((config.optim.lr, config.optim.eps, config.run.seed, config.run.updates), (1e-3, 1e-6, 3, 7));
    assert_eq!(config.reward.len(), 1, "a list is replaced");

    let lost = write("lost.toml", "extends = \"none.toml\"\n");
    refused(
        Some(&lost),
        &[],
        &lost.display().to_string(),
        &["extends = ", "none.toml", "relative to this one's folder"],
    );
    let circle = write("circle.toml", "extends = \"circle.toml\"\n");
    refused(Some(&circle), &[], &circle.display().to_string(), &["is there a circle?"]);
    let odd = write("odd.toml", "extends = 3\n");
    refused(Some(&odd), &[], &odd.display().to_string(), &["extends = 3: must be a path in quotes"]);
}

#[test]
fn a_resolved_configuration_reads_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let set = settings(&[
        "method.name=advantage-flow",
        "method.gamma=1.1",
        "advantage.map=linear",
        "advantage.clip=1",
        "run.name=a \"b\"",
    ]);
    let config = RunConfig::load(None, &set).unwrap();
    let file = folder.path().join("config.toml");
    std::fs::write(&file, config.to_toml().unwrap()).unwrap();
    let again = RunConfig::load(Some(&file), &[]).unwrap();
    assert_eq!(config, again);
    assert_eq!(config.digest().unwrap(), again.digest().unwrap());
}

#[test]
fn the_digest_is_of_what_decides_an_update() {
    let digest = |set: &[&str]| RunConfig::load(None, &settings(set)).unwrap().digest().unwrap();
    for same in ["run.updates=7", "run.out=elsewhere", "eval.prompts=3", "parallel.deadline_s=9", "log.level=debug"] {
        assert_eq!(digest(&[]), digest(&[same]), "{same}");
    }
    for other in ["run.seed=7", "optim.lr=1e-3", "batch.prompts=9", "reward.0.weight=2", "sampler.shift=1"] {
        assert_ne!(digest(&[]), digest(&[other]), "{other}");
    }
}

const REFERENCE: &str = include_str!("../../configs/reference.toml");

/// The reference with its optional keys (`#key = value`) switched on.
fn complete_reference() -> String {
    let switch_on = |line: &str| match line.strip_prefix('#') {
        Some(key) if !key.starts_with(' ') => key.to_owned(),
        _ => line.to_owned(),
    };
    REFERENCE.lines().map(switch_on).collect::<Vec<_>>().join("\n")
}

/// Every `section.key` of a table, list entries without their number.
fn keys(table: &Table) -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        match value {
            Value::Table(t) => t.iter().for_each(|(key, value)| walk(value, &format!("{path}.{key}"), into)),
            Value::Array(list) if list.iter().any(Value::is_table) => list.iter().for_each(|v| walk(v, path, into)),
            _ => drop(into.insert(path.trim_start_matches('.').to_owned())),
        }
    }
    let mut all = BTreeSet::new();
    walk(&Value::Table(table.clone()), "", &mut all);
    all
}

/// A run with nothing but what must be given.
fn defaults() -> RunConfig {
    toml::from_str("[[reward]]\nname = \"ocr\"\n").unwrap()
}

#[test]
fn the_reference_holds_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("reference.toml");
    std::fs::write(&file, REFERENCE).unwrap();
    assert_eq!(RunConfig::load(Some(&file), &[]).unwrap(), defaults());

    // A key that is left out comes to what the reference says of it.
    let complete: RunConfig = toml::from_str(&complete_reference()).unwrap();
    assert_eq!(complete.timesteps(), defaults().timesteps());
    let map = defaults().advantage.resolve(&defaults().method);
    assert_eq!(complete.advantage.resolve(&complete.method), map);
    assert_eq!(Objective::new(&complete.method, &map), Objective::new(&defaults().method, &map));
    assert_eq!(complete.method.gamma, Some(Gamma::OneMinusAdvantage));
}

#[test]
fn the_reference_explains_every_key() {
    // Without `..` where a key is optional: a new one must be written here, and so be missed in the reference.
    let mut full = defaults();
    let BatchConfig { prompts, images_per_prompt, micro_batch, updates_per_iteration, timesteps: _ } = full.batch;
    full.batch = BatchConfig { prompts, images_per_prompt, micro_batch, updates_per_iteration, timesteps: Some(1) };
    full.method = MethodConfig {
        name: full.method.name,
        kl_coef: Some(0.0),
        form: Some(Form::Robust),
        gamma: Some(Gamma::Constant(2.0)),
        mix: Some(1.0),
        ratio_clip: Some(1e-4),
        anchor: Some(1.0),
        adaptive_scale: Some(true),
    };
    full.advantage = AdvantageConfig {
        aggregate: Some(Aggregate::Sum),
        normaliser: Some(Normaliser::GroupStd),
        clip: Some(1.0),
        map: Some(Map::Linear),
        temperature: Some(1.0),
        map_clip: Some(1.0),
    };
    let SamplerConfig { solver, steps, shift, guidance, truncate_time, sde } = full.sampler;
    let sde = SdeConfig { window: Some(1), ..sde };
    full.sampler = SamplerConfig { solver, steps, shift, guidance, truncate_time, sde };
    let OldPolicyConfig { schedule, rate: _, most: _ } = full.old_policy;
    full.old_policy = OldPolicyConfig { schedule, rate: Some(0.001), most: Some(0.5) };
    let RewardConfig { name, weight, .. } = full.reward[0];
    full.reward[0] = RewardConfig {
        name,
        weight,
        path: Some("clip".into()),
        tokenizer: Some("clip".into()),
        predictor: Some("mlp".into()),
        detector: Some("det".into()),
        url: Some("http://a:1".into()),
        reward: Some("b".into()),
        format: Some(WireFormat::Flowrl),
        timeout_s: Some(1),
        retries: Some(1),
        batch: Some(1),
        connections: Some(1),
        token_env: Some("T".into()),
        on_failure: Some(OnFailure::Stop),
    };
    full.model.path = Some("base".into());
    full.model.transformer = Some("transformer".into());
    full.model.lora.targets = Some(vec!["attn.to_q".into()]);
    full.model.lora.path = Some("lora".into());
    let full: Table = full.to_toml().unwrap().parse().unwrap();
    assert_eq!(keys(&complete_reference().parse().unwrap()), keys(&full));

    for line in complete_reference().lines().filter(|line| line.contains(" = ") && !line.starts_with("# ")) {
        assert!(line.contains(" # "), "no explanation: {line}");
    }
}
