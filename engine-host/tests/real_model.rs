//! The crate `engine` behind the host: a small BERT with made-up weights, compiled, mapped and served, gives on both routes
//! exactly what the model gives in this process.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::{Broker, Client};
use engine::{CompileOptions, Model, compile_folder};
use engine_host::{HostOptions, run};
use shm_layout::code::Code;
use shm_layout::image::HeapImage;
use shm_layout::payload::{decode_embeddings, decode_token_spans};
use shm_layout::wire::{BackingKind, FromEngine, Operation, Priority, ToEngine};
use shm_os::image_backing::{ImageBacking, ImageKey, SealedMemfd};
use shm_os::socket;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

const WIDTH: usize = 32;
const INNER: usize = 64;
const WORDS: [&str; 12] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "on", "a", "mat", "."];

fn write_model(folder: &Path) {
    let config = format!(
        r#"{{"model_type":"bert","hidden_size":{WIDTH},"num_hidden_layers":1,"num_attention_heads":2,
        "intermediate_size":{INNER},"hidden_act":"gelu","max_position_embeddings":64,"type_vocab_size":2,
        "vocab_size":{},"layer_norm_eps":1e-12,"pad_token_id":0}}"#,
        WORDS.len()
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let vocab: Vec<String> = WORDS.iter().enumerate().map(|(id, word)| format!("{word:?}:{id}")).collect();
    let special = |id: usize| format!(r#"{{"id":{0:?},"ids":[{id}],"tokens":[{0:?}]}}"#, WORDS[id]);
    let tokenizer = format!(
        r###"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
        "normalizer":{{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}},
        "pre_tokenizer":{{"type":"BertPreTokenizer"}},
        "post_processor":{{"type":"TemplateProcessing",
          "single":[{{"SpecialToken":{{"id":"[CLS]","type_id":0}}}},{{"Sequence":{{"id":"A","type_id":0}}}},{{"SpecialToken":{{"id":"[SEP]","type_id":0}}}}],
          "pair":[{{"Sequence":{{"id":"A","type_id":0}}}},{{"Sequence":{{"id":"B","type_id":1}}}}],
          "special_tokens":{{"[CLS]":{},"[SEP]":{}}}}},
        "decoder":null,
        "model":{{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{{{}}}}}}}"###,
        special(2),
        special(3),
        vocab.join(",")
    );
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![WORDS.len(), WIDTH]),
        ("embeddings.position_embeddings.weight".into(), vec![64, WIDTH]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, WIDTH]),
    ];
    let mut norm = |name: &str| {
        tensors.push((format!("{name}.LayerNorm.weight"), vec![WIDTH]));
        tensors.push((format!("{name}.LayerNorm.bias"), vec![WIDTH]));
    };
    norm("embeddings");
    norm("encoder.layer.0.attention.output");
    norm("encoder.layer.0.output");
    for (name, rows, columns) in [
        ("attention.self.query", WIDTH, WIDTH),
        ("attention.self.key", WIDTH, WIDTH),
        ("attention.self.value", WIDTH, WIDTH),
        ("attention.output.dense", WIDTH, WIDTH),
        ("intermediate.dense", INNER, WIDTH),
        ("output.dense", WIDTH, INNER),
    ] {
        tensors.push((format!("encoder.layer.0.{name}.weight"), vec![rows, columns]));
        tensors.push((format!("encoder.layer.0.{name}.bias"), vec![rows]));
    }
    let (mut header, mut data, mut noise) = (String::from("{"), Vec::new(), 1u32);
    for (name, shape) in &tensors {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            data.extend((((noise >> 8) as f32 / (1 << 24) as f32) - 0.4).to_le_bytes());
        }
        let separator = if start == 0 { "" } else { "," };
        write!(
            header,
            r#"{separator}"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
            data.len()
        )
        .unwrap();
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(data);
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

#[test]
fn a_compiled_model_is_served_as_it_computes_in_place() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let mut bytes = Vec::new();
    let options = CompileOptions { model_id: "test/small".into(), ..CompileOptions::default() };
    compile_folder(folder.path(), &options, &mut bytes, &mut |_| {}).unwrap();
    let mut writer = SealedMemfd.reserve(&ImageKey::new("small").unwrap(), bytes.len() as u64).unwrap();
    writer.window().copy_from_slice(&bytes);
    let image = writer.publish().unwrap();
    let here = Model::load(Arc::new(HeapImage::new(&bytes))).unwrap();

    let (ours, theirs) = socket::socketpair().unwrap();
    let engine = std::thread::spawn(move || {
        run(theirs, HostOptions { threads: 2, dumpable: true, ..HostOptions::default() })
    });
    let mut broker = Broker::new(ours);
    let load = |generation, image_bytes| ToEngine::LoadModel {
        generation,
        image_bytes,
        backing: BackingKind::SealedMemfd,
        cache: None,
    };
    // A size that is not the object's, then the truth.
    let fd = || image.fd_read_only.try_clone().unwrap();
    broker.send(&load(9, image.len_bytes + 1), vec![fd()]);
    let failed = broker.expect(|message| matches!(message, FromEngine::ModelFailed { generation: 9, .. }));
    assert!(matches!(failed, FromEngine::ModelFailed { code: Code::ModelLoadError, .. }), "{failed:?}");
    broker.send(&load(1, image.len_bytes), vec![fd()]);
    broker.expect(|message| *message == FromEngine::ModelReady { generation: 1 });

    let mut client = Client::new(1);
    broker.add_lane(&client, 1);
    let texts = ["the cat sat on a mat.", "", "Cats unknown", "the the the the the the the the the"];
    let expected = here.embed(&texts).unwrap();
    let ticket = client.embed(Priority::Interactive, &texts);
    let (code, payload) = client.answer(ticket);
    assert_eq!(code, Code::Ok, "{}", String::from_utf8_lossy(&payload));
    let rows = decode_embeddings(&payload, texts.len()).unwrap();
    assert_eq!(rows.fingerprint, here.info().fingerprint);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&rows.values), bits(&expected.values));
    for (text, row) in texts.iter().zip(expected.values.chunks(rows.dim)) {
        let ticket = client.embed(Priority::Bulk, &[text]);
        let alone = decode_embeddings(&client.answer(ticket).1, 1).unwrap();
        assert_eq!(bits(&alone.values), bits(row), "alone as in a batch: {text:?}");
    }
    broker.job(1, 0, Operation::Embed, &texts);
    assert_eq!(broker.answer(1), (Code::Ok, payload));
    let ticket = client.try_submit(Operation::Tokenize, Priority::Bulk, 0, &texts).unwrap();
    let spans = decode_token_spans(&client.answer(ticket).1, &texts).unwrap();
    for (text, spans) in texts.iter().zip(spans) {
        assert_eq!(spans, here.token_spans(text).unwrap());
    }
    broker.send(&ToEngine::Drain, vec![]);
    engine.join().unwrap().unwrap();
}
