//! Parts of a model straight from its files: every rank reads what it keeps.

use super::common::*;
use super::sai::single_file;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::model::files::{Loaded, Transformer};
use flowrl_dist::params::{Entry, Layout, LoraConfig, ParamSet, Trainable, Values};
use flowrl_dist::shard::Partition;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the elements that are handed out.
struct Counted<'a> {
    values: &'a dyn Values,
    elements: AtomicUsize,
}

impl Values for Counted<'_> {
    fn elements(&self, entry: &Entry, range: Range<usize>) -> Result<Tensor> {
        let elements = self.values.elements(entry, range)?;
        self.elements.fetch_add(elements.elem_count(), Ordering::Relaxed);
        Ok(elements)
    }

    fn dtype(&self) -> DType {
        self.values.dtype()
    }

    fn device(&self) -> Device {
        self.values.device()
    }
}

/// The small transformer in three layouts, stored as `dtype`: diffusers' one file and two shards, and the authors' file.
fn stored(root: &Path, dtype: DType) -> [PathBuf; 3] {
    let convert = |tensors: Tensors| -> Tensors {
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())).collect()
    };
    let diffusers = convert(tensors(&fixture("sd3_micro/diffusion_pytorch_model.safetensors")));
    let [one, several] = ["one", "several"].map(|name| root.join(format!("{name}-{}", dtype.as_str())));
    for folder in [&one, &several] {
        fs::create_dir(folder).unwrap();
        fs::copy(fixture("sd3_micro/config.json"), folder.join("config.json")).unwrap();
    }
    write(&one.join("diffusion_pytorch_model.safetensors"), &diffusers);
    let shard = |index: usize| format!("diffusion_pytorch_model-{index:05}-of-00002.safetensors");
    let mut names: Vec<&String> = diffusers.keys().collect();
    names.sort_unstable();
    let place = |i: usize| shard(1 + i % 2); // neighbours in different files
    let map: serde_json::Map<_, _> = names.iter().enumerate().map(|(i, n)| ((*n).clone(), place(i).into())).collect();
    for index in [1, 2] {
        let own = names.iter().filter(|name| map[**name] == shard(index));
        write(&several.join(shard(index)), &own.map(|name| ((*name).clone(), diffusers[*name].clone())).collect());
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(several.join("diffusion_pytorch_model.safetensors.index.json"), index.to_string()).unwrap();
    let authors = root.join(format!("sd3.5_medium-{}.safetensors", dtype.as_str()));
    write(&authors, &convert(single_file()));
    [one, several, authors]
}

/// The parts of each of `ranks` ranks are those cut from the whole set `whole`, and together they read everything once.
fn read_by(ranks: usize, loaded: &Loaded, whole: &ParamSet, layout: &Layout, dtype: DType) {
    let partition = Partition::new(layout, ranks);
    let flat = whole.flatten(layout).unwrap();
    let mut read = 0;
    for rank in 0..ranks {
        let counted = Counted { values: &loaded.base, elements: AtomicUsize::new(0) };
        let part = partition.read(&counted, layout, rank, dtype).unwrap();
        assert_eq!(values(&part), values(&partition.cut(&flat, rank).unwrap()), "rank {rank} of {ranks}");
        let own = counted.elements.into_inner();
        assert_eq!(own, partition.owned(rank).iter().map(Range::len).sum::<usize>());
        assert!(own <= partition.shard_len() && partition.shard_len() <= layout.total / ranks + partition.stages());
        read += own;
    }
    assert_eq!(read, layout.total);
}

#[test]
fn parity_of_parts_with_the_whole_set_in_every_layout() {
    let root = tempfile::tempdir().unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, ..LoraConfig::default() };
    for stored_as in [DType::F32, DType::BF16, DType::F16] {
        let recorded = tensors(&fixture("sd3_micro/diffusion_pytorch_model.safetensors"));
        for path in stored(root.path(), stored_as) {
            let transformer = Transformer::open(&path).unwrap();
            let (full, adapted) = ((Trainable::Full, None), (Trainable::Lora, Some(&lora)));
            let [single, half] = [DType::F32, DType::BF16];
            for (dtype, (trainable, adapters)) in [(single, full), (single, adapted), (half, full), (half, adapted)] {
                let loaded = transformer.load(adapters, LATENT, dtype, 0, &Device::Cpu).unwrap();
                let (specs, whole) = (loaded.model.specs(), loaded.params().unwrap());
                for entry in Layout::all(&specs).entries.iter().filter(|entry| !entry.name.contains("lora_")) {
                    let ours = whole.elements(entry, 0..entry.len).unwrap();
                    assert_eq!(ours.dtype(), dtype);
                    let theirs = recorded[&entry.name].to_dtype(stored_as).unwrap().to_dtype(dtype).unwrap();
                    assert_eq!(values(&ours), values(&theirs), "{} of {}", entry.name, path.display());
                }
                for ranks in [1, 4, 7] {
                    let trained = trainable.role().dtype(dtype);
                    read_by(ranks, &loaded, &whole, &Layout::new(&specs, trainable), trained);
                    read_by(ranks, &loaded, &whole, &Layout::frozen(&specs, trainable), dtype);
                }
            }
        }
    }
}
