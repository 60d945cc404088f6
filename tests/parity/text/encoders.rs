use super::pipeline::{Pipeline, T5_TOKENS, T5_WIDTH, save};
use candle_core::{DType, Device, Tensor};
use flowrl_dist::model::clip::TextEncoder;
use flowrl_dist::model::text::{Encoding, T5Encoder, TextEncoders, Tokenizer};
use flowrl_dist::{Error, Result};
use std::fs;

const TEXTS: [&str; 2] = ["a photo of the cat", "hello world! the dog's red"];

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The texts' part of the context: tokens `from..to`, features `..width`.
fn part(context: &Tensor, tokens: std::ops::Range<usize>, features: std::ops::Range<usize>) -> Vec<f32> {
    let part = context.narrow(1, tokens.start, tokens.len()).unwrap();
    values(&part.narrow(2, features.start, features.len()).unwrap())
}

#[test]
fn every_encoder_gets_its_tokens_and_its_place() -> Result<()> {
    let pipeline = Pipeline::new();
    let embeddings = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    assert_eq!(embeddings.context.dims(), [2, 77 + T5_TOKENS, T5_WIDTH]);
    assert_eq!(embeddings.pooled.dims(), [2, 24 + 40]);

    let ids = |name: &str, length: usize| {
        let tokenizer = Tokenizer::open(&pipeline.path(name), length).unwrap();
        TEXTS.map(|text| tokenizer.encode(text).unwrap()).to_vec()
    };
    let clip = |number: &str| {
        let encoder = TextEncoder::load(&pipeline.path(&format!("text_encoder{number}")), DType::F32, &Device::Cpu);
        encoder.unwrap().forward(&ids(&format!("tokenizer{number}"), 77)).unwrap()
    };
    let (l, g) = (clip(""), clip("_2"));
    let t5 = T5Encoder::load(&pipeline.path("text_encoder_3"), DType::F32, &Device::Cpu)?;
    let t5 = t5.forward(&ids("tokenizer_3", T5_TOKENS))?.last;
    let context = &embeddings.context;
    assert_eq!(part(context, 0..77, 0..32), values(l.penultimate()));
    assert_eq!(part(context, 0..77, 32..72), values(g.penultimate()));
    assert!(part(context, 0..77, 72..T5_WIDTH).iter().all(|&x| x == 0.0));
    assert_eq!(part(context, 77..77 + T5_TOKENS, 0..T5_WIDTH), values(&t5));
    let pooled = Tensor::cat(&[&l.features, &g.features], 1)?;
    assert_eq!(values(&embeddings.pooled), values(&pooled));
    Ok(())
}

#[test]
fn zeros_stand_for_an_absent_t5() -> Result<()> {
    let pipeline = Pipeline::new();
    let whole = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    pipeline.remove("text_encoder_3");
    pipeline.remove("tokenizer_3");
    let without = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    assert_eq!(without.context.dims(), [2, 77 + 77, T5_WIDTH]);
    assert_eq!(part(&without.context, 0..77, 0..T5_WIDTH), part(&whole.context, 0..77, 0..T5_WIDTH));
    assert!(part(&without.context, 77..154, 0..T5_WIDTH).iter().all(|&x| x == 0.0));
    assert_eq!(values(&without.pooled), values(&whole.pooled));
    Ok(())
}

/// Half precision in the file, either name of T5's table of tokens, tables of positions nobody needs.
#[test]
fn files_of_other_writers_are_read() -> Result<()> {
    let pipeline = Pipeline::new();
    let whole = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    pipeline.change_weights("text_encoder_3", |tensors| {
        let table = tensors.remove("shared.weight").unwrap();
        tensors.insert("encoder.embed_tokens.weight".into(), table);
    });
    let path = pipeline.path("text_encoder/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F16).unwrap());
    tensors.insert("text_model.embeddings.position_ids".into(), Tensor::arange(0i64, 77, &Device::Cpu)?);
    fs::remove_file(path).unwrap();
    save(&pipeline.path("text_encoder/model.fp16.safetensors"), &tensors);
    let other = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    let tokens = 77..77 + T5_TOKENS;
    assert_eq!(part(&other.context, tokens.clone(), 0..T5_WIDTH), part(&whole.context, tokens, 0..T5_WIDTH));
    let (ours, exact) = (values(&other.pooled), values(&whole.pooled));
    let largest = exact.iter().fold(0f32, |a, x| a.max(x.abs()));
    let error = ours.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
    assert!(0.0 < error && error < 5e-3, "{error}");
    Ok(())
}

fn failure(encoding: &Encoding) -> Error {
    TextEncoders::load(encoding, &Device::Cpu).unwrap_err()
}

#[track_caller]
fn fails_with(pipeline: &Pipeline, words: &[&str]) {
    let message = failure(&pipeline.encoding()).to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

#[test]
fn an_incomplete_download_is_not_taken_for_a_pipeline_without_t5() {
    let pipeline = Pipeline::new();
    pipeline.remove("text_encoder_3");
    let list = |class: &str| {
        fs::write(pipeline.path("model_index.json"), format!(r#"{{"text_encoder_3": {class}}}"#)).unwrap();
    };
    list(r#"["transformers", "T5EncoderModel"]"#);
    fails_with(&pipeline, &["model_index.json: names text_encoder_3, which is not in the folder", "[null, null]"]);
    list("[null, null]");
    assert!(TextEncoders::load(&pipeline.encoding(), &Device::Cpu).is_ok());
}

/// diffusers 0.33: what the list sets to null is not loaded, whether or not there is a folder.
#[test]
fn a_t5_that_the_list_sets_to_null_is_zeros() -> Result<()> {
    let pipeline = Pipeline::new();
    let whole = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?.encode(&TEXTS)?;
    fs::write(pipeline.path("model_index.json"), r#"{"text_encoder_3": [null, null]}"#).unwrap();
    let encoders = TextEncoders::load(&pipeline.encoding(), &Device::Cpu)?;
    let other = encoders.encode(&TEXTS)?;
    assert_eq!(values(&other.pooled), values(&whole.pooled));
    assert_eq!(other.context.dims(), [TEXTS.len(), 77 + 77, T5_WIDTH], "as many zeros as CLIP has tokens");
    assert!(values(&other.context.narrow(1, 77, 77)?).iter().all(|value| *value == 0.0));
    fs::write(pipeline.path("model_index.json"), r#"{"_class_name": "FluxPipeline"}"#).unwrap();
    fails_with(&pipeline, &["model_index.json: has _class_name = \"FluxPipeline\", not StableDiffusion3Pipeline"]);
    Ok(())
}

#[test]
fn missing_folders_are_named() {
    for part in ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "tokenizer_3"] {
        let pipeline = Pipeline::new();
        pipeline.remove(part);
        fails_with(&pipeline, &[&format!("has no folder {part};"), "model_index.json"]);
    }
}

#[test]
fn tensors_that_do_not_fit_are_listed_together() {
    let pipeline = Pipeline::new();
    pipeline.change_weights("text_encoder_2", |tensors| {
        tensors.remove("text_projection.weight");
        let bias = Tensor::zeros(7, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("text_model.final_layer_norm.bias".into(), bias.clone());
        tensors.insert("logit_bias".into(), bias);
    });
    let words = ["text_projection.weight [40, 40] is missing", "final_layer_norm.bias is [7], not [40]", "logit_bias"];
    fails_with(&pipeline, &words);
}

#[test]
fn unsupported_configurations_are_refused() {
    let with = |encoder: &str, key: &str, value: &str| {
        let pipeline = Pipeline::new();
        pipeline.change_config(encoder, key, value);
        pipeline
    };
    let pipeline = with("text_encoder", "hidden_act", "relu");
    fails_with(&pipeline, &["text_encoder/config.json", "hidden_act", "unknown variant `relu`", "quick_gelu"]);
    fails_with(&with("text_encoder_2", "model_type", "bert"), &["has model_type bert, not clip_text_model"]);
    fails_with(&with("text_encoder_3", "feed_forward_proj", "relu"), &["feed_forward_proj \"relu\"", "T5 v1.1"]);
    let pipeline = Pipeline::new();
    pipeline.change_config("text_encoder", "num_attention_heads", 3);
    fails_with(&pipeline, &["has hidden_size = 32, which 3 heads cannot share"]);
    for (encoder, key) in [("text_encoder", "layer_norm_eps"), ("text_encoder_3", "layer_norm_epsilon")] {
        for wrong in [-1000.0, 0.0, 1e-320] {
            let pipeline = Pipeline::new();
            pipeline.change_config(encoder, key, wrong);
            fails_with(
                &pipeline,
                &[&format!("{encoder}/config.json: has {key} = {wrong}; a model has a small number")],
            );
        }
    }
    // Weights that are finite and overflow.
    let pipeline = Pipeline::new();
    pipeline.change_weights("text_encoder_2", |tensors| {
        let weight = tensors.get_mut("text_projection.weight").unwrap();
        let largest = weight.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        *weight = ((&*weight / f64::from(largest)).unwrap() * 3e38).unwrap();
    });
    let encoders = TextEncoders::load(&pipeline.encoding(), &Device::Cpu).unwrap();
    let error = encoders.encode(&["cat"]).unwrap_err();
    assert!(
        matches!(&error, Error::NotFinite(m) if m.contains("the text encoders make") && m.contains("\"cat\"")),
        "{error}"
    );

    let encoding = Pipeline::new().encoding();
    let tokens = failure(&Encoding { t5_tokens: 513, ..encoding.clone() });
    assert!(matches!(&tokens, Error::Usage(m) if m.contains("513 T5 tokens")), "{tokens}");
    let dtype = failure(&Encoding { dtype: DType::F16, ..encoding });
    assert!(matches!(&dtype, Error::Usage(m) if m.contains("take F32 or BF16")), "{dtype}");
}

#[test]
fn a_tokenizer_of_another_model_is_found_out() {
    let pipeline = Pipeline::new();
    pipeline.change_config("text_encoder", "vocab_size", 450);
    pipeline.change_weights("text_encoder", |tensors| {
        let table = tensors.get_mut("text_model.embeddings.token_embedding.weight").unwrap();
        *table = table.narrow(0, 0, 450).unwrap().contiguous().unwrap();
    });
    fails_with(&pipeline, &["/tokenizer: makes tokens up to 4", ", and its encoder knows 450; take the tokenizer"]);
}
