//! GGUF files, foreign: their header with every count, length, offset and type bounded, as a checkpoint whose tensors have the names
//! that transformers gives them. What the metadata says of model and tokenizer is turned into files elsewhere (`gguf_files`).

use super::checkpoint::{Checkpoint, SourceTensor};
use super::error::CompileError;
use super::folder::SourceFile;
use crate::json::shorten;
use std::collections::BTreeMap;

/// Longest header with metadata and tensor list, bytes. That of a model with 150 000 tokens has 6 MB.
const MAX_HEADER_BYTES: usize = 64 << 20;
/// Bytes of a file that are looked at first; four times as many when the header is longer.
const FIRST_LOOK_BYTES: usize = 4 << 20;
/// Most metadata entries.
const MAX_METADATA: u64 = 4096;
/// Most tensors.
const MAX_FILE_TENSORS: u64 = 16_384;
/// Longest key or tensor name, bytes.
const MAX_KEY_BYTES: u64 = 256;
/// Longest text among the metadata, bytes.
const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Most entries of a list.
const MAX_LIST: u64 = 1_000_000;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// Largest single dimension.
const MAX_DIMENSION: u64 = 1 << 31;
/// Largest alignment of tensors, bytes.
const MAX_ALIGNMENT: u64 = 1 << 16;
/// Alignment when none is named.
const DEFAULT_ALIGNMENT: u64 = 32;

/// One value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Meta {
    Integer(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
    /// A list of what nobody needs.
    Other,
}

/// What a header says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Meta>,
    pub(crate) tensors: BTreeMap<String, SourceTensor>,
}

/// Why a header can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It goes on behind the bytes that were looked at.
    Longer,
    /// It is wrong.
    Wrong(String),
}

/// Name, numbers in a block and bytes of a block of the tensor types that files may have.
fn tensor_type(number: u32) -> Option<(&'static str, u64, u64)> {
    Some(match number {
        0 => ("F32", 1, 4),
        1 => ("F16", 1, 2),
        2 => ("Q4_0", 32, 18),
        3 => ("Q4_1", 32, 20),
        6 => ("Q5_0", 32, 22),
        7 => ("Q5_1", 32, 24),
        8 => ("Q8_0", 32, 34),
        9 => ("Q8_1", 32, 36),
        10 => ("Q2_K", 256, 84),
        11 => ("Q3_K", 256, 110),
        12 => ("Q4_K", 256, 144),
        13 => ("Q5_K", 256, 176),
        14 => ("Q6_K", 256, 210),
        15 => ("Q8_K", 256, 292),
        30 => ("BF16", 1, 2),
        _ => return None,
    })
}

/// Types that can be computed with.
const SUPPORTED: [&str; 7] = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"];

fn wrong<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Wrong(reason.into()))
}

/// Reads from the first bytes of a file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Whether the file goes on behind them.
    has_more: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], Fault> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count));
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(bytes) => {
                self.at += bytes.len();
                Ok(bytes)
            }
            None if self.has_more => Err(Fault::Longer),
            None => wrong("the file ends inside its header"),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str, max_bytes: u64) -> Result<&'a str, Fault> {
        let len = self.u64()?;
        if len > max_bytes {
            return wrong(format!("{what} has {len} bytes, at most {max_bytes} are read"));
        }
        std::str::from_utf8(self.take(len)?).or_else(|_| wrong(format!("{what} is not UTF-8")))
    }

    /// A number or flag of this type; texts and lists are not.
    fn scalar(&mut self, kind: u32) -> Result<Option<Meta>, Fault> {
        Ok(Some(match kind {
            0 => Meta::Integer(i128::from(self.array::<1>()?[0])),
            1 => Meta::Integer(i128::from(i8::from_le_bytes(self.array()?))),
            2 => Meta::Integer(i128::from(u16::from_le_bytes(self.array()?))),
            3 => Meta::Integer(i128::from(i16::from_le_bytes(self.array()?))),
            4 => Meta::Integer(i128::from(self.u32()?)),
            5 => Meta::Integer(i128::from(i32::from_le_bytes(self.array()?))),
            6 => Meta::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Meta::Flag(self.array::<1>()?[0] != 0),
            10 => Meta::Integer(i128::from(self.u64()?)),
            11 => Meta::Integer(i128::from(i64::from_le_bytes(self.array()?))),
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            _ => return Ok(None),
        }))
    }

    fn value(&mut self, key: &str) -> Result<Meta, Fault> {
        let kind = self.u32()?;
        if let Some(value) = self.scalar(kind)? {
            return Ok(value);
        }
        match kind {
            8 => self.text(key, MAX_TEXT_BYTES).map(|text| Meta::Text(text.to_owned())),
            9 => self.list(key),
            _ => wrong(format!("{key} has the unknown type {kind}")),
        }
    }

    fn list(&mut self, key: &str) -> Result<Meta, Fault> {
        let (kind, len) = (self.u32()?, self.u64()?);
        if len > MAX_LIST {
            return wrong(format!("{key} is a list of {len}, at most {MAX_LIST} are read"));
        }
        match kind {
            8 => {
                let texts = (0..len).map(|_| self.text(key, MAX_TEXT_BYTES).map(str::to_owned));
                texts.collect::<Result<_, _>>().map(Meta::Texts)
            }
            6 => {
                let floats = (0..len).map(|_| self.array().map(f32::from_le_bytes));
                floats.collect::<Result<_, _>>().map(Meta::Floats)
            }
            0..=5 | 10 | 11 => {
                let mut list = Vec::new();
                for _ in 0..len {
                    if let Some(Meta::Integer(number)) = self.scalar(kind)? {
                        list.push(i64::try_from(number).unwrap_or(i64::MAX));
                    }
                }
                Ok(Meta::Integers(list))
            }
            7 | 12 => {
                for _ in 0..len {
                    self.scalar(kind)?;
                }
                Ok(Meta::Other)
            }
            _ => wrong(format!("{key} is a list of the unsupported type {kind}")),
        }
    }
}

/// Parses the header at the beginning of `bytes`, the first ones of a file of `file_bytes`. Tensors keep the file's names, shapes are
/// outermost first.
///
/// # Errors
/// [`Fault::Longer`] when the header goes on behind `bytes` and the file has more, else what is wrong.
pub(crate) fn parse(bytes: &[u8], file_bytes: u64) -> Result<Header, Fault> {
    let mut reader = Reader { bytes, at: 0, has_more: (bytes.len() as u64) < file_bytes };
    if &reader.array::<4>()? != b"GGUF" {
        return wrong("is not a GGUF file");
    }
    let version = reader.u32()?;
    if !matches!(version, 2 | 3) {
        return wrong(format!("has version {version}, 2 and 3 are read"));
    }
    let (tensor_count, metadata_count) = (reader.u64()?, reader.u64()?);
    if tensor_count > MAX_FILE_TENSORS || metadata_count > MAX_METADATA {
        return wrong(format!(
            "says it has {tensor_count} tensors and {metadata_count} metadata entries, at most {MAX_FILE_TENSORS} and \
             {MAX_METADATA} are read"
        ));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.text("a key", MAX_KEY_BYTES)?;
        let value = reader.value(&shorten(key))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return wrong(format!("key {:?} appears twice", shorten(key)));
        }
    }
    let mut found = Vec::new();
    for _ in 0..tensor_count {
        found.push(tensor(&mut reader)?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Meta::Integer(number)) => u64::try_from(*number).unwrap_or(0),
        Some(_) => 0,
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return wrong(format!("general.alignment must be a power of two up to {MAX_ALIGNMENT}"));
    }
    let data = (reader.at as u64).next_multiple_of(alignment);
    place(found, data, alignment, file_bytes).map(|tensors| Header { metadata, tensors })
}

/// Name, place in the data, and length of one tensor.
type Found = (String, SourceTensor, u64);

fn tensor(reader: &mut Reader<'_>) -> Result<Found, Fault> {
    let name = reader.text("a tensor's name", MAX_KEY_BYTES)?;
    let shown = shorten(name);
    let dimensions = reader.u32()?;
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        return wrong(format!(
            "tensor {shown:?} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are read"
        ));
    }
    let mut shape = (0..dimensions).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
    if shape.iter().any(|size| *size == 0 || *size > MAX_DIMENSION) {
        return wrong(format!("tensor {shown:?} has an absurd shape"));
    }
    let (number, offset) = (reader.u32()?, reader.u64()?);
    let Some((dtype, elements, bytes)) = tensor_type(number) else {
        return wrong(format!("tensor {shown:?} has the unknown type {number}"));
    };
    let count = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
    // The innermost dimension comes first in the file; blocks run along it.
    let len = count
        .filter(|_| shape[0].is_multiple_of(elements))
        .and_then(|count| (count / elements).checked_mul(bytes));
    let Some(len) = len else {
        return wrong(format!("tensor {shown:?} of shape {shape:?} is no whole number of {dtype} blocks"));
    };
    shape.reverse();
    Ok((name.to_owned(), SourceTensor { file: 0, dtype: dtype.to_owned(), shape, offset }, len))
}

/// Checks that tensors lie in the file, aligned and apart, and gives them with their offsets in the file.
fn place(
    mut found: Vec<Found>,
    data: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, SourceTensor>, Fault> {
    found.sort_by_key(|(_, tensor, _)| tensor.offset);
    let mut tensors = BTreeMap::new();
    let mut end = 0;
    for (name, mut tensor, len) in found {
        let shown = shorten(&name);
        if !tensor.offset.is_multiple_of(alignment) || tensor.offset < end {
            return wrong(format!("tensor {shown:?} is not aligned or overlaps another"));
        }
        let last = tensor.offset.checked_add(len);
        match last.and_then(|last| last.checked_add(data)) {
            Some(place) if place <= file_bytes => {}
            _ => return wrong(format!("tensor {shown:?} lies outside the file of {file_bytes} bytes")),
        }
        end = tensor.offset + len;
        tensor.offset += data;
        if tensors.insert(name, tensor).is_some() {
            return wrong(format!("tensor {shown:?} appears twice"));
        }
    }
    Ok(tensors)
}

/// Reads the header of a file.
pub(crate) fn read(file: &SourceFile) -> Result<Header, CompileError> {
    let bad = |reason: String| CompileError::File { name: file.name().to_owned(), reason };
    let mut look = FIRST_LOOK_BYTES;
    loop {
        let mut bytes = vec![0; (look as u64).min(file.len_bytes()) as usize];
        file.read_at(&mut bytes, 0)?;
        match parse(&bytes, file.len_bytes()) {
            Ok(header) => return Ok(header),
            Err(Fault::Wrong(reason)) => return Err(bad(reason)),
            Err(Fault::Longer) if look < MAX_HEADER_BYTES => look *= 4,
            Err(Fault::Longer) => return Err(bad(format!("header has more than {MAX_HEADER_BYTES} bytes"))),
        }
    }
}

/// The name that transformers gives a tensor of a GGUF file.
fn renamed(name: &str) -> String {
    let plain = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output.weight" => "lm_head.weight",
        "output_norm.weight" => "model.norm.weight",
        _ => "",
    };
    if !plain.is_empty() {
        return plain.to_owned();
    }
    let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = parts else { return name.to_owned() };
    let part = match part {
        "attn_norm.weight" => "input_layernorm.weight",
        "attn_q.weight" => "self_attn.q_proj.weight",
        "attn_k.weight" => "self_attn.k_proj.weight",
        "attn_v.weight" => "self_attn.v_proj.weight",
        "attn_output.weight" => "self_attn.o_proj.weight",
        "attn_q_norm.weight" => "self_attn.q_norm.weight",
        "attn_k_norm.weight" => "self_attn.k_norm.weight",
        "ffn_norm.weight" => "post_attention_layernorm.weight",
        "ffn_gate.weight" => "mlp.gate_proj.weight",
        "ffn_up.weight" => "mlp.up_proj.weight",
        "ffn_down.weight" => "mlp.down_proj.weight",
        _ => return name.to_owned(),
    };
    format!("model.layers.{layer}.{part}")
}

/// The tensors of a header as those of a checkpoint in `file`, under the names that transformers gives them.
///
/// # Errors
/// [`CompileError::File`] naming a tensor of a type that is not supported.
pub(crate) fn checkpoint(file: SourceFile, header: &Header) -> Result<Checkpoint, CompileError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &header.tensors {
        if !SUPPORTED.contains(&tensor.dtype.as_str()) {
            let supported = SUPPORTED.join(", ");
            return Err(CompileError::File {
                name: file.name().to_owned(),
                reason: format!(
                    "tensor {:?} has type {}, supported are {supported}",
                    shorten(name),
                    tensor.dtype
                ),
            });
        }
        tensors.insert(renamed(name), tensor.clone());
    }
    Ok(Checkpoint { files: vec![file], tensors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// A header with a text, a list and one tensor, and its data.
    fn good() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(1u64.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        text(&mut out, "general.architecture");
        out.extend(8u32.to_le_bytes());
        text(&mut out, "llama");
        text(&mut out, "list");
        out.extend(9u32.to_le_bytes());
        out.extend(5u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        out.extend([1, 0, 0, 0, 255, 255, 255, 255]);
        text(&mut out, "blk.3.attn_q.weight");
        out.extend(2u32.to_le_bytes());
        out.extend(64u64.to_le_bytes());
        out.extend(3u64.to_le_bytes());
        out.extend(8u32.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.resize(out.len().next_multiple_of(32) + 3 * 68, 7);
        out
    }

    #[test]
    fn a_good_header_is_read() {
        let bytes = good();
        let header = parse(&bytes, bytes.len() as u64).expect("good");
        assert_eq!(header.metadata["general.architecture"], Meta::Text("llama".into()));
        assert_eq!(header.metadata["list"], Meta::Integers(vec![1, -1]));
        let tensor = &header.tensors["blk.3.attn_q.weight"];
        assert_eq!((tensor.dtype.as_str(), &tensor.shape[..]), ("Q8_0", &[3, 64][..]));
        assert_eq!(tensor.offset as usize, bytes.len() - 3 * 68);
        assert_eq!(renamed("blk.3.attn_q.weight"), "model.layers.3.self_attn.q_proj.weight");
        assert_eq!(parse(&bytes[..50], bytes.len() as u64), Err(Fault::Longer));
        assert!(matches!(parse(&bytes[..50], 50), Err(Fault::Wrong(_))));
    }

    #[test]
    fn lies_are_named() {
        let bytes = good();
        let spoiled = |at: usize, with: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + with.len()].copy_from_slice(with);
            match parse(&bytes, bytes.len() as u64) {
                Err(Fault::Wrong(reason)) => reason,
                other => panic!("accepted: {other:?}"),
            }
        };
        assert!(spoiled(0, b"GGML").contains("not a GGUF"));
        assert!(spoiled(4, &9u32.to_le_bytes()).contains("version"));
        assert!(spoiled(8, &u64::MAX.to_le_bytes()).contains("tensors"));
        assert!(spoiled(16, &u64::MAX.to_le_bytes()).contains("metadata"));
        assert!(spoiled(24, &u64::MAX.to_le_bytes()).contains("key"));
        // The tensor's numbers: dimensions, sizes, type, offset.
        let at = bytes.windows(6).position(|window| window == b"weight").expect("there") + 6;
        assert!(spoiled(at, &9u32.to_le_bytes()).contains("dimensions"));
        assert!(spoiled(at + 4, &0u64.to_le_bytes()).contains("absurd"));
        assert!(spoiled(at + 4, &65u64.to_le_bytes()).contains("whole"));
        assert!(spoiled(at + 12, &(1u64 << 30).to_le_bytes()).contains("outside"));
        assert!(spoiled(at + 20, &99u32.to_le_bytes()).contains("unknown type"));
        assert!(spoiled(at + 24, &7u64.to_le_bytes()).contains("aligned"));
        assert!(spoiled(at + 24, &(u64::MAX - 31).to_le_bytes()).contains("outside"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn noise_and_changed_bytes_never_panic(noise in prop::collection::vec(any::<u8>(), 0..256), at in any::<usize>(), byte in any::<u8>(), len in any::<u64>()) {
            let _ = parse(&noise, len);
            let mut bytes = good();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(header) = parse(&bytes, bytes.len() as u64) {
                for tensor in header.tensors.values() {
                    prop_assert!(tensor.offset <= bytes.len() as u64);
                }
            }
        }
    }
}
