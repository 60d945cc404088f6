//! Mistakes, and the words that they are refused with.

/// Settings over the embedded configuration, and what the line must contain after its beginning, `--set`.
pub(super) const SETTINGS: &[(&[&str], &[&str])] = &[
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
    (
        &["run.seed=1\nrun.updates=3"],
        &["--set run.seed=1\\nrun.updates=3: is more than one line; give each key a --set"],
    ),
    (&["run.name=\u{1b}[2J"], &["--set run.name=\\u{1b}[2J: is more than"]),
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
    (&["eval.seed=-1"], &["eval.seed = -1: must be a whole number, 0 or above"]),
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
    (
        &["model.kind=sd4"],
        &[
            "model.kind = \"sd4\": must be one of \"glyphs\", \"shapes\", \"sd35-medium\", \"sd35-large\", \"sd3-medium\"",
        ],
    ),
    (
        &["model.lora.path=lora"],
        &["model.lora.path = \"lora\": belongs to sd35-medium, sd35-large, sd3-medium; remove it"],
    ),
    (&["model.vae_dtype=f32"], &["model.vae_dtype = \"f32\": belongs to sd35-medium", "remove it"]),
    (&["model.vae_dtype=f16"], &["model.vae_dtype = \"f16\": must be \"f32\" or \"bf16\""]),
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
    (&["reward.0.predictor=p"], &["reward[0].predictor = \"p\": belongs to aesthetic; remove it"]),
    (&["reward.0.weight=x"], &["reward[0].weight = \"x\": must be a number"]),
    (
        &["reward.0.url=\"http://me:s3cret@node7:8000?s3cret\""],
        &["reward[0].url = \"...@node7:8000?...\": belongs to remote; remove it"],
    ),
    (&["reward.0.name=aesthetic", "reward.0.path=clip"], &["reward[0].name = \"aesthetic\": needs predictor, sac+"]),
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
    // Stages.
    (&["stage={at_update=3}"], &["stage = { at_update = 3 }: is a list; write a section [[stage]] for each"]),
    (&["stage=[3]"], &["stage[0] = 3: must be a section"]),
    (&["stage=[{train=\"glyphs-4\"}]"], &["stage[0].at_update is missing: add it"]),
    (&["stage=[{at_update=3, weight={ocr=1}}]"], &["stage[0].weight: no such key", "did you mean stage[0].weights?"]),
    (&["stage=[{at_update=3, weights=2}]"], &["stage[0].weights = 2: must be names with their values in { }"]),
    (&["stage=[{at_update=3, weights={ocr=\"a\"}}]"], &["stage[0].weights.ocr = \"a\": must be a number"]),
    (&["stage=[{at_update=-3}]"], &["stage[0].at_update = -3: must be a whole number, 0 or above"]),
    (&["stage=[{at_update=0, train=\"glyphs-4\"}]"], &["stage[0].at_update = 0: must be at least 1"]),
    (&["stage=[{at_update=3}]"], &["stage[0]: changes nothing; give it weights = { ocr = 1.0 } or train"]),
    (
        &["stage=[{at_update=3, train=\"glyphs-4\"}, {at_update=3, train=\"glyphs\"}]"],
        &["stage[1].at_update = 3: the stage before it begins at 3 and would have no iteration", "use 4 or more"],
    ),
    (
        &[
            "batch.updates_per_iteration=4",
            "stage=[{at_update=3, train=\"glyphs-4\"}, {at_update=4, train=\"glyphs\"}]",
        ],
        &["stage[1].at_update = 4: the stage before it begins at 3", "updates_per_iteration = 4); use 5 or more"],
    ),
    (
        &["stage=[{at_update=3, weights={colour=1.0}}]"],
        &["stage[0].weights.colour = 1: the run has no such reward; it has ocr"],
    ),
    (&["stage=[{at_update=3, weights={ocr=nan}}]"], &["stage[0].weights.ocr = NaN: must be a finite number"]),
    (&["stage=[{at_update=3, weights={ocr=0.0}}]"], &["stage[0].weights: every weight = 0", "give one a weight"]),
    (&["stage=[{at_update=3, train=\"none.txt\"}]"], &["stage[0].train = \"none.txt\": there is no such file"]),
    (
        &["batch.prompts=20000", "data.train=glyphs-4", "stage=[{at_update=3, train=\"glyphs\"}]"],
        &["batch.prompts = 20000: stage[0].train = \"glyphs\" holds 14400 prompts; use at most 14400"],
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
    (&["sampler.steps=0"], &["sampler.steps = 0: must be at least 1"]),
    (&["run.seed=18446744073709551615"], &["run.seed = 18446744073709551615: must be at most 9223372036854775807"]),
    (&["batch.prompts=99999999999999999999"], &["batch.prompts = 99999999999999999999: must be at most 92233720"]),
    (&["run.seed=007"], &["run.seed = 007: must be a whole number without zeros before it"]),
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
    (
        &["method.gamma=1.1"],
        &["method.gamma = 1.1: belongs to FlowAWR's robust variant", "set method.variant = \"robust\""],
    ),
    (
        &["method.name=awm", "method.gamma=1.1"],
        &["method.gamma = 1.1: belongs to flow-awr, advantage-flow; remove it or set method.name = \"flow-awr\""],
    ),
    (
        &["method.kl_space=velocity"],
        &[
            "method.kl_space = \"velocity\": belongs to advantage-flow; remove it or set method.name = \"advantage-flow\"",
        ],
    ),
    (
        &["method.name=advantage-flow", "method.kl_space=x0"],
        &["method.kl_space = \"x0\": must be \"velocity\" or \"estimate\""],
    ),
    (
        &["method.name=advantage-flow", "method.kl_coef=0", "method.kl_space=estimate"],
        &["method.kl_space = \"estimate\": method.kl_coef = 0, so no distance is measured"],
    ),
    (&["method.name=awm", "method.variant=paper"], &["method.variant = \"paper\": belongs to flow-awr"]),
    (&["method.variant=true"], &["method.variant = true: must be a name in quotes"]),
    (&["method.ratio_clip=0.1"], &["method.ratio_clip = 0.1: belongs to flow-grpo, awm"]),
    (&["method.anchor=0.1"], &["method.anchor = 0.1: belongs to awm"]),
    (&["method.name=awm", "method.adaptive_scale=true"], &["method.adaptive_scale = true: belongs to flow-awr, "]),
    (&["method.name=awm", "method.ratio_clip=0"], &["method.ratio_clip = 0: must be a finite number above 0"]),
    (&["method.name=awm", "method.anchor=-1"], &["method.anchor = -1: must be a finite number, 0 or above"]),
    (
        &["method.variant=exact"],
        &["method.variant = \"exact\": needs advantages of -1 or more, and this map goes down to -inf", "\"softmax\""],
    ),
    (
        &["method.variant=robust", "advantage.map=softmax", "method.gamma=1"],
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
    (
        &["eval.solver=sde", "eval.steps=2", "sampler.sde.window=3"],
        &["eval.steps = 2: eval.solver = \"sde\" takes", "go up to step 3; use at least 3, or eval.solver"],
    ),
    (&["eval.solver=sde", "eval.steps=2", "sampler.sde.first=2"], &["eval.steps = 2: ", "use at least 3"]),
    (&["sampler.sde.noise_level=0"], &["sampler.sde.noise_level = 0: must be a finite number above 0"]),
    (&["sampler.sde.kind=cps"], &["sampler.sde.kind = \"cps\": must be \"flow\" or \"dance\""]),
    (&["sampler.guidance=-1"], &["sampler.guidance = -1: must be a finite number, 0 or above"]),
    (&["eval.guidance=nan"], &["eval.guidance = NaN: must be a finite number"]),
    (&["old_policy.rate=-1"], &["old_policy.rate = -1: must be a finite number, 0 or above"]),
    (&["old_policy.max=1"], &["old_policy.max = 1: must lie in [0, 1)"]),
    (&["method.nft_beta=0.1"], &["method.nft_beta = 0.1: belongs to diffusion-nft", "remove it or set method.name"]),
    (&["method.name=diffusion-nft", "method.nft_beta=0"], &["method.nft_beta = 0: must be a finite number above 0"]),
    (
        &["method.name=diffusion-nft", "advantage.map=linear", "advantage.clip=inf"],
        &["advantage.clip = inf: diffusion-nft divides by it; use a finite number"],
    ),
    (
        &["method.name=awm", "advantage.map=softmax", "advantage.map_clip=inf"],
        &["advantage.map_clip = inf: awm divides by it"],
    ),
    (&["advantage.clip=-inf"], &["advantage.clip = -inf: must be a finite number above 0, or inf"]),
    // Keys by their former names, which are told of by those of today.
    (&["method.mix=0.1"], &["method.nft_beta = 0.1: belongs to diffusion-nft", "remove it or set method.name"]),
    (&["method.form=true"], &["method.variant = true: must be a name in quotes"]),
    (&["old_policy.most=1"], &["old_policy.max = 1: must lie in [0, 1)"]),
    (
        &["method={name=\"diffusion-nft\", mix=0.1, nft_beta=0.2}"],
        &["method.mix = 0.1: is the former name of method.nft_beta, which is given too; remove it"],
    ),
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
    (&["data.train=none.txt"], &["data.train = \"none.txt\": there is no such file", "give an existing one"]),
    (&["data.eval=\"\""], &["data.eval = \"\": there is no such file"]),
    (&["run.out=Cargo.toml"], &["run.out = \"Cargo.toml\": Cargo.toml is a file; name a folder"]),
    (&["run.out=\"\""], &["run.out = \"\": name a folder"]),
];

pub(super) const LORA: &str = "[[reward]]\nname = \"ocr\"\n[model]\ntrainable = \"lora\"\n[model.lora]\n";

/// Files, and what the line must contain after its beginning, the file's name.
pub(super) const FILES: &[(&str, &[&str])] = &[
    ("[run]\nupdates 5\n", &["line 2: updates 5: is not TOML", "write key = value"]),
    ("[run]\n\nname = \"a\nseed = 1", &["line 3: name = \"a: is not TOML"]),
    ("[run]\nseed = 1\nseed = 2\n", &["line 3: seed = 2: is not TOML (duplicate key)"]),
    // One that fits into 64 bits without a sign, one that does not, one that fits into no number, and below zero.
    (
        "[run]\nseed = 9223372036854775808\n",
        &["line 2: seed = 9223372036854775808: must be at most 9223372036854775807"],
    ),
    (
        "[run]\nseed = 99999999999999999999\n",
        &["line 2: seed = 99999999999999999999: must be at most 9223372036854775807"],
    ),
    ("[run]\nseed = 0xffffffffffffffff\n", &["line 2: seed = 0xffffffffffffffff: must be at most 9223372036854775807"]),
    (
        "[run]\nseed = 9999999999999999999999999999999999999999999\n",
        &["line 2: seed = 99", "99: must be at most 9223372036854775807"],
    ),
    (
        "[run]\nupdates-more = 1\nseed = -9223372036854775809\n",
        &["line 3: seed = -9223372036854775809: must be at least -9223372036854775808"],
    ),
    ("[optim]\nlr = 1e999\n", &["line 2: lr = 1e999: must be at most 1.7976931348623157e308"]),
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
    ("[method]\nkl_coef = \"a\"\nname = \"awm\"", &["method.kl_coef = \"a\": must be a number"]),
    ("[method]\nmix = 1\nname = \"awm\"", &["method.nft_beta = 1: belongs to diffusion-nft"]),
    (
        "[method]\nname = \"awm\"\nmethod = 1",
        &["method.method: no such key; known here: name, ratio_clip, anchor, kl_coef"],
    ),
    ("[old_policy]\nmost = 0.5\nmax = 0.5", &["old_policy.most = 0.5: is the former name of old_policy.max"]),
    ("@rank = 8\nalpha = 8\ntargets = []", &["model.lora.targets = []: ", "choose from attn.to_q"]),
    ("@rank = 8\nalpha = 8\ntargets = [\"q\"]", &["model.lora.targets = [\"q\"]: ", "choose from attn.to_q"]),
    ("@rank = 8\nalpha = 8\ntargets = \"attn.to_q\"", &["model.lora.targets = \"attn.to_q\": must be a list"]),
    ("@rank = 8\nalpha = 8\ntargets = [1]", &["model.lora.targets[0] = 1: must be text in quotes"]),
    ("@rank = 0\nalpha = 8\ntargets = [\"attn.to_q\"]", &["model.lora.rank = 0: must be at least 1"]),
    ("@rank = 8\nalpha = 0\ntargets = [\"attn.to_q\"]", &["model.lora.alpha = 0: must be a finite number above 0"]),
];
