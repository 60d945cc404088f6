//! The report page of whole, damaged and empty run folders.

use flowrl_dist::observe::{Metrics, MetricsLog, grid, report};
use image::{Rgb, RgbImage};
use std::fs;
use std::path::Path;

/// A run of 60 updates with an evaluation every 20.
fn run(out: &Path) {
    fs::write(
        out.join("config.toml"),
        "[run]\nname = \"<glyphs> & friends\"\nupdates = 60\n[model]\nkind = \"glyphs\"\n[model.lora]\nrank = 8\n\
         [[reward]]\nname = \"ocr\"\nweight = 1.0\n[[reward]]\nname = \"colour\"\nweight = 0.5\n[method]\nname = \"flow-awr\"\n",
    )
    .unwrap();
    let mut log = MetricsLog::open(out, None).unwrap();
    for update in 0..=60 {
        let mut metrics = Metrics::default();
        let gain = 1.0 - (-0.05 * update as f64).exp();
        if update > 0 {
            metrics.set("iteration", update as f64);
            metrics.set("stage", if update < 31 { 0.0 } else { 1.0 });
            metrics.set("reward.ocr.mean", 0.2 + 0.6 * gain);
            metrics.set("reward.ocr.std", 0.2);
            metrics.set("loss", if update == 7 { f64::NAN } else { 0.5 - 0.2 * gain });
            metrics.set("lr", 3e-4);
            metrics.set("images", 96.0);
            metrics.set("time.sample", 1.25);
            metrics.set("time.train", 0.5);
            metrics.set("time.reward_busy", 1.5);
            metrics.set("time.total", 2.0);
            log.write(update, &metrics).unwrap();
        }
        if update % 20 == 0 {
            let mut metrics = Metrics::default();
            metrics.set("eval.reward.ocr.mean", 0.25 + 0.6 * gain);
            metrics.set("eval.exact", 0.03 + 0.5 * gain);
            metrics.set("eval.colour_accuracy", 0.5 + 0.4 * gain);
            metrics.set("time.eval", 10.0);
            log.write(update, &metrics).unwrap();
            let picture = RgbImage::from_pixel(4, 4, Rgb([update as u8; 3]));
            grid::save_png(&picture, &out.join(format!("samples/update_{update:08}.png"))).unwrap();
        }
    }
}

#[test]
fn the_page_says_how_the_run_went() {
    let out = tempfile::tempdir().unwrap();
    run(out.path());
    let path = report::write(out.path()).unwrap();
    assert_eq!(path, out.path().join("report.html"));
    let page = fs::read_to_string(path).unwrap();

    for part in [
        "<h1>&lt;glyphs&gt; &amp; friends</h1>",
        "flow-awr on glyphs · update 60 of 60",
        "<span class=\"from\">0.25 →</span> 0.82",
        "<span class=\"from\">3.0 % →</span> 51 %",
        "The rewards took 1.5 s an update",
        "2m 40s",                 // 60 updates of 2 s and four evaluations of 10 s
        "5,760",                  // images
        "held out <b>0.82</b>",   // both curves in one chart
        "colour accuracy",        // a metric that no code here knows
        "1 value is not finite.", // the loss of update 7
        "Constant throughout: &nbsp; reward.ocr.std 0.2 &nbsp; lr 3e-4",
        "sample <b>1.25 s</b> · 62 %",
        "other <b>0.25 s</b> · 12 %",
        "<title>stage 1 begins (update 31)</title>",
        "<figcaption>update 0</figcaption>",
        "<figcaption>update 60</figcaption>",
        "<h3>model.lora</h3><table><tr><th>rank</th><td>8</td></tr></table>",
    ] {
        assert!(page.contains(part), "{part} is not on the page");
    }
    assert_eq!(page.matches("data:image/png;base64,").count(), 2, "the first and the last grid");
    assert_eq!(page.matches("<h3>reward</h3>").count(), 2);
    for part in ["<glyphs>", "NaN", "null", "<script", "http://", "https://", "<link"] {
        assert!(!page.contains(part), "{part} is on the page");
    }
}

#[test]
fn the_page_holds_nothing_that_a_link_leads_to() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(elsewhere.path());
    let link = |name: &str| std::os::unix::fs::symlink(elsewhere.path().join(name), folder.path().join(name)).unwrap();
    ["config.toml", "metrics.jsonl", "samples"].into_iter().for_each(link);
    report::write(folder.path()).unwrap();
    let page = fs::read_to_string(folder.path().join(report::FILE)).unwrap();
    assert!(page.contains("No metrics yet") && !page.contains("friends") && !page.contains("data:image"), "{page}");
}

#[test]
fn an_empty_or_damaged_folder_still_gives_a_page() {
    let out = tempfile::tempdir().unwrap();
    let page = fs::read_to_string(report::write(out.path()).unwrap()).unwrap();
    assert!(page.contains("No metrics yet"));

    fs::write(out.path().join("config.toml"), "not toml").unwrap();
    fs::write(
        out.path().join("metrics.jsonl"),
        b"{\"update\":1,\"loss\":null,\"<b>\":[1]}\nnonsense \xff\n{\"update\":1,\"loss\":2,\"<i>x</i>\":1}\n{\"upd",
    )
    .unwrap();
    fs::create_dir_all(out.path().join("samples/update_1.png")).unwrap();
    let page = fs::read_to_string(report::write(out.path()).unwrap()).unwrap();
    assert!(page.contains("<h3>Loss</h3>") && page.contains("&lt;i&gt;x&lt;/i&gt;"));
    assert!(!page.contains("<i>x") && !page.contains("No metrics yet"));

    assert!(report::write(&out.path().join("nowhere")).unwrap_err().to_string().contains("not a run folder"));
}
