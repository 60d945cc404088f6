//! Metrics, their files and the image grids.

use candle_core::{Device, Tensor};
use flowrl_dist::comm::Solo;
use flowrl_dist::observe::grid::{before_after, image_grid, save_png};
use flowrl_dist::observe::tensorboard::masked_crc;
use flowrl_dist::observe::{Metrics, MetricsLog};
use image::{Rgb, RgbImage};
use std::fs;
use std::path::Path;

fn loss(value: f64) -> Metrics {
    let mut metrics = Metrics::default();
    metrics.set("loss", value);
    metrics
}

fn updates(path: &Path) -> Vec<u64> {
    let text = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    let update = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["update"].as_u64().unwrap();
    text.lines().map(update).collect()
}

#[test]
fn means_count_by_their_weights() {
    let mut metrics = Metrics::default();
    metrics.add_mean("loss", 1.0, 24.0);
    metrics.add_mean("loss", 4.0, 8.0);
    metrics.add_mean("loss", f64::NAN, 0.0);
    metrics.add("images", 24.0);
    metrics.add("images", 8.0);
    metrics.max("time.train", 2.0);
    metrics.max("time.train", 1.0);
    metrics.set("lr", 0.5);
    metrics.set("lr", 0.25);
    let expected = [("loss", 1.75), ("images", 32.0), ("time.train", 2.0), ("lr", 0.25)];
    assert_eq!(metrics.iter().collect::<Vec<_>>(), expected);
    assert_eq!(metrics.get("nothing"), None);

    metrics.max("time.train", f64::NAN);
    metrics.max("time.train", 9.0);
    assert!(metrics.get("time.train").unwrap().is_nan());
}

#[test]
fn one_rank_alone_keeps_its_metrics() {
    let mut metrics = loss(0.125);
    metrics.add_mean("reward.ocr.mean", 0.5, 3.0);
    let before = metrics.clone();
    metrics.reduce(&Solo).unwrap();
    assert_eq!(metrics, before);
    assert_eq!(metrics.reward(), Some(("reward.ocr.mean", 0.5)));
}

#[test]
fn a_line_keeps_the_order_and_writes_null_for_nan() {
    let out = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::open(out.path(), None).unwrap();
    let mut metrics = Metrics::default();
    metrics.set("iteration", 1.0);
    metrics.set("reward.a \"b\".mean", 0.1);
    metrics.set("loss", f64::NAN);
    metrics.set("grad_norm", f64::INFINITY);
    log.write(3, &metrics).unwrap();
    assert_eq!(
        fs::read_to_string(out.path().join("metrics.jsonl")).unwrap(),
        "{\"update\":3,\"iteration\":1,\"reward.a \\\"b\\\".mean\":0.1,\"loss\":null,\"grad_norm\":null}\n"
    );
}

#[test]
fn resuming_cuts_later_updates_and_a_torn_line() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(out.path(), None).unwrap();
    for update in 1..=5 {
        log.write(update, &loss(0.1)).unwrap();
    }
    drop(log);

    MetricsLog::open(out.path(), Some(3)).unwrap().write(4, &loss(0.2)).unwrap();
    assert_eq!(updates(out.path()), [1, 2, 3, 4]);

    let mut torn = fs::read_to_string(&path).unwrap();
    torn.push_str("{\"update\":1,\"lo");
    fs::write(&path, &torn).unwrap();
    MetricsLog::open(out.path(), Some(9)).unwrap().write(5, &loss(0.3)).unwrap();
    assert_eq!(updates(out.path()), [1, 2, 3, 4, 5]);

    // A whole object without its end of line may still be half a number.
    fs::write(&path, "{\"update\":1,\"loss\":2}\n{\"update\":2,\"loss\":1}").unwrap();
    MetricsLog::open(out.path(), Some(9)).unwrap();
    assert_eq!(updates(out.path()), [1]);

    MetricsLog::open(out.path(), None).unwrap();
    assert!(updates(out.path()).is_empty());
}

/// The report shows the last grid: it must not be one of a history that was given up.
#[test]
fn grids_of_updates_that_are_still_to_come_are_deleted() {
    let out = tempfile::tempdir().unwrap();
    let samples = out.path().join("samples");
    let draw = || {
        for name in ["update_00000000", "update_00000010", "update_00000020", "before_after", "my_update_00000020"] {
            save_png(&RgbImage::new(2, 2), &samples.join(format!("{name}.png"))).unwrap();
        }
    };
    let left = |resume: Option<u64>| {
        draw();
        MetricsLog::open(out.path(), resume).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(&samples).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(left(Some(10)), ["my_update_00000020.png", "update_00000000.png", "update_00000010.png"]);
    assert_eq!(left(None), ["my_update_00000020.png"]);
}

#[test]
fn event_files_read_back() {
    let out = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::open(out.path(), Some(6)).unwrap();
    log.write(300, &loss(0.5)).unwrap();
    log.image(300, "samples", &RgbImage::from_pixel(2, 3, Rgb([255, 0, 0]))).unwrap();

    let events = events(out.path());
    assert_eq!(events.len(), 4);
    assert_eq!(bytes(&events[0], 3), b"brain.Event:2");
    assert_eq!(int(&events[1], 2), 7, "the restart begins with the update after the checkpoint");
    assert_eq!(int(&bytes(&events[1], 7), 1), 1, "SessionLog START");

    let value = bytes(&bytes(&events[2], 5), 1);
    assert_eq!(int(&events[2], 2), 300);
    assert_eq!(bytes(&value, 1), b"loss");
    assert_eq!(bytes(&value, 2), 0.5_f32.to_le_bytes());

    let picture = bytes(&bytes(&bytes(&events[3], 5), 1), 4);
    assert_eq!((int(&picture, 1), int(&picture, 2)), (3, 2));
    let decoded = image::load_from_memory(&bytes(&picture, 4)).unwrap().to_rgb8();
    assert_eq!((decoded.dimensions(), decoded[(1, 2)]), ((2, 3), Rgb([255, 0, 0])));
}

/// The data of every frame of the one event file in `out`, its checksums checked.
fn events(out: &Path) -> Vec<Vec<u8>> {
    let is_events = |path: &std::path::PathBuf| path.to_string_lossy().contains("events.out.tfevents.");
    let path = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path()).find(is_events).unwrap();
    let file = fs::read(path).unwrap();
    let crc = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let (mut at, mut frames) = (0, Vec::new());
    while at < file.len() {
        let length = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(crc(at + 8), masked_crc(&file[at..at + 8]));
        let data = &file[at + 12..at + 12 + length];
        assert_eq!(crc(at + 12 + length), masked_crc(data));
        frames.push(data.to_vec());
        at += 16 + length;
    }
    frames
}

/// The fields of a protobuf message: number, and its bytes (a varint as eight).
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let end = message.iter().position(|b| b & 0x80 == 0).unwrap();
        let value = message[..=end].iter().rev().fold(0, |value, b| value << 7 | u64::from(b & 0x7f));
        *message = &message[end + 1..];
        value
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, varint(&mut message).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            5 => 4,
            2 => varint(&mut message) as usize,
            wire_type => panic!("wire type {wire_type}"),
        };
        found.push((key >> 3, message[..length].to_vec()));
        message = &message[length..];
    }
    found
}

fn bytes(message: &[u8], field: u64) -> Vec<u8> {
    fields(message).into_iter().find(|(number, _)| *number == field).unwrap().1
}

fn int(message: &[u8], field: u64) -> u64 {
    u64::from_le_bytes(bytes(message, field).try_into().unwrap())
}

/// `[N, 3, 2, 2]`, every picture of one grey, its top left pixel red.
fn pictures(greys: &[f32]) -> Tensor {
    let mut values = Vec::new();
    for grey in greys {
        for corner in [1.0, 0.0, 0.0] {
            values.extend([corner, *grey, *grey, *grey]);
        }
    }
    Tensor::from_vec(values, (greys.len(), 3, 2, 2), &Device::Cpu).unwrap()
}

#[test]
fn a_grid_scales_by_whole_pixels() {
    let grid = image_grid(&pictures(&[0.5, 2.0, -1.0]), &[], 2, 10).unwrap();
    assert_eq!(grid.dimensions(), (2 * 36, 2 * 36));
    assert_eq!(grid[(8, 8)], Rgb([255, 0, 0]));
    assert_eq!(grid[(17, 17)], Rgb([255, 0, 0]));
    assert_eq!(grid[(18, 8)], Rgb([128; 3]));
    assert_eq!(grid[(27, 27)], Rgb([128; 3]));
    assert_eq!(grid[(28, 27)], grid[(0, 0)]);
    assert_eq!(grid[(36 + 27, 27)], Rgb([255; 3]), "clamped");
    assert_eq!(grid[(27, 36 + 27)], Rgb([0; 3]), "clamped, too");
    let error = image_grid(&pictures(&[0.5, f32::NAN]), &[], 2, 10).unwrap_err();
    assert_eq!(error.to_string(), "image 1 has a pixel value of NaN; it cannot be drawn");
    assert_ne!(grid[(36, 20)], grid[(0, 20)], "a separator between the columns");
}

#[test]
fn captions_stand_below_and_wrap() {
    let plain = image_grid(&pictures(&[0.5; 2]), &[], 2, 40).unwrap();
    let captions = ["red".to_owned(), "a long caption of many words that does not fit".to_owned()];
    let grid = image_grid(&pictures(&[0.5; 2]), &captions, 2, 40).unwrap();
    assert_eq!(grid.width(), plain.width());
    assert_eq!(grid.height(), plain.height() + 3 * 15 + 4);
    let dark = |from_x: u32| (from_x + 8..from_x + 88).any(|x| (92..104).any(|y| grid[(x, y)].0[0] < 100));
    assert!(dark(0) && dark(96), "both captions are drawn");
}

#[test]
fn pairs_stand_side_by_side() {
    let pair = before_after(&pictures(&[0.0]), &pictures(&[1.0]), &["a".into()], "after update 60", 4, 30).unwrap();
    assert_eq!(pair.width(), 2 * 60 + 3 * 8);
    assert_eq!(pair[(8 + 59, 23 + 8 + 59)], Rgb([0; 3]));
    assert_eq!(pair[(16 + 60 + 59, 23 + 8 + 59)], Rgb([255; 3]));
    assert!(before_after(&pictures(&[0.0]), &pictures(&[1.0; 2]), &[], "after", 1, 1).is_err());

    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("samples/update_00000060.png");
    save_png(&pair, &path).unwrap();
    assert_eq!(image::open(&path).unwrap().to_rgb8(), pair);
}
