//! Files as they are found in the wild, whole and broken.

use super::*;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

type Tensors<'a> = &'a [(&'a str, Tensor)];

fn write(path: &Path, tensors: Tensors) {
    safetensors::serialize_to_file(tensors.iter().map(|(name, t)| (*name, t.clone())), None, path).unwrap();
}

fn matrix(dtype: DType) -> Tensor {
    Tensor::new(&[[1f32, -2.5], [0.25, 3e-5]], &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn error(path: &Path) -> String {
    Weights::open(path).unwrap_err().to_string()
}

#[test]
fn types_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    let stored = [DType::F16, DType::BF16, DType::F32, DType::F64];
    let path = folder.path().join("model.safetensors");
    write(&path, &stored.map(|dtype| (dtype.as_str(), matrix(dtype))));
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!((weights.elements(), weights.bytes()), (16, 4 * (2 + 2 + 4 + 8)));
    for from in stored {
        assert_eq!(weights.dtype(from.as_str()), Some(from));
        for to in stored {
            let read = weights.tensor(from.as_str(), to, &Device::Cpu).unwrap();
            let expected = matrix(from).to_dtype(to).unwrap();
            assert_eq!((read.dtype(), read.dims()), (to, &[2, 2][..]));
            let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
            assert_eq!(values(&read), values(&expected));
        }
    }
}

/// Two shards and their index, without the second shard if it is not `whole`.
fn sharded(folder: &Path, whole: bool) {
    write(&folder.join("model-00001-of-00002.safetensors"), &[("a", matrix(DType::F32))]);
    if whole {
        write(&folder.join("model-00002-of-00002.safetensors"), &[("b", matrix(DType::F16))]);
    }
    let map = HashMap::from([("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")]);
    let index = serde_json::json!({ "metadata": { "total_size": 24 }, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path(), true);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(weights.files().count(), 2);
    let values = weights.tensor("b", DType::F16, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    assert_eq!(values.to_vec2::<f64>().unwrap()[0], [1.0, -2.5]);
}

/// diffusers reads the shards of its parts, transformers the single file of its own.
#[test]
fn of_a_file_and_shards_the_librarys_choice_is_read_and_the_other_named() {
    for (stem, read) in [("diffusion_pytorch_model", ["a", "b"].as_slice()), ("model", ["c"].as_slice())] {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        sharded(root, true);
        fs::rename(root.join("model.safetensors.index.json"), root.join(format!("{stem}.safetensors.index.json")))
            .unwrap();
        write(&root.join(format!("{stem}.safetensors")), &[("c", matrix(DType::F32))]);
        let weights = Weights::open(root).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), read);
        let other =
            if stem == "model" { "model.safetensors.index.json" } else { "diffusion_pytorch_model.safetensors" };
        assert_eq!(weights.passed_over(), [root.join(other)]);
        // The same tensors twice are no matter.
        let same = [("a", matrix(DType::F32)), ("b", matrix(DType::F16))];
        write(&root.join(format!("{stem}.safetensors")), &same);
        assert!(Weights::open(root).unwrap().passed_over().is_empty());
    }
    // A shard of another export, which no index names.
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path(), true);
    let stray = folder.path().join("model-00003-of-00003.safetensors");
    write(&stray, &[("c", matrix(DType::F32))]);
    assert_eq!(Weights::open(folder.path()).unwrap().passed_over(), [stray]);
}

/// As in a single file: what the model does not know is refused when it is compared with it.
#[test]
fn a_tensor_that_the_index_does_not_name_counts() {
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path(), true);
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    write(&shard, &[("a", matrix(DType::F16)), ("b", matrix(DType::F16)), ("bias", matrix(DType::F16))]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "bias"]);
    assert_eq!(weights.dtype("a"), Some(DType::F32), "of the shard that the index names");
    let expected = [("a", &[2, 2][..]), ("b", &[2, 2][..])];
    let message = weights.check(expected, |_| false).unwrap_err().to_string();
    assert!(message.contains("bias is not of this model"), "{message}");
}

#[test]
fn of_two_half_precisions_the_one_that_is_not_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model.fp16.safetensors"), &[("a", matrix(DType::F16))]);
    let other = folder.path().join("model.bf16.safetensors");
    write(&other, &[("a", matrix(DType::BF16))]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!((weights.dtype("a"), weights.passed_over()), (Some(DType::F16), vec![other.as_path()]));
}

/// The blob behind a link of a download's cache is not there: half precision does not step in for it.
#[test]
fn a_link_to_nothing_is_no_absent_file() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let link = |name: &str| std::os::unix::fs::symlink(root.join("gone"), root.join(name)).unwrap();
    write(&root.join("model.fp16.safetensors"), &[("a", matrix(DType::F16))]);
    link("model.safetensors");
    assert!(error(root).contains("model.safetensors: there is nothing at this path"), "{}", error(root));
    link("model_index.json");
    let index = Index::read(root).unwrap_err().to_string();
    assert!(index.contains("model_index.json: is a link to nothing"), "{index}");
}

#[test]
fn half_a_download_is_refused_and_an_index_without_shards_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    sharded(root, false);
    let absent = "1 of the 2 shards it names are absent: model-00002-of-00002.safetensors; download them as well";
    assert!(error(root).ends_with(absent), "{}", error(root));
    // Half precision is another model's numbers: it does not step in by itself.
    let half = root.join("model.fp16.safetensors");
    write(&half, &[("c", matrix(DType::F16))]);
    let message = error(root);
    assert!(message.ends_with(&format!("{absent}, or move it away to have {} read", half.display())), "{message}");
    fs::remove_file(root.join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(Weights::open(root).unwrap().names().collect::<Vec<_>>(), ["c"]);
    fs::remove_file(&half).unwrap();
    assert!(error(root).contains("2 of the 2 shards it names are absent"), "{}", error(root));
}

/// In a shard, in a part that is read of it, and in a file by other names.
#[test]
fn a_weight_that_is_no_number_is_named_by_file_and_tensor() {
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path(), true);
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    let bad = Tensor::new(&[[1f32, -2.5], [f32::NAN, f32::INFINITY]], &Device::Cpu).unwrap();
    write(&shard, &[("b", bad.to_dtype(DType::BF16).unwrap())]);
    let weights = Weights::open(folder.path()).unwrap();
    let told = format!("{}: b holds NaN or an infinite number (element 2 of 4)", shard.display());
    for read in [
        weights.tensor("b", DType::F32, &Device::Cpu).map(drop),
        weights.part("b", 1..3, DType::BF16, &Device::Cpu).map(drop),
        weights.scan(),
    ] {
        assert!(read.unwrap_err().to_string().starts_with(&told));
    }
    weights.part("b", 0..2, DType::F32, &Device::Cpu).unwrap();
    weights.tensor("a", DType::F32, &Device::Cpu).unwrap();
    let file = folder.path().join("theirs.safetensors");
    write(&file, &[("model.diffusion_model.a", bad)]);
    let error = Weights::open(&file).unwrap().under("model.diffusion_model.").tensor("a", DType::F32, &Device::Cpu);
    assert!(error.unwrap_err().to_string().contains("theirs.safetensors: model.diffusion_model.a holds NaN"));
}

#[test]
fn an_index_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path(), true);
    write(&folder.path().join("model-00002-of-00002.safetensors"), &[("x", matrix(DType::F16))]);
    assert!(error(folder.path()).contains("names b, which the file it names for it lacks"));
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map": {"a": "../secret.safetensors"}}"#).unwrap();
    assert!(error(folder.path()).contains("not in its own folder"));
    fs::write(&index, "[]").unwrap();
    assert!(error(folder.path()).contains("is no index of safetensors shards"));
}

#[test]
fn what_cannot_be_read_is_said_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let (root, file) = (folder.path(), folder.path().join("w.safetensors"));
    assert!(error(&root.join("none")).contains("there is nothing at this path"));
    assert!(error(root).contains("holds no safetensors file"));
    for name in ["diffusion_pytorch_model.bin", "sd3.ckpt"] {
        fs::write(root.join(name), "x").unwrap();
        assert!(error(root).contains("is a Python pickle"));
        assert!(error(&root.join(name)).contains("safetensors.torch.save_file"));
    }
    for (content, wanted) in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("<html>", "is no whole safetensors file"),
        ("", "is no whole safetensors file"),
    ] {
        fs::write(&file, content).unwrap();
        assert!(error(&file).contains(wanted), "{content:?}: {}", error(&file));
    }
    write(&file, &[("a", matrix(DType::F32))]);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    assert!(error(&file).contains("download it again"));
    fs::write(root.join("v.safetensors"), &whole).unwrap();
    assert!(error(root).contains("holds 2 safetensors files and no index"));
}

#[test]
fn every_difference_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let names: Vec<String> = (0..30).map(|i| format!("extra.{i:02}")).collect();
    let mut tensors: Vec<_> = names.iter().map(|name| (name.as_str(), matrix(DType::F32))).collect();
    tensors.push(("a", matrix(DType::F32)));
    write(&path, &tensors);
    let weights = Weights::open(&path).unwrap();
    let extra = |name: &str| name.starts_with("extra");
    weights.check([("a", &[2, 2][..])], extra).unwrap();
    let message = weights.check([("a", &[4][..]), ("b", &[1][..])], extra).unwrap_err().to_string();
    assert!(message.contains("2 tensors differ: a is [2, 2], not [4]; b [1] is missing."), "{message}");
    let message = weights.check([("a", &[2, 2][..])], |_| false).unwrap_err().to_string();
    assert!(message.contains("extra.19 is not of this model; and 10 more"), "{message}");
    assert!(!message.contains("extra.20"));
    assert!(weights.tensor("b", DType::F32, &Device::Cpu).unwrap_err().to_string().ends_with("lacks b"));
    assert_eq!(weights.under("extra.").names().next(), Some("00"));
}

/// As the one file of HPS v2.1 is published: alone in its folder.
#[test]
fn a_folder_with_one_pickle_is_that_pickle() {
    let fixtures = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), std::path::PathBuf::from);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("HPS_v2.1_compressed.pt");
    fs::copy(fixtures.join("clip_rewards/open_clip/model.pt"), &file).unwrap();
    let (whole, alone) = (AnyWeights::open(folder.path()).unwrap(), AnyWeights::open(&file).unwrap());
    assert!(whole.shape("visual.proj").is_some() && whole.shape("visual.proj") == alone.shape("visual.proj"));
    let open = |path: &Path| AnyWeights::open(path).map(|weights| matches!(weights, AnyWeights::Pickle { .. }));
    fs::write(folder.path().join("HPS_v2_compressed.pt"), "x").unwrap();
    let message = open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("holds 2 files of torch.save: HPS_v2.1_compressed.pt, HPS_v2_compressed.pt; name"),
        "{message}"
    );
    write(&folder.path().join("model.safetensors"), &[("a", matrix(DType::F32))]);
    assert!(!open(folder.path()).unwrap(), "safetensors go before pickles");
}

#[test]
fn a_folder_of_the_hugging_face_cache_names_the_one_to_give() {
    let folder = tempfile::tempdir().unwrap();
    for commit in ["1a", "2b", "3c"] {
        fs::create_dir_all(folder.path().join("snapshots").join(commit)).unwrap();
    }
    assert!(error(folder.path()).contains("snapshots/3c"), "{}", error(folder.path()));
    fs::create_dir(folder.path().join("refs")).unwrap();
    fs::write(folder.path().join("refs/main"), "2b").unwrap();
    assert!(error(folder.path()).ends_with("snapshots/2b"), "{}", error(folder.path()));
}

/// diffusers' pipeline writes `transformer.r` into its metadata, its transformer alone `r`.
#[test]
fn an_adapters_metadata_is_found_with_and_without_the_component() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_lora_weights.safetensors");
    for (metadata, scale) in [
        (r#"{"transformer.r": 2, "transformer.lora_alpha": 6}"#, 3.0),
        (r#"{"r": 2, "lora_alpha": 6, "transformer_engine": null}"#, 3.0),
        (r#"{"text_encoder.r": 4, "text_encoder.lora_alpha": 8}"#, 1.0),
    ] {
        let module = "transformer_blocks.0.attn.to_q";
        let factors = ["lora_A", "lora_B"].map(|end| (format!("{module}.{end}.weight"), matrix(DType::F32)));
        let words = HashMap::from([("lora_adapter_metadata".to_owned(), metadata.to_owned())]);
        safetensors::serialize_to_file(factors, Some(words), &path).unwrap();
        let adapter = Adapter::open(folder.path()).unwrap();
        assert_eq!((adapter.rank, adapter.scale()), (2, Some(scale)), "{metadata}");
    }
}
