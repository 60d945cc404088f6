//! The comparison of several runs: values computed by hand, the picture, what is refused.

use flowrl_dist::observe::report::{self, Comparison};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A run folder to be: its iterations have `updates` updates, 50 images an update and `seconds` an update.
struct Fake<'a> {
    name: &'a str,
    seed: u64,
    rewards: &'a [&'a str],
    updates: u64,
    seconds: u64,
    /// Update and held-out reward.
    evaluations: &'a [(u64, f64)],
    exact: f64,
    colour: f64,
}

const AWR: Fake = Fake {
    name: "awr",
    seed: 1,
    rewards: &["ocr"],
    updates: 2,
    seconds: 6,
    evaluations: &[(0, 0.2), (2, 0.4), (4, 0.8)],
    exact: 0.5,
    colour: 0.9,
};
const AWR_2: Fake =
    Fake { seed: 2, seconds: 10, evaluations: &[(0, 0.4), (2, 0.6), (4, 0.6)], exact: 0.25, colour: 0.8, ..AWR };
const NFT: Fake =
    Fake { name: "nft", updates: 1, seconds: 3, evaluations: &[(0, 0.3), (4, 0.6), (8, 0.5)], exact: 0.125, ..AWR };
const SLOW: Fake = Fake { name: "slow", evaluations: &[(0, 0.3), (8, 0.35)], ..NFT };

impl Fake<'_> {
    fn write(&self, folder: PathBuf) -> PathBuf {
        fs::create_dir_all(&folder).unwrap();
        let mut config = format!("[run]\nname = {:?}\nseed = {}\n", self.name, self.seed);
        for name in self.rewards {
            let section = match name.strip_prefix("remote:") {
                Some(name) => format!("name = \"remote\"\nreward = {name:?}"),
                None => format!("name = {name:?}"),
            };
            write!(config, "[[reward]]\n{section}\nweight = 1.0\n").unwrap();
        }
        fs::write(folder.join("config.toml"), config).unwrap();

        let reward = self.rewards.first().unwrap_or(&"ocr");
        let (reward, mut lines) = (reward.strip_prefix("remote:").unwrap_or(reward), String::new());
        for update in 0..=self.evaluations.last().map_or(4, |(update, _)| *update) {
            if update > 0 {
                let (iteration, images) = ((update - 1) / self.updates, 50 * self.updates);
                let seconds = self.seconds * self.updates;
                write!(lines, "{{\"update\":{update},\"iteration\":{iteration},\"reward.{reward}.mean\":0.5,").unwrap();
                writeln!(lines, "\"images\":{images},\"time.total\":{seconds}}}").unwrap();
            }
            for (_, value) in self.evaluations.iter().filter(|(at, _)| *at == update) {
                write!(lines, "{{\"update\":{update},\"eval.reward.{reward}.mean\":{value},").unwrap();
                write!(lines, "\"eval.exact\":{},\"eval.reward.colour.mean\":{},", self.exact, self.colour).unwrap();
                writeln!(lines, "\"time.eval\":1000}}").unwrap();
            }
        }
        fs::write(folder.join("metrics.jsonl"), lines).unwrap();
        folder
    }
}

/// Writes the runs into one folder, and their comparison there too.
fn compared(folder: &Path, runs: &[Fake], baseline: Option<&str>) -> flowrl_dist::Result<Comparison> {
    let folders: Vec<_> = runs.iter().zip(0..).map(|(run, i)| run.write(folder.join(format!("run{i}")))).collect();
    report::compare(&folders, None, baseline)
}

/// The cells of a Markdown table, without its rule.
fn cells(table: &str) -> Vec<Vec<&str>> {
    let rows = table.lines().filter(|line| line.starts_with('|') && !line.starts_with("| -"));
    rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

#[test]
fn the_table_has_the_values_computed_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let Comparison { table, files } = compared(folder.path(), &[AWR, NFT, AWR_2, SLOW], Some("nft")).unwrap();
    // AWR's means are 0.3, 0.5 and 0.7: halfway between updates 2 and 4, that is after 150 images and 8 s an update.
    let expected = [
        "method|seeds|held-out ocr, start → end|best|exact reads|colours (never rewarded)|updates to 0.600|images|seconds|s/update",
        "awr|2|0.300 → 0.700 [0.600, 0.800]|0.700 at 4|37.5 %|0.850|3|150|24|8",
        "nft|1|0.300 → 0.500|0.600 at 4|12.5 %|0.900|4|200|12|3",
        "slow|1|0.300 → 0.350|0.350 at 8|12.5 %|0.900|-|-|-|3",
    ];
    assert_eq!(cells(&table), expected.map(|row| row.split('|').collect::<Vec<_>>()), "{table}");
    assert!(table.contains("until the mean first reaches the best of `nft`") && !table.contains("Note"), "{table}");
    let lines = table.lines().take(5).map(|line| line.chars().count());
    assert!(lines.clone().all(|length| Some(length) == lines.clone().next()), "aligned: {table}");

    // Their parent is where both files are.
    let parent = folder.path().canonicalize().unwrap();
    assert_eq!(files, ["comparison.md", "comparison.svg"].map(|name| parent.join(name)));
    let document = fs::read_to_string(&files[0]).unwrap();
    assert!(document.contains("](comparison.svg)") && document.ends_with(&table), "{document}");
}

/// The metrics have a server's reward by its own name.
#[test]
fn a_remote_reward_is_compared_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let remote = |run: Fake<'static>| Fake { rewards: &["remote:geneval"], ..run };
    let table = compared(folder.path(), &[remote(AWR), remote(NFT)], Some("nft")).unwrap().table;
    assert_eq!(cells(&table)[0][2], "held-out geneval, start → end", "{table}");
    assert_eq!(cells(&table)[2][2], "0.300 → 0.500", "{table}");
}

#[test]
fn without_a_baseline_nothing_is_timed_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let rewarded = Fake { rewards: &["ocr", "colour"], ..NFT };
    let table = compared(folder.path(), &[AWR, rewarded], None).unwrap().table;
    let head = ["method", "seeds", "held-out ocr, start → end", "best", "exact reads", "colours", "s/update"];
    assert_eq!(cells(&table)[0], head);
    assert!(!table.contains("first reaches"), "{table}");
}

#[test]
fn seeds_of_other_lengths_count_where_all_of_them_are() {
    let folder = tempfile::tempdir().unwrap();
    let short = Fake { evaluations: &AWR_2.evaluations[..2], ..AWR_2 };
    let same_seed = Fake { name: "nft", ..AWR };
    let table = compared(folder.path(), &[AWR, short, NFT, same_seed], Some("awr")).unwrap().table;
    let awr = &cells(&table)[1];
    assert_eq!(awr[2..5], ["0.300 → 0.500 [0.400, 0.600]", "0.500 at 2", "37.5 %"]);
    assert_eq!(awr[6..], ["2", "100", "16", "8"]);
    let uneven = "Note: `awr`: its seeds were not evaluated after the same updates: of 3 updates the 2 that all 2 seeds \
                  have count, the last is 2.";
    assert!(table.contains(uneven), "{table}");
    assert!(table.contains("Note: `nft`: 2 of its runs have the seed 1; if they are other methods"), "{table}");
}

/// The names of the elements; checks that each is closed in order, every attribute quoted and every entity known.
fn elements(xml: &str) -> Vec<&str> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    for part in xml.split('<').skip(1) {
        let (tag, text) = part.split_once('>').unwrap();
        assert!(!text.contains('>'), "{text}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
            continue;
        }
        let (name, attributes) = tag.trim_end_matches('/').split_once(' ').unwrap_or((tag.trim_end_matches('/'), ""));
        for attribute in attributes.split_inclusive("\" ").map(str::trim).filter(|a| !a.is_empty()) {
            let (key, value) = attribute.split_once("=\"").unwrap();
            assert!(!key.contains([' ', '"']) && value.find('"') == Some(value.len() - 1), "{attribute}");
        }
        all.push(name);
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
    let known = |entity: &str| ["lt;", "gt;", "amp;", "quot;", "#39;"].iter().any(|known| entity.starts_with(known));
    assert!(xml.split('&').skip(1).all(known), "{xml}");
    all
}

#[test]
fn the_picture_stands_alone() {
    let folder = tempfile::tempdir().unwrap();
    let odd = Fake { name: "<a> & \"b|c\"", ..NFT };
    let comparison = compared(folder.path(), &[AWR, AWR_2, odd], None).unwrap();
    assert!(comparison.table.contains("| <a> & \"b\\|c\" "), "{}", comparison.table);
    let svg = fs::read_to_string(&comparison.files[1]).unwrap();
    let elements = elements(&svg);
    assert_eq!(elements.iter().filter(|name| **name == "g").count(), 3, "panels");
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" ") && svg.contains("fill=\"#fff\""), "{svg}");
    assert!(
        svg.contains(">awr (2 seeds)</text>") && svg.contains(">&lt;a&gt; &amp; &quot;b|c&quot; (1 seed)</text>"),
        "{svg}"
    );
    let count = |part: &str| svg.matches(part).count();
    assert_eq!((count("\"line m1\""), count("\"line m2\""), count("\"band m1\""), count("\"band m2\"")), (4, 4, 3, 0));
    // The curves: updates 0 to 8 over 334 units from 52, so update 4 is at 219; images 0 to 400, seconds 0 to 32.
    for title in ["awr: 0.7 (update 4)", "awr: 0.7 (images 200)", "awr: 0.7 (seconds 32)"] {
        assert!(svg.contains(&format!("<title>{title}</title>")), "no {title} in {svg}");
    }
    let at = |title: &str| svg.split("<circle ").find(|circle| circle.contains(title)).unwrap().to_owned();
    assert!(at("(update 4)").contains("cx=\"219.0\"") && at("awr: 0.7 (seconds 32)").contains("cx=\"386.0\""), "{svg}");
    for part in ["NaN", "inf", "href", "<script"] {
        assert!(!svg.contains(part), "{part} is in the picture");
    }
}

#[test]
fn an_iteration_of_several_updates_counts_once_on_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let run = AWR.write(folder.path().join("run"));
    let page = fs::read_to_string(report::write(&run).unwrap()).unwrap();
    assert!(page.contains(">200</div><p class=\"sub\">in 4 updates<") && page.contains("6 s per update"), "{page}");
}

#[test]
fn what_does_not_compare_is_refused() {
    let refused = |runs: &[Fake], baseline: Option<&str>, parts: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let error = compared(folder.path(), runs, baseline).unwrap_err();
        let message = error.to_string();
        assert_eq!((error.exit_code(), message.lines().count()), (2, 1), "{message}");
        parts.iter().for_each(|part| assert!(message.contains(part), "no {part:?} in {message}"));
        assert!(!folder.path().join("comparison.md").exists());
    };
    let other = Fake { rewards: &["colour", "ocr"], ..NFT };
    refused(&[AWR, other], None, &["run1: its first reward is \"colour\"", "run0 is \"ocr\"; compare runs with"]);
    refused(&[AWR, NFT], Some("ntf"), &["--baseline \"ntf\": no run has", "give one of \"awr\", \"nft\""]);
    refused(
        &[AWR, Fake { evaluations: &[], ..NFT }],
        None,
        &["run1: has no evaluation of \"ocr\"", "leave this run out"],
    );
    refused(&[Fake { rewards: &[], ..AWR }, NFT], None, &["run0: no [[reward]] in its config.toml"]);
    refused(&[AWR, Fake { evaluations: &[(3, 0.1)], ..AWR_2 }], None, &["\"awr\": its runs have no evaluation after"]);
    let names: Vec<String> = (0..13).map(|i| format!("method{i}")).collect();
    let many: Vec<Fake> = names.iter().map(|name| Fake { name, ..NFT }).collect();
    refused(&many, None, &["13 methods: one picture shows at most 12"]);

    let folder = tempfile::tempdir().unwrap();
    let run = AWR.write(folder.path().join("run"));
    let error = report::compare(&[run.clone(), folder.path().join("run/../run")], None, None).unwrap_err().to_string();
    assert!(error.contains("is given twice"), "{error}");
}

#[test]
fn the_command_prints_the_table_and_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (AWR.write(folder.path().join("x/a")), NFT.write(folder.path().join("b")));
    let [a, b, out] = [a, b, folder.path().join("new/out")].map(|path| path.to_str().unwrap().to_owned());
    let report = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_flowrl-dist")).arg("report").args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };

    let (code, stdout, stderr) = report(&[&a, &b, "--out", &out, "--baseline", "nft"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(cells(&stdout)[1][..3], ["awr", "1", "0.200 → 0.800"]);
    let files: Vec<&str> = stdout.lines().rev().take(4).collect();
    let page = |run: &str| format!("{run}/report.html");
    assert_eq!(files, [page(&b), page(&a), format!("{out}/comparison.svg"), format!("{out}/comparison.md")]);
    assert!(files.iter().all(|file| Path::new(file).is_file()), "{stdout}");

    assert_eq!(report(&[&a, &b]).0, Some(0));
    assert!(folder.path().join("comparison.svg").is_file(), "the common parent");

    let none = folder.path().to_str().unwrap();
    for (arguments, part) in [
        (&[&a, none][..], "is no run folder (no metrics.jsonl in it); give the --out of a run"),
        (&[&a, "--baseline", "awr"], "--baseline: belongs to a comparison; give two run folders or more"),
        (&[&a, "--out", &out], "--out: belongs to a comparison"),
        (&[&a, &b, "--out", "Cargo.toml"], "--out Cargo.toml: is a file; name a folder"),
        (&[&a, &b, "--baseline", "none"], "give one of \"awr\", \"nft\""),
    ] {
        let (code, stdout, stderr) = report(arguments);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    }
}
