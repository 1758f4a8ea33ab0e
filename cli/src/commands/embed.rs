//! `embed`: texts from arguments or stdin to vectors on stdout, in order, in bounded memory.

use crate::args::{EmbedArgs, InputFormat, OutputFormat};
use crate::failure::{Exit, Failure};
use serde_json::json;
use std::io::{self, BufRead, BufWriter, Read, Write};
use std::path::PathBuf;
use std::time::Duration;
use worker_sdk::{EmbedOptions, Embeddings, Model, Prompt};

/// Texts computed between two writes.
const TEXTS_AT_ONCE: usize = 1024;
/// Bytes of texts computed between two writes.
const BYTES_AT_ONCE: usize = 8 << 20;
/// Longest line that is read, in bytes: the longest text in JSON's widest escaping, and a little.
const MAX_LINE_BYTES: u64 = 6 * shm_layout::limits::MAX_TEXT_BYTES as u64 + 4096;

/// Computes the texts and prints their vectors.
pub(super) fn run(socket: Option<PathBuf>, args: EmbedArgs) -> Result<(), Failure> {
    let client = super::client(socket, "embed", None).connect()?;
    let model = super::lease(&client, &args.model, args.route)?;
    let from_stdin = args.texts.is_empty() || args.texts == ["-"];
    let timeout = Duration::from_secs(args.timeout);
    let prompt = match (args.prompt_name, args.prompt) {
        (Some(name), _) => Prompt::Named(name),
        (None, Some(text)) => Prompt::Text(text),
        (None, None) => Prompt::ModelDefault,
    };
    let options = EmbedOptions {
        dimensions: args.dimensions,
        ..EmbedOptions::bulk().timeout(timeout).bypass_cache(args.no_cache).prompt(prompt)
    };
    let mut out = Output::new(args.format);
    if from_stdin {
        let mut input = Lines::new(io::stdin().lock(), args.input);
        loop {
            let texts = input.next_batch()?;
            if texts.is_empty() {
                break;
            }
            out.write(&embed(&model, &texts, &options)?)?;
        }
    } else {
        for texts in args.texts.chunks(TEXTS_AT_ONCE) {
            out.write(&embed(&model, texts, &options)?)?;
        }
    }
    if out.count == 0 {
        return Err(Failure::new(
            Exit::Input,
            "there are no texts: give them as arguments or one a line on stdin",
        ));
    }
    out.finish()
}

fn embed(model: &Model, texts: &[String], options: &EmbedOptions) -> Result<Embeddings, Failure> {
    Ok(model.embed_with(texts, options)?)
}

/// Texts of a reader, one a line.
pub(super) struct Lines<R> {
    reader: R,
    format: InputFormat,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R, format: InputFormat) -> Lines<R> {
        Lines { reader, format, number: 0 }
    }

    /// The next texts, some thousand at most; none at the end.
    pub(super) fn next_batch(&mut self) -> Result<Vec<String>, Failure> {
        let (mut texts, mut held_bytes) = (Vec::new(), 0);
        while texts.len() < TEXTS_AT_ONCE && held_bytes < BYTES_AT_ONCE {
            let Some(text) = self.next_text()? else { break };
            held_bytes += text.len();
            texts.push(text);
        }
        Ok(texts)
    }

    fn next_text(&mut self) -> Result<Option<String>, Failure> {
        let mut line = Vec::new();
        if self.reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let bad = |what: String| Failure::new(Exit::Input, format!("line {}: {what}", self.number));
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        } else if line.len() as u64 == MAX_LINE_BYTES {
            return Err(bad(format!("longer than {MAX_LINE_BYTES} bytes; split it into passages")));
        }
        let line = String::from_utf8(line)
            .map_err(|e| bad(format!("not UTF-8 at its byte {}", e.utf8_error().valid_up_to())))?;
        match self.format {
            InputFormat::Lines => Ok(Some(line)),
            InputFormat::Jsonl => {
                #[derive(serde::Deserialize)]
                struct Row {
                    text: String,
                }
                let row: Row = serde_json::from_str(&line)
                    .map_err(|e| bad(format!("not an object like {{\"text\": \"…\"}}: {e}")))?;
                Ok(Some(row.text))
            }
        }
    }
}

/// A row of `jsonl`, in the order in which its fields are documented.
#[derive(serde::Serialize)]
struct Row<'a> {
    index: u64,
    embedding: &'a [f32],
    cached: bool,
}

/// Writes rows as they come; `npy` and `json` need the count first and hold what is small enough to be held.
struct Output {
    format: OutputFormat,
    out: BufWriter<io::Stdout>,
    count: u64,
    dim: usize,
    fingerprint: u64,
    held: Vec<f32>,
    held_cached: Vec<bool>,
}

impl Output {
    fn new(format: OutputFormat) -> Output {
        let out = BufWriter::new(io::stdout());
        Output { format, out, count: 0, dim: 0, fingerprint: 0, held: Vec::new(), held_cached: Vec::new() }
    }

    fn write(&mut self, embeddings: &Embeddings) -> Result<(), Failure> {
        if self.count > 0 && self.fingerprint != embeddings.fingerprint() {
            return Err(Failure::new(
                Exit::Model,
                "the model was replaced while the texts were computed; run again",
            ));
        }
        (self.dim, self.fingerprint) = (embeddings.dim(), embeddings.fingerprint());
        match self.format {
            OutputFormat::Jsonl => {
                for (row, cached) in embeddings.rows().zip(embeddings.cached()) {
                    let line = Row { index: self.count, embedding: row, cached: *cached };
                    serde_json::to_writer(&mut self.out, &line).map_err(io::Error::from)?;
                    self.out.write_all(b"\n")?;
                    self.count += 1;
                }
                // A reader that follows along sees each batch when it is done.
                self.out.flush()?;
            }
            OutputFormat::Json | OutputFormat::Npy => {
                self.held.extend_from_slice(embeddings.values());
                self.held_cached.extend_from_slice(embeddings.cached());
                self.count += embeddings.len() as u64;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Failure> {
        match self.format {
            OutputFormat::Jsonl => {}
            OutputFormat::Json => {
                let rows: Vec<&[f32]> = self.held.chunks_exact(self.dim).collect();
                let document = json!({
                    "dimension": self.dim,
                    "fingerprint": format!("{:016x}", self.fingerprint),
                    "embeddings": rows,
                    "cached": self.held_cached,
                });
                writeln!(self.out, "{document}")?;
            }
            OutputFormat::Npy => {
                self.out.write_all(&npy_head(self.count, self.dim))?;
                for value in &self.held {
                    self.out.write_all(&value.to_le_bytes())?;
                }
            }
        }
        Ok(self.out.flush()?)
    }
}

/// Head of a NumPy file, version 1.0, of a C-ordered float32 array (numpy/lib/format.py: padded to 64 bytes).
fn npy_head(rows: u64, dim: usize) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}");
    let unpadded = 10 + dict.len() + 1;
    dict.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    let mut head = b"\x93NUMPY\x01\x00".to_vec();
    head.extend_from_slice(&(dict.len() as u16).to_le_bytes());
    head.extend_from_slice(dict.as_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(input: &str, format: InputFormat) -> Result<Vec<String>, String> {
        let mut lines = Lines::new(input.as_bytes(), format);
        lines.next_batch().map_err(|f| f.message().unwrap_or_default().to_owned())
    }

    #[test]
    fn lines_and_objects_are_read_in_order() {
        assert_eq!(texts("a\n\r\nb\r\nc", InputFormat::Lines).unwrap(), ["a", "", "b", "c"]);
        assert_eq!(
            texts("{\"text\":\"a\\nb\"}\n{\"text\":\"\",\"id\":1}\n", InputFormat::Jsonl).unwrap(),
            ["a\nb", ""]
        );
        let error = texts("{\"text\":\"a\"}\n[1]\n", InputFormat::Jsonl).unwrap_err();
        assert!(error.contains("line 2"), "{error}");
        let mut lines = Lines::new(&b"ok\n\xff\n"[..], InputFormat::Lines);
        let error = lines.next_batch().unwrap_err();
        assert_eq!(error.exit(), Exit::Input);
        assert!(error.message().unwrap().contains("line 2: not UTF-8"));
    }

    #[test]
    fn the_head_of_an_array_is_padded() {
        let head = npy_head(3, 384);
        assert_eq!(head.len() % 64, 0);
        assert!(head.ends_with(b" \n"));
    }
}
