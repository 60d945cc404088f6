//! A full-size transformer of Stable Diffusion 3.5 Medium with random weights, 4.9 GB of bf16, and how long it takes to
//! open and load: `cargo bench --bench random_sd35 -- FOLDER`.
//!
//! Writes FOLDER/transformer as diffusers lays it out, unless it is there; nothing is deleted. With such a folder memory
//! and speed of the real model can be measured without its weights.

use candle_core::{DType, Device};
use flowrl_dist::Error;
use flowrl_dist::error::Result;
use flowrl_dist::model::files::Transformer;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::params::{Init, Spec};
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::path::Path;
use std::time::Instant;

/// A tensor that is drawn when its turn to be written comes.
struct Drawn(Spec);

impl View for Drawn {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.0.initial(0, &Device::Cpu).and_then(|t| Ok(t.to_dtype(DType::BF16)?)).expect("a tensor");
        Cow::Owned(View::data(&values).into_owned())
    }

    fn data_len(&self) -> usize {
        2 * self.0.shape.iter().product::<usize>()
    }
}

fn write(folder: &Path) -> Result<()> {
    let config = Config::sd35_medium();
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let model = mmdit::model(&config, (128, 128), None)?;
    let specs = model.specs().into_iter().flatten().cloned().map(|mut spec| {
        // What training starts at zero would make a model that answers zero.
        if spec.init == Init::Zeros {
            spec.init = Init::Normal(0.02);
        }
        (spec.name.clone(), Drawn(spec))
    });
    // Written under another name first: an interrupted write is not taken for a model.
    let (file, part) = (folder.join("diffusion_pytorch_model.safetensors"), folder.join("part"));
    safetensors::serialize_to_file(specs, None, &part).map_err(|e| Error::Failed(format!("not written: {e}")))?;
    std::fs::rename(&part, &file).map_err(Error::io(&file))?;
    let path = folder.join("config.json");
    std::fs::write(&path, config.to_json().to_string()).map_err(Error::io(&path))
}

/// Lines of /proc/self/status about memory.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = |line: &&str| ["VmHWM", "RssAnon", "RssFile"].iter().any(|key| line.starts_with(key));
    status.lines().filter(wanted).map(|line| line.replace('\t', " ")).collect::<Vec<_>>().join(", ")
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [folder] = arguments.as_slice() else {
        return Err(Error::Usage("give a folder with room for 5 GB: cargo bench --bench random_sd35 -- FOLDER".into()));
    };
    let folder = Path::new(folder);
    let timed =
        |what: &str, since: Instant| eprintln!("{what:<22} {:7.2} s   {}", since.elapsed().as_secs_f64(), memory());
    let since = Instant::now();
    if !folder.join("transformer/config.json").is_file() {
        write(&folder.join("transformer"))?;
        timed("written", since);
    }
    for round in ["first", "again"] {
        let since = Instant::now();
        let transformer = Transformer::open(folder)?;
        timed(&format!("{round}: opened"), since);
        let since = Instant::now();
        let digest = transformer.weights.digest();
        timed(&format!("{round}: digest"), since);
        let since = Instant::now();
        let loaded = transformer.load(None, (64, 64), DType::BF16, 0, &Device::Cpu)?;
        timed(&format!("{round}: loaded, bf16"), since);
        assert_eq!(loaded.digest, digest);
        drop(transformer);
        timed(&format!("{round}: files closed"), Instant::now());
    }
    Ok(())
}
