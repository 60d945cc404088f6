//! What the rewards and the sampler can make of the prompts: told, or refused, before time is spent.

use crate::config::RunConfig;
use crate::data::{Prompt, PromptSet};
use crate::error::{Error, Result};
use crate::reward::{Fit, RewardConfig};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is to be known of a run's prompts, a line each; `train`: the prompts of each stage.
///
/// # Errors
/// [`Error::Usage`]: there are prompts to train on to which no reward with a weight applies.
pub fn run(config: &RunConfig, train: &[Arc<PromptSet>], eval: &PromptSet) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (stage, set) in config.stages().iter().zip(train) {
        let name = stage.source();
        let weighted: Vec<&RewardConfig> =
            config.reward.iter().filter(|reward| stage.weight(reward.label()) != 0.0).collect();
        refuse_unrewarded(&name, set, &weighted)?;
        notes.extend(of_set(&name, set, &weighted, ("sampler.guidance", config.sampler.guidance)));
    }
    notes.extend(evaluated(config, &format!("data.eval = {:?}", config.data.eval), eval));
    // Stages may share prompts.
    let mut told = BTreeSet::new();
    notes.retain(|note| told.insert(note.clone()));
    Ok(notes)
}

/// What is to be known of the prompts of an evaluation, a line each; `name`: where they are from.
pub fn evaluated(config: &RunConfig, name: &str, set: &PromptSet) -> Vec<String> {
    let stages = config.stages();
    let has_weight = |reward: &&RewardConfig| stages.iter().any(|stage| stage.weight(reward.label()) != 0.0);
    let weighted: Vec<&RewardConfig> = config.reward.iter().filter(has_weight).collect();
    of_set(name, set, &weighted, ("eval.guidance", config.eval.guidance))
}

/// Refuses prompts whose pictures would have no score: the run would end at the first of them.
fn refuse_unrewarded(name: &str, set: &PromptSet, weighted: &[&RewardConfig]) -> Result<()> {
    let applies = |prompt: &Prompt| weighted.iter().any(|reward| !matches!(reward.fit(prompt), Fit::No(_)));
    let unrewarded: Vec<&Prompt> = set.prompts.iter().filter(|prompt| !applies(prompt)).collect();
    let Some(first) = unrewarded.first() else { return Ok(()) };
    let why = weighted.iter().find_map(|reward| match reward.fit(first) {
        Fit::No(why) => Some(format!(" ({}: {why})", reward.label())),
        _ => None,
    });
    Err(Error::Usage(format!(
        "{name}: no reward with a weight applies to {} of {} prompts: {}{}; take them out, or give a reward that applies to \
         them a weight",
        unrewarded.len(),
        set.len(),
        first_three(&unrewarded),
        why.unwrap_or_default()
    )))
}

fn of_set(name: &str, set: &PromptSet, weighted: &[&RewardConfig], guidance: (&str, f64)) -> Vec<String> {
    let mut notes = Vec::new();
    for reward in weighted {
        notes.extend(of_reward(name, set, reward));
    }
    let negative: Vec<&Prompt> = set.prompts.iter().filter(|prompt| prompt.negative.is_some()).collect();
    if let (false, (key, 1.0)) = (negative.is_empty(), guidance) {
        notes.push(format!("{name}: the negative_prompt of {} prompts has no effect with {key} = 1", negative.len()));
    }
    let unused = unused_keys(set);
    if !unused.is_empty() {
        let keys = unused.into_iter().collect::<Vec<_>>().join(", ");
        notes.push(format!("{name}: remote rewards are told {keys} of the prompts; nothing else here reads that"));
    }
    notes
}

/// What one reward can make of a set.
fn of_reward(name: &str, set: &PromptSet, reward: &RewardConfig) -> Vec<String> {
    let (label, all) = (reward.label(), set.len());
    let (mut without, mut why_without) = (Vec::new(), "");
    let (mut in_part, mut why_in_part, mut characters) = (Vec::new(), "", BTreeSet::new());
    let mut unknown = false;
    for prompt in &set.prompts {
        match reward.fit(prompt) {
            Fit::Yes => {}
            Fit::No(why) => {
                without.push(prompt);
                why_without = why;
            }
            Fit::Partly(why, which) => {
                in_part.push(prompt);
                why_in_part = why;
                characters.extend(which);
            }
            Fit::Unknown => unknown = true,
        }
    }
    let mut notes = Vec::new();
    if !without.is_empty() {
        let (count, which) = (without.len(), first_three(&without));
        notes.push(format!("{name}: {label} does not apply to {count} of {all} prompts ({why_without}): {which}"));
    }
    if !in_part.is_empty() {
        let (count, which) = (in_part.len(), first_three(&in_part));
        let characters: String = characters.into_iter().take(20).collect();
        notes.push(format!(
            "{name}: {label} can never be 1 for {count} of {all} prompts: {why_in_part} ({characters}): {which}"
        ));
    }
    if unknown {
        notes.push(format!("{name}: only the server of {label} can say to which prompts it applies"));
    }
    notes
}

/// What files say of prompts that this program makes no use of itself.
fn unused_keys(set: &PromptSet) -> BTreeSet<&str> {
    const USED: [&str; 5] = ["prompt", "negative_prompt", "tag", "include", "exclude"];
    let metadata = set.prompts.iter().filter_map(|prompt| prompt.metadata.as_ref());
    metadata.flat_map(|object| object.keys()).map(String::as_str).filter(|key| !USED.contains(key)).collect()
}

/// `4 "a cat", 7 "a dog", 9 "a fish", ...`: numbers in the set from 0, and the beginnings of the texts.
fn first_three(prompts: &[&Prompt]) -> String {
    const MOST: usize = 60;
    let one = |prompt: &&Prompt| {
        let start: String = prompt.text.chars().take(MOST).collect();
        let more = if start.len() < prompt.text.len() { "..." } else { "" };
        format!("{} {start:?}{more}", prompt.index)
    };
    let shown = prompts.iter().take(3).map(one).collect::<Vec<_>>().join(", ");
    if prompts.len() > 3 { shown + ", ..." } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    /// What is told of a run that trains on these prompts, evaluates the others, and has these rewards.
    fn notes(train: &str, eval: &str, rewards: &str, more: &[&str]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            format!("data.{name}={}", path.display())
        };
        let set = [write("train", train), write("eval", eval), format!("reward={rewards}")];
        let more = ["model.kind=sd35-medium", "model.path=none", "batch.prompts=1"].iter().chain(more);
        let set: Vec<String> = set.into_iter().chain(more.map(|set| set.to_string())).collect();
        let clean = |text: String| text.replace(&format!("{}/", folder.path().display()), "");
        match Plan::of(&RunConfig::load(None, &set)?, 1) {
            Ok(plan) => Ok(plan.notes.into_iter().map(clean).collect()),
            Err(Error::Usage(message)) => Err(Error::Usage(clean(message))),
            Err(e) => Err(e),
        }
    }

    const OCR: &str = "{name=\"ocr\", detector=\"det\"}";
    const SIGNS: &str = "a sign \"OPEN\"\na sign \u{201c}CAF\u{c9}\u{201d}\n";

    #[test]
    fn prompts_without_a_reward_are_refused_and_counted() {
        let cats = format!("{SIGNS}a cat\na dog\na 12\" record\na fish\n");
        let message = notes(&cats, SIGNS, &format!("[{OCR}]"), &[]).unwrap_err().to_string();
        assert_eq!(
            message,
            "data.train = \"train\": no reward with a weight applies to 4 of 6 prompts: 2 \"a cat\", 3 \"a dog\", 4 \"a 12\\\" \
             record\", ... (ocr: it has no text in double quotes, or a quote without its other half); take them out, or give a \
             reward that applies to them a weight"
        );
        // Another reward applies to them; one that is only watched does not count.
        let [both, watched] =
            ["", ", weight=0.0"].map(|weight| format!("[{OCR}, {{name=\"jpeg-compressibility\"{weight}}}]"));
        let told = notes(&cats, SIGNS, &both, &[]).unwrap();
        let first = "data.train = \"train\": ocr does not apply to 4 of 6 prompts (it has no text in double quotes, or a \
                     quote without its other half): 2 \"a cat\", 3 \"a dog\", 4 \"a 12\\\" record\", ...";
        let accent = "ocr can never be 1 for 1 of 6 prompts: its recogniser cannot write some characters (\u{c9}): 1 ";
        assert_eq!((told.len(), told[0].as_str()), (3, first), "{told:?}");
        assert!(told[1].contains(accent) && told[2].starts_with("data.eval = \"eval\": ocr can never be 1 for 1 of 2"));
        assert!(notes(&cats, SIGNS, &watched, &[]).is_err());
        // An evaluation skips what does not apply.
        let told = notes("a sign \"OPEN\"", "a cat", &format!("[{OCR}]"), &[]).unwrap();
        assert!(told[0].starts_with("data.eval = \"eval\": ocr does not apply to 1 of 1 prompts"), "{told:?}");
    }

    #[test]
    fn each_stage_has_its_own_weights() {
        let rewards = format!("[{OCR}, {{name=\"jpeg-compressibility\"}}]");
        let stage = "stage=[{at_update=3, weights={\"jpeg-compressibility\"=0.0}}]";
        let message = notes("a cat", SIGNS, &rewards, &[stage]).unwrap_err().to_string();
        assert!(message.contains("no reward with a weight applies to 1 of 1 prompts: 0 \"a cat\""), "{message}");
        let stage = "stage=[{at_update=3, weights={ocr=0.0}}]";
        assert_eq!(notes("a sign \"OPEN\"", "a sign \"OPEN\"", &rewards, &[stage]).unwrap(), [""; 0]);
    }

    #[test]
    fn what_has_no_effect_and_what_is_not_known_is_told_once() {
        let train = "{\"prompt\": \"a cat\", \"negative_prompt\": \"blur\", \"style\": 1, \"tag\": \"x\"}";
        let remote = "[{name=\"remote\", url=\"http://a:1\", reward=\"good\"}]";
        let told = notes(train, "a cat", remote, &["stage=[{at_update=3, weights={good=2.0}}]"]).unwrap();
        let expected = [
            "data.train = \"train\": only the server of good can say to which prompts it applies",
            "data.train = \"train\": the negative_prompt of 1 prompts has no effect with sampler.guidance = 1",
            "data.train = \"train\": remote rewards are told style of the prompts; nothing else here reads that",
            "data.eval = \"eval\": only the server of good can say to which prompts it applies",
        ];
        assert_eq!(told, expected);
        let told = notes(train, "a cat", remote, &["sampler.guidance=4"]).unwrap();
        assert!(!told.iter().any(|note| note.contains("has no effect")), "{told:?}");
    }
}
