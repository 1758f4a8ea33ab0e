//! Computing in this process on an image that the broker passed: a small model made on the spot, compiled, sealed, leased.

#[path = "../peer/mod.rs"]
mod peer;

use engine::{CompileOptions, compile_folder};
use peer::{Image, Peer, eventually, place};
use shm_layout::image::HeapImage;
use shm_layout::image::Task;
use shm_layout::wire::{BackingKind, ModelDescription, TaskFacts};
use shm_os::memfd::{create_writable_image, reopen_read_only, seal_image};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use worker_sdk::SdkError;

const HIDDEN: usize = 16;
const INNER: usize = 32;
const WORDS: [&str; 12] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "##s", "on", "mat"];

/// A BERT of one layer with weights from a counter, as a Hugging Face style folder.
fn write_model(folder: &Path) {
    let config = format!(
        r#"{{"model_type":"bert","architectures":["BertModel"],"hidden_size":{HIDDEN},"num_attention_heads":2,
        "num_hidden_layers":1,"intermediate_size":{INNER},"vocab_size":{},"max_position_embeddings":32,
        "type_vocab_size":2,"hidden_act":"gelu","layer_norm_eps":1e-12,"pad_token_id":0}}"#,
        WORDS.len()
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let vocab: Vec<String> = WORDS.iter().enumerate().map(|(id, word)| format!("{word:?}:{id}")).collect();
    let special = |id: usize| {
        format!(
            r#"{{"id":{id},"content":{:?},"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#,
            WORDS[id]
        )
    };
    let added: Vec<String> = (0..5).map(special).collect();
    let tokenizer = format!(
        r###"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{}],
        "normalizer":{{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}},
        "pre_tokenizer":{{"type":"BertPreTokenizer"}},
        "post_processor":{{"type":"BertProcessing","sep":["[SEP]",3],"cls":["[CLS]",2]}},
        "decoder":null,
        "model":{{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,
        "vocab":{{{}}}}}}}"###,
        added.join(","),
        vocab.join(",")
    );
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![WORDS.len(), HIDDEN]),
        ("embeddings.position_embeddings.weight".into(), vec![32, HIDDEN]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, HIDDEN]),
    ];
    let mut layer = |name: &str, shape: Vec<usize>| {
        tensors.push((format!("{name}.bias"), vec![shape[0]]));
        tensors.push((format!("{name}.weight"), shape));
    };
    layer("embeddings.LayerNorm", vec![HIDDEN]);
    for part in ["query", "key", "value"] {
        layer(&format!("encoder.layer.0.attention.self.{part}"), vec![HIDDEN, HIDDEN]);
    }
    layer("encoder.layer.0.attention.output.dense", vec![HIDDEN, HIDDEN]);
    layer("encoder.layer.0.attention.output.LayerNorm", vec![HIDDEN]);
    layer("encoder.layer.0.intermediate.dense", vec![INNER, HIDDEN]);
    layer("encoder.layer.0.output.dense", vec![HIDDEN, INNER]);
    layer("encoder.layer.0.output.LayerNorm", vec![HIDDEN]);
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (number, (name, shape)) in tensors.iter().enumerate() {
        let start = data.len();
        for i in 0..shape.iter().product::<usize>() {
            let wobble = ((i * 7919 + number * 104_729) % 1000) as f32 / 1000.0 - 0.5;
            let value = if name.ends_with("LayerNorm.weight") { 1.0 + 0.1 * wobble } else { 0.3 * wobble };
            data.extend_from_slice(&value.to_le_bytes());
        }
        header.push(format!(
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    let header = format!("{{{}}}", header.join(","));
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&data).unwrap();
}

/// The compiled model's bytes, and the same as a broker passes them.
fn image(seal: bool) -> (Vec<u8>, Image) {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let mut bytes = Vec::new();
    let options = CompileOptions { model_id: "tiny".into(), ..Default::default() };
    let summary = compile_folder(folder.path(), &options, &mut bytes, &mut |_| {}).unwrap();
    let mut object = File::from(create_writable_image(bytes.len() as u64).unwrap());
    object.write_all(&bytes).unwrap();
    if seal {
        seal_image(object.as_fd()).unwrap();
    }
    let description = ModelDescription {
        model_id: "tiny".into(),
        generation: 1,
        output_dim: summary.output_dim,
        max_seq_tokens: summary.max_seq_tokens,
        image_bytes: bytes.len() as u64,
        fingerprint: 1,
        content_hash: summary.content_hash,
        backing: BackingKind::SealedMemfd,
        facts: TaskFacts::of(Task::Embed),
    };
    (bytes, Image { fd: reopen_read_only(object.as_fd()).unwrap(), description })
}

fn peer_with(image: Image) -> (tempfile::TempDir, Peer) {
    let (folder, socket) = place();
    let peer = Peer::start(&socket);
    *peer.behaviour.image.lock().unwrap() = Some(image);
    (folder, peer)
}

#[test]
fn an_attached_worker_computes_on_the_shared_pages() {
    let (bytes, image) = image(true);
    let (_folder, peer) = peer_with(image);
    let client = peer.client();
    let mappings = shm_os::live_mappings();
    let attached = client.model("tiny").unwrap().attach().unwrap();
    attached.warm().unwrap();
    let texts: Vec<String> =
        (0..300).map(|i| ["a cat sat", "dogs on a mat", "", "unknown words"][i % 4].into()).collect();
    let rows = attached.embed(&texts).unwrap();
    assert_eq!((rows.len(), rows.dim(), rows.fingerprint()), (300, HIDDEN, attached.fingerprint()));
    let alone = engine::Model::load(Arc::new(HeapImage::new(&bytes))).unwrap();
    for (text, row) in texts.iter().zip(&rows) {
        assert_eq!(row, alone.embed(&[text]).unwrap().values);
    }
    assert!(attached.embed::<&str>(&[]).unwrap().is_empty());
    assert_eq!(attached.token_spans(&["a cats"]).unwrap(), [vec![0..1, 2..5, 5..6]]);
    assert_eq!((attached.image_bytes(), attached.description().model_id.as_str()), (bytes.len(), "tiny"));
    // It needs no broker; the last handle gives everything back.
    let releases = peer.behaviour.releases.load(SeqCst);
    let copy = attached.clone();
    drop(attached);
    assert_eq!(copy.embed(&texts[..2]).unwrap().values(), &rows.values()[..2 * HIDDEN]);
    drop(copy);
    eventually("the release", || peer.behaviour.releases.load(SeqCst) == releases + 1);
    eventually("the end of all mappings", || shm_os::live_mappings() <= mappings);
}

#[test]
fn it_goes_on_when_the_broker_is_gone() {
    let (_, image) = image(true);
    let (_folder, peer) = peer_with(image);
    let attached = peer.client().model("tiny").unwrap().attach().unwrap();
    peer.kill();
    assert_eq!(attached.embed(&["a cat", "a dog"]).unwrap().len(), 2);
}

#[test]
fn images_that_are_not_as_announced_are_refused() {
    let (_, unsealed) = image(false);
    let (_folder, peer) = peer_with(unsealed);
    let model = peer.client().model("tiny").unwrap();
    let attach = || model.attach().unwrap_err();
    assert!(matches!(attach(), SdkError::Fault { .. }), "writable by somebody");
    let put = |change: fn(&mut ModelDescription)| {
        let (_, mut image) = image(true);
        change(&mut image.description);
        *peer.behaviour.image.lock().unwrap() = Some(image);
    };
    put(|description| description.image_bytes += 4096);
    assert!(matches!(attach(), SdkError::Fault { .. }), "another size");
    put(|description| description.content_hash[0] ^= 1);
    assert!(matches!(attach(), SdkError::Fault { .. }), "another content");
    put(|description| description.output_dim += 1);
    assert!(matches!(attach(), SdkError::Fault { .. }), "another dimension");
    *peer.behaviour.image.lock().unwrap() = None;
    assert!(matches!(attach(), SdkError::Fault { .. }), "no image at all");
    put(|_| {});
    assert_eq!(model.attach().unwrap().embed(&["a cat"]).unwrap().len(), 1);
}
