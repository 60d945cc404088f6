//! TensorBoard event files: TFRecord frames around hand-encoded `Event` messages.
//!
//! Layout: <https://github.com/tensorflow/tensorboard/blob/2.20.0/tensorboard/compat/proto/event.proto> and
//! `summary.proto` beside it. A frame is length (u64), masked crc32c of the length, data, masked crc32c of the data, all
//! little-endian.

use crate::error::{Error, Result};
use crate::fs::Appended;
use image::{ImageFormat, RgbImage};
use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const PREFIX: &str = "events.out.tfevents.";

/// Appends scalars and pictures to one event file of its own.
#[derive(Debug)]
pub struct EventWriter {
    file: Appended,
}

impl EventWriter {
    /// Starts `dir/events.out.tfevents.SECONDS.HOST.PID.N`. `restart_step` tells TensorBoard to forget what earlier files
    /// hold from that step on.
    pub fn create(dir: &Path, restart_step: Option<u64>) -> Result<Self> {
        let stem =
            format!("{PREFIX}{:010}.{}.{}", since_epoch() as u64, crate::hostname::hostname(), std::process::id());
        // The number keeps two writers of one process in one second apart.
        let path = (0..).map(|n| dir.join(format!("{stem}.{n}"))).find(|path| !path.exists()).unwrap_or_default();
        let mut writer = Self { file: Appended::open(dir, path)? };
        if let Some(step) = restart_step {
            let mut start = Message::default();
            start.int(1, 1); // SessionLog.status = START
            writer.event(step, |event| event.bytes(7, &start.0))?;
        }
        Ok(writer)
    }

    /// Deletes the event files of an earlier run in `dir`.
    pub fn remove_all(dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
            let entry = entry.map_err(Error::io(dir))?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(())
    }

    /// The file that is written.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Writes named values of one step, as f32. The part of a name before its first dot becomes TensorBoard's group.
    pub fn scalars<'a>(&mut self, step: u64, values: impl Iterator<Item = (&'a str, f64)>) -> Result<()> {
        let mut summary = Message::default();
        for (name, scalar) in values {
            let mut value = Message::default();
            value.bytes(1, name.replacen('.', "/", 1).as_bytes());
            value.float(2, scalar as f32);
            summary.bytes(1, &value.0);
        }
        self.event(step, |event| event.bytes(5, &summary.0))
    }

    /// Writes a picture of one step, as PNG.
    pub fn image(&mut self, step: u64, tag: &str, picture: &RgbImage) -> Result<()> {
        let mut png = Cursor::new(Vec::new());
        picture
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|e| Error::Failed(format!("picture {tag} could not be encoded: {e}")))?;
        let mut image = Message::default();
        image.int(1, picture.height().into());
        image.int(2, picture.width().into());
        image.int(3, 3); // RGB
        image.bytes(4, &png.into_inner());
        let mut value = Message::default();
        value.bytes(1, tag.as_bytes());
        value.bytes(4, &image.0);
        let mut summary = Message::default();
        summary.bytes(1, &value.0);
        self.event(step, |event| event.bytes(5, &summary.0))
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Message)) -> Result<()> {
        let mut event = Message::default();
        event.double(1, since_epoch());
        event.int(2, step);
        what(&mut event);
        let path = self.file.path().to_path_buf();
        let file = self.file.file()?;
        let whole = file.metadata().map_err(Error::io(&path))?.len();
        let first = if whole == 0 { frame(&version().0) } else { Vec::new() };
        file.write_all(&[first, frame(&event.0)].concat()).map_err(|e| {
            let _ = file.set_len(whole); // behind a torn event nothing is read
            Error::io(&path)(e)
        })
    }
}

/// The event that a file begins with.
fn version() -> Message {
    let mut event = Message::default();
    event.double(1, since_epoch());
    event.bytes(3, b"brain.Event:2");
    event
}

/// Seconds since 1970.
fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A protobuf message in its wire format.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn int(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
}

/// One TFRecord.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// TFRecord's checksum: crc32c, rotated and offset so that a checksum of data with checksums in it stays good.
pub fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, reflected.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, &byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    /// The check value of the CRC catalogue and RFC 3720 B.4 (32 bytes of zeros).
    #[test]
    fn crc32c_has_the_published_values() {
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(super::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
