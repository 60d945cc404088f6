//! PEFT's configuration of a LoRA: what each of its keys means for the function of a saved adapter.
//!
//! The keys are those of PEFT 0.21.2 (tuners/lora/config.py, `LoraConfig`); what they do, of tuners/lora/layer.py and
//! tuners/lora/variants.py there. A key that is none of them is refused, unless its value says nothing.

use crate::checks::is_positive_f32;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Keys that say how the adapter was made or trained, or which modules have one, which the tensors' names say as well. The
/// configurations of initialisations stand here because `init_lora_weights` alone says whether one was used.
const WITHOUT_EFFECT: [&str; 19] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// Keys that, set, make the function another one than `W x + scale B A x`.
const OTHER_FUNCTION: [&str; 17] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
    "enable_lora",
    "merge_weights",
];

/// Values of `init_lora_weights` that leave the base weights as they are, whatever they put into the factors.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Values of it, or their beginnings, that change the base weights, which no adapter's file holds.
const CHANGED_BASES: [&str; 5] = ["pissa", "corda", "olora", "loftq", "lora_ga"];

/// A configuration whose every key is understood.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Peft {
    rank: usize,
    alpha: f64,
    /// Whether alpha is divided by the root of the rank.
    by_root: bool,
    ranks: Map<String, Value>,
    alphas: Map<String, Value>,
}

/// The keys that are read.
#[derive(Deserialize)]
struct Read {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    use_rslora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
}

const READ: [&str; 8] =
    ["peft_type", "r", "lora_alpha", "bias", "init_lora_weights", "use_rslora", "rank_pattern", "alpha_pattern"];

impl Peft {
    /// Understands a configuration.
    ///
    /// # Errors
    /// What is wrong with it, key and value: the adapter is another function than a plain LoRA, or may be.
    pub fn of(config: &Map<String, Value>) -> Result<Self, String> {
        const REMEDY: &str = "give a plain LoRA, or merge it into its model and give that as model.transformer";
        let mut said = config.iter().filter(|(_, value)| !says_nothing(value));
        let unread = said.find(|(key, _)| !READ.contains(&key.as_str()) && !WITHOUT_EFFECT.contains(&key.as_str()));
        if let Some((key, value)) = unread {
            let why = match OTHER_FUNCTION.contains(&key.as_str()) {
                true => "which is not supported",
                false => "a key that is not known here and may change what the adapter computes",
            };
            return Err(format!("has {key} = {}, {why}; {REMEDY}", short(value)));
        }
        let read: Read = serde_json::from_value(config.clone().into())
            .map_err(|e| format!("is not a valid configuration of PEFT: {e}"))?;
        if let Some(kind) = read.peft_type.filter(|kind| kind != "LORA") {
            return Err(format!("has peft_type = {kind:?}, which is not supported; {REMEDY}"));
        }
        if let Some(bias) = read.bias.filter(|bias| bias != "none") {
            return Err(format!("has bias = {bias:?}: biases were trained as well, which is not supported; {REMEDY}"));
        }
        check_start(&read.init_lora_weights)?;
        if read.r == 0 {
            return Err("has r = 0; a rank is at least 1".into());
        }
        let (ranks, alphas) = (read.rank_pattern.unwrap_or_default(), read.alpha_pattern.unwrap_or_default());
        for (key, patterns) in [("rank_pattern", &ranks), ("alpha_pattern", &alphas)] {
            if let Some(pattern) = patterns.keys().find(|pattern| !is_plain(pattern)) {
                return Err(format!(
                    "has {key} with {pattern:?}, a regular expression, which is not read; write the modules' names there"
                ));
            }
        }
        let values = alphas.iter().map(|(pattern, value)| (pattern.as_str(), value.as_f64()));
        for (key, value) in [("lora_alpha", Some(read.lora_alpha))].into_iter().chain(values) {
            if !value.is_some_and(is_positive_f32) {
                let value = value.map_or("no number".into(), |value| value.to_string());
                return Err(format!("has alpha {value} ({key}); it must be a number above 0"));
            }
        }
        let (rank, alpha, by_root) = (read.r, read.lora_alpha, read.use_rslora == Some(true));
        Ok(Self { rank, alpha, by_root, ranks, alphas })
    }

    /// The rank of a module's update.
    pub fn rank(&self, module: &str) -> Option<u64> {
        pattern(&self.ranks, module).map_or(Some(self.rank as u64), Value::as_u64)
    }

    /// What B A of a module is multiplied by.
    pub fn scale(&self, module: &str, rank: usize) -> f64 {
        let alpha = pattern(&self.alphas, module).and_then(Value::as_f64).unwrap_or(self.alpha);
        alpha / if self.by_root { (rank as f64).sqrt() } else { rank as f64 }
    }
}

/// Null, false, empty.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Refuses an initialisation that took something out of the base weights: the saved factors alone are another function.
fn check_start(start: &Option<Value>) -> Result<(), String> {
    let text = match start {
        None | Some(Value::Null | Value::Bool(_)) => return Ok(()),
        Some(Value::String(text)) => text.to_lowercase(),
        Some(other) => return Err(format!("has init_lora_weights = {}, which is not known here", short(other))),
    };
    if PLAIN_STARTS.contains(&text.as_str()) {
        return Ok(());
    }
    if CHANGED_BASES.iter().any(|start| text.starts_with(start)) {
        return Err(format!(
            "has init_lora_weights = {text:?}, which changes the base weights too, and they are not in the file; save it \
             again in PEFT with path_initial_model_for_weight_conversion, or merge it there and give the merged model as \
             model.transformer"
        ));
    }
    Err(format!("has init_lora_weights = {text:?}, which is not known here and may have changed the base weights"))
}

/// Whether a pattern of PEFT is a module's name, which it matches as a whole or from a dot on. A dot stands for any one
/// character, so that a name matches itself.
fn is_plain(pattern: &str) -> bool {
    let name = pattern.strip_prefix('^').unwrap_or(pattern);
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
}

/// The value of the first pattern that matches: PEFT's `re.match(rf"(.*\.)?({key})$", module)` (utils/other.py).
fn pattern<'a>(patterns: &'a Map<String, Value>, module: &str) -> Option<&'a Value> {
    patterns.iter().find(|(key, _)| matches(key, module)).map(|(_, value)| value)
}

/// Whether a plain pattern matches the whole module, or its end behind a dot.
fn matches(pattern: &str, module: &str) -> bool {
    let (name, is_anchored) = pattern.strip_prefix('^').map_or((pattern, false), |name| (name, true));
    let Some(begin) = module.len().checked_sub(name.len()) else { return false };
    let (head, end) = module.as_bytes().split_at(begin);
    let is_whole = head.is_empty() || (!is_anchored && head.ends_with(b"."));
    is_whole && end.iter().zip(name.bytes()).all(|(&c, of_pattern)| of_pattern == b'.' || of_pattern == c)
}

/// A value in a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
