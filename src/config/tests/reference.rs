//! configs/reference.toml: every key with its default and what its type says of it, made of the types and their doc comments.

use super::*;
use crate::advantage::AdvantageMap;
use crate::objective::Method;
use crate::reward::RewardKind;

const FILE: &str = "configs/reference.toml";
/// Where comments begin, and where lines end.
const COLUMN: usize = 28;
const WIDTH: usize = 100;

const HEAD: &str = "\
# Every key of a run, with its default. Unknown keys are refused. A key that is commented out
# (`#key = value`) has no fixed default: the value shown is what leaving it out comes to here, or an
# example. Only [[reward]] must be given.
# Any key can be set on the command line too: --set optim.lr=1e-4 --set reward.0.weight=2
# A file may begin with `extends = \"base.toml\"`: it then holds only what differs from that file (lists
# are replaced whole). Files to read (models, prompts, adapters) are found from the folder of the file
# that names them, each file of an `extends` chain its own; after --set, and what is written (run.out,
# model.prompt_cache), from the working folder.
# Made of the types' docs: FLOWRL_WRITE_REFERENCE=1 cargo test --release --lib reference
";

/// What keys come to, or may be, that are nothing by default.
const EXAMPLES: &str = r#"
path = "PickScore_v1"
tokenizer = "clip"
predictor = "sac+logos+ava1-l14-linearMSE.pth"
detector = "models/ocr/ch_PP-OCRv4_det_infer.onnx"
url = "http://node7:8000"
reward = "geneval"
token_env = "REWARD_TOKEN"
gamma = 1.1
"#;

#[test]
fn the_reference_is_what_the_types_say() {
    let text = reference();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    if std::env::var_os("FLOWRL_WRITE_REFERENCE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap() == text,
        "{FILE} is not what the types say; write it anew: FLOWRL_WRITE_REFERENCE=1 cargo test --release --lib reference"
    );
    for section in keys_of::<RunConfig>() {
        assert!(text.contains(&format!("[{section}]")), "{section}: no section of the reference");
    }
}

#[test]
fn the_reference_holds_the_defaults() {
    let mut expected = defaults();
    expected.resolve_shift().unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    assert_eq!(RunConfig::load(Some(&file), &[]).unwrap(), expected);
}

/// The whole file.
fn reference() -> String {
    let run = defaults();
    let OldPolicyDecay { delay: _, rate, max } = run.old_policy_decay();
    let steps = run.sampler.steps;
    let mut text = Reference { sources: sources(), told: Vec::new(), text: HEAD.to_owned() };
    text.section::<RunSection>("[run]", &run.run, "");
    let model = "path = \"base.safetensors\"\ntransformer = \"sd3.5_medium.safetensors\"\nvae_dtype = \"f32\"";
    text.section::<ModelConfig>("[model]", &run.model, model);
    text.section::<LoraSection>("[model.lora]", &run.model.lora, "targets = [\"attn.to_q\"]\npath = \"lora\"");
    text.section::<DataConfig>("[data]", &run.data, "");
    text.section::<BatchConfig>("[batch]", &run.batch, &format!("timesteps = {}", run.timesteps()));
    text.section::<SamplerConfig>("[sampler]", &run.sampler, &format!("shift = {:?}", run.sampler.shift()));
    let window = format!("window = {}", run.sampler.sde.count(steps));
    text.section::<SdeConfig>("[sampler.sde]", &run.sampler.sde, &window);
    text.section::<EvalConfig>("[eval]", &run.eval, "");
    text.methods();
    let map = AdvantageConfig::of(&AdvantageMap { ..run.method.map() });
    text.section::<AdvantageConfig>("[advantage]", &run.advantage, &toml::to_string(&map).unwrap());
    text.rewards();
    let stage = "at_update = 200\ntrain = \"prompts.txt\"\nweights = { ocr = 0.5 }";
    text.section::<StageConfig>("#[[stage]]", &Table::new(), stage);
    text.section::<OldPolicyConfig>("[old_policy]", &run.old_policy, &format!("rate = {rate:?}\nmax = {max:?}"));
    text.section::<EmaConfig>("[ema]", &run.ema, "");
    text.section::<OptimConfig>("[optim]", &run.optim, "");
    text.section::<ParallelConfig>("[parallel]", &run.parallel, "");
    text.section::<LogConfig>("[log]", &run.log, "");
    text.text
}

/// The program's source files.
fn sources() -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.extend(std::fs::read_to_string(path)), // other files are no text
            }
        }
    }
    found
}

struct Reference {
    sources: Vec<String>,
    /// The structs of variants whose keys are explained, and the first variant's name.
    told: Vec<(&'static str, &'static str)>,
    text: String,
}

impl Reference {
    /// A section with the keys of T: their defaults, and in comments what those come to that have none.
    fn section<T: DeserializeOwned>(&mut self, header: &str, defaults: &impl Serialize, open: &str) {
        let (name, keys) = variants::fields::<T>();
        let (note, docs) = self.docs(name);
        let note = note.strip_prefix('[').map_or(note.as_str(), |note| note.split_once(": ").map_or("", |(_, n)| n));
        self.header(header, note);
        let (defaults, open) = (Table::try_from(defaults).unwrap(), open.parse::<Table>().unwrap());
        assert_eq!(docs.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), keys, "{header}");
        for (key, doc) in docs {
            match (defaults.get(&key), open.get(&key)) {
                (Some(Value::Table(_)), _) => {} // a section of its own
                (Some(value), _) => self.entry(&format!("{key} = {value}"), &doc),
                (None, Some(value)) => self.entry(&format!("#{key} = {value}"), &doc),
                (None, None) => panic!("{header} {key}: has neither a default nor an example"),
            }
        }
    }

    fn methods(&mut self) {
        self.header("[method]", "");
        self.entry(&format!("name = {:?}", MethodConfig::default().name()), "The method, of those below.");
        for &kind in Method::ALL {
            let mut method = MethodConfig::of(kind);
            method.resolve();
            self.variant(&method, &format!("{kind:?}"));
        }
    }

    fn rewards(&mut self) {
        self.header("[[reward]]", "One section for each reward; their weighted scores are summed.");
        let ocr = RewardConfig::new(RewardKind::Ocr);
        self.entry(&format!("name = {:?}", ocr.label()), "The reward, of those below.");
        let weight = "What the score is multiplied by; may be negative; 0: it is only watched.";
        self.entry(&format!("weight = {:?}", ocr.weight), weight);
        for &kind in RewardKind::ALL {
            self.variant(&RewardSettings::of(kind), &format!("{kind:?}"));
        }
    }

    /// A variant's line, and its keys in comments.
    fn variant<V: Variants>(&mut self, variant: &V, kind: &str) {
        let (struct_name, keys) = V::fields(variant.name());
        let line = format!("{:?} => {kind}(", variant.name());
        let doc = self.doc_above(&line);
        let doc = doc.trim_end_matches('.');
        if let Some(first) = self.told.iter().find(|(told, _)| *told == struct_name) {
            self.text.push_str(&format!("# {:?}: {doc}; its keys are those of {:?}.\n", variant.name(), first.1));
            return;
        }
        self.text.push_str(&format!("# {:?}: {doc}.\n", variant.name()));
        if keys.is_empty() {
            return;
        }
        self.told.push((struct_name, V::NAMES.iter().find(|name| **name == variant.name()).unwrap()));
        let (_, docs) = self.docs(struct_name);
        assert_eq!(docs.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), keys, "{kind}");
        let (values, examples) = (variant.table().unwrap(), EXAMPLES.parse::<Table>().unwrap());
        for (key, doc) in docs {
            let value = values.get(&key).filter(|value| value.as_str() != Some("")).or(examples.get(&key));
            let value = value.unwrap_or_else(|| panic!("{kind} {key}: has neither a default nor an example"));
            self.entry(&format!("#{key} = {value}"), &doc);
        }
    }

    fn header(&mut self, header: &str, note: &str) {
        self.text.push('\n');
        let mut note: Vec<char> = note.chars().collect();
        if let Some(first) = note.first_mut() {
            first.make_ascii_uppercase();
        }
        self.entry(header, &note.into_iter().collect::<String>());
    }

    /// `first` with its explanation, which goes on below itself.
    fn entry(&mut self, first: &str, doc: &str) {
        let mut line = match doc.is_empty() {
            true => first.to_owned(),
            false => format!("{first:<width$}#", width = COLUMN.max(first.len() + 2)),
        };
        for word in doc.split_whitespace() {
            if line.len() + 1 + word.len() > WIDTH {
                self.text.push_str(&line);
                line = format!("\n{:COLUMN$}#", "");
            }
            line.push(' ');
            line.push_str(word);
        }
        self.text.push_str(&line);
        self.text.push('\n');
    }

    /// What the doc comments say of a struct and of its keys, in their order.
    fn docs(&self, name: &str) -> (String, Vec<(String, String)>) {
        let head = format!("pub struct {name} {{");
        let has = |source: &&String| source.lines().any(|line| line == head);
        let source = self.sources.iter().find(has).unwrap_or_else(|| panic!("no source has {head}"));
        let (mut lines, mut doc, mut keys) = (source.lines(), String::new(), Vec::new());
        for line in lines.by_ref().take_while(|line| *line != head) {
            gather(line, &mut doc);
        }
        let of_struct = std::mem::take(&mut doc);
        for line in lines.take_while(|line| *line != "}") {
            match line.trim().strip_prefix("pub ").and_then(|field| field.split_once(':')) {
                Some((key, _)) => keys.push((key.to_owned(), std::mem::take(&mut doc))),
                None => gather(line, &mut doc),
            }
        }
        (of_struct, keys)
    }

    /// The doc comment above the line that begins so.
    fn doc_above(&self, start: &str) -> String {
        for source in &self.sources {
            let mut doc = String::new();
            for line in source.lines() {
                if line.trim().starts_with(start) {
                    return doc;
                }
                gather(line, &mut doc);
            }
        }
        panic!("no source has {start}")
    }
}

/// Adds a line to a doc comment, without the marks of code; one that is neither of it nor an attribute begins another.
fn gather(line: &str, doc: &mut String) {
    match line.trim().strip_prefix("///") {
        Some(text) if doc.is_empty() => *doc = text.trim().replace('`', ""),
        Some(text) => *doc = format!("{doc} {}", text.trim().replace('`', "")),
        None if line.trim().starts_with("#[") => {}
        None => doc.clear(),
    }
}
