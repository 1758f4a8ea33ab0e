//! What is compared: ways of ours and engines in Python processes, each from texts to vectors on its own clock. When each
//! has its turn, and what is made of the figures, is not known here.

use super::sets::Set;
use crate::infinity::Connection;
use crate::worker::Worker;
use crate::{fixture, python};
use anyhow::{Context, bail, ensure};
use engine::compile::Precision;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use worker_sdk::{AttachedModel, Model};

/// Components of a vector, at most: more is no answer of an encoder.
const MAX_DIM: usize = 1 << 14;

/// Engines in Python processes with the precisions that each is measured in.
pub(crate) const PEERS: [(&str, Precision); 8] = [
    (ST, Precision::F32),
    (ST, Precision::Bf16),
    (ORT, Precision::F32),
    (ORT, Precision::Int8),
    (OPENVINO, Precision::F32),
    (OPENVINO, Precision::Bf16),
    (OPENVINO, Precision::Int8),
    (FASTEMBED, Precision::F32),
];
/// This project's engine.
pub(crate) const OURS: &str = "modelbroker";
/// sentence-transformers, in f32 the reference of all vectors.
pub(crate) const ST: &str = "sentence-transformers";
/// ONNX Runtime.
pub(crate) const ORT: &str = "onnxruntime";
/// OpenVINO.
pub(crate) const OPENVINO: &str = "openvino";
/// fastembed, which runs ONNX Runtime.
pub(crate) const FASTEMBED: &str = "fastembed";
/// The server infinity.
pub(crate) const INFINITY: &str = "infinity";
/// Stock candle.
pub(crate) const CANDLE: &str = "candle";

/// Vectors of one length.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Vectors {
    /// Components of each.
    pub(crate) dim: usize,
    /// All, one after the other.
    pub(crate) values: Vec<f32>,
}

impl Vectors {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.values.len().checked_div(self.dim).unwrap_or(0)
    }

    /// The first `count` of them, or all if there are fewer.
    pub(crate) fn first(&self, count: usize) -> Vectors {
        let end = (count * self.dim).min(self.values.len());
        Vectors { dim: self.dim, values: self.values[..end].to_vec() }
    }
}

/// A way of getting vectors.
#[derive(Debug)]
pub(crate) enum Way {
    /// Computed by the engine of a broker, by the route that the model has.
    Broker(Model),
    /// Computed in this process on the attached model.
    Attached(AttachedModel),
    /// Computed by a process of the list.
    Process(usize),
    /// Computed by a server, asked over HTTP.
    Http(Connection),
}

/// One way with its name.
#[derive(Debug)]
pub(crate) struct Contender {
    /// The engine.
    pub(crate) engine: &'static str,
    /// What it computes in.
    pub(crate) precision: Precision,
    /// How it is reached or set.
    pub(crate) route: String,
    /// The CPU path that it is kept to.
    pub(crate) cpu_path: Option<String>,
    /// It is measured on this set only.
    pub(crate) only: Option<Set>,
    /// How to ask it.
    pub(crate) way: Way,
}

impl Contender {
    /// Whether it is measured on a set.
    pub(crate) fn takes(&self, set: Set) -> bool {
        self.only.is_none_or(|only| only == set)
    }

    /// Its name in messages.
    pub(crate) fn name(&self) -> String {
        format!("{} {} {}", self.engine, self.precision.name(), self.route)
    }

    /// One that cannot be asked, for tests of what is made of figures.
    #[cfg(test)]
    pub(crate) fn unmeasurable(engine: &'static str, precision: Precision, route: &str) -> Contender {
        let way = Way::Process(usize::MAX);
        Contender { engine, precision, route: route.into(), cpu_path: None, only: None, way }
    }

    /// Seconds for all texts at once, and their vectors.
    ///
    /// # Errors
    /// When they cannot be computed.
    pub(crate) fn batch(&self, processes: &mut [Peer], texts: &[String]) -> anyhow::Result<(f64, Vectors)> {
        let start = Instant::now();
        let embeddings = match &self.way {
            Way::Broker(model) => model.embed_with(texts, &fixture::bulk_options())?,
            Way::Attached(model) => model.embed(texts)?,
            Way::Process(number) => return process(processes, *number)?.batch(&self.route, texts),
            Way::Http(connection) => {
                let vectors = connection.embed(texts)?;
                return Ok((start.elapsed().as_secs_f64(), vectors));
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        Ok((seconds, Vectors { dim: embeddings.dim(), values: embeddings.into_values() }))
    }

    /// Seconds for each text, one after the other.
    ///
    /// # Errors
    /// When one cannot be computed.
    pub(crate) fn singles(&self, processes: &mut [Peer], texts: &[String]) -> anyhow::Result<Vec<f64>> {
        if let Way::Process(number) = &self.way {
            return process(processes, *number)?.singles(&self.route, texts);
        }
        let mut seconds = Vec::with_capacity(texts.len());
        for text in texts.chunks(1) {
            let start = Instant::now();
            let count = match &self.way {
                Way::Broker(model) => model.embed_with(text, &fixture::single_options())?.len(),
                Way::Attached(model) => model.embed(text)?.len(),
                Way::Http(connection) => connection.embed(text)?.len(),
                Way::Process(_) => bail!("a process was asked twice"),
            };
            seconds.push(start.elapsed().as_secs_f64());
            ensure!(count == 1, "{count} vectors for one text");
        }
        Ok(seconds)
    }
}

fn process(processes: &mut [Peer], number: usize) -> anyhow::Result<&mut Peer> {
    processes.get_mut(number).context("no such peer")
}

/// What the other engines load, made once from the model's folder.
#[derive(Debug, Deserialize)]
pub(crate) struct Made {
    folder: PathBuf,
    /// What could not be made, and why.
    pub(crate) errors: std::collections::BTreeMap<String, String>,
}

/// Makes what the other engines load, if it is not there. `calibration` are texts like those that will be embedded.
///
/// # Errors
/// When the script cannot be run.
pub(crate) fn make(python: &Path, model: &str, cache: &Path, calibration: &[String]) -> anyhow::Result<Made> {
    let mut texts = tempfile::NamedTempFile::new().context("making a file for the calibration")?;
    serde_json::to_writer(&mut texts, calibration)?;
    texts.flush()?;
    let cache = cache.to_str().context("the cache folder's name is not UTF-8")?;
    let listed = texts.path().to_str().context("the temporary folder's name is not UTF-8")?;
    let mut script = python::start(python, "peer_models.py", &[model, cache, listed], 1)?;
    serde_json::from_str(&script.line()?).context("what peer_models.py says")
}

/// What a peer says first.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Hello {
    Ready { routes: Vec<String>, versions: String },
    Unavailable { unavailable: String },
}

/// An engine in a process of its own.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The engine.
    pub(crate) engine: &'static str,
    /// What it computes in.
    pub(crate) precision: Precision,
    process: Worker,
}

impl Peer {
    /// Starts it; it gets ready beside others.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn start(
        python: &Path,
        (engine, precision): (&'static str, Precision),
        model: &str,
        made: &Made,
        threads: usize,
    ) -> anyhow::Result<Peer> {
        let made = made.folder.to_str().context("the cache folder's name is not UTF-8")?;
        let arguments = [engine, precision.name(), model, made, &threads.to_string()];
        let process = python::start(python, "peer_serve.py", &arguments, threads)?;
        Ok(Peer::of(engine, precision, process))
    }

    /// An engine in a process that speaks as `peer_serve.py` does.
    pub(crate) fn of(engine: &'static str, precision: Precision, process: Worker) -> Peer {
        Peer { engine, precision, process }
    }

    /// Waits until it is ready: its routes and its versions.
    ///
    /// # Errors
    /// Says why it cannot be measured.
    pub(crate) fn ready(&mut self) -> anyhow::Result<(Vec<String>, String)> {
        let line = self.process.line().context("it ended before it was ready")?;
        match serde_json::from_str(&line).context("what peer_serve.py says first")? {
            Hello::Ready { routes, versions } => Ok((routes, versions)),
            Hello::Unavailable { unavailable } => bail!(unavailable),
        }
    }

    fn ask(&mut self, route: &str, single: bool, texts: &[String]) -> anyhow::Result<Value> {
        let orders = self.process.orders()?;
        serde_json::to_writer(&mut *orders, &json!({"route": route, "single": single, "texts": texts}))?;
        orders.write_all(b"\n")?;
        orders.flush()?;
        let line = self.process.line().with_context(|| format!("{} ended", self.engine))?;
        serde_json::from_str(&line).context("what peer_serve.py says")
    }

    fn batch(&mut self, route: &str, texts: &[String]) -> anyhow::Result<(f64, Vectors)> {
        #[derive(Deserialize)]
        struct Said {
            seconds: f64,
            dim: usize,
            vectors: String,
        }
        let said: Said = serde_json::from_value(self.ask(route, false, texts)?)?;
        let values = floats(&said.vectors).context("vectors that are not hexadecimal floats")?;
        ensure!((1..=MAX_DIM).contains(&said.dim), "vectors of {} components", said.dim);
        ensure!(
            values.len() == said.dim * texts.len(),
            "{} gave {} floats for {} texts",
            self.engine,
            values.len(),
            texts.len()
        );
        Ok((said.seconds, Vectors { dim: said.dim, values }))
    }

    fn singles(&mut self, route: &str, texts: &[String]) -> anyhow::Result<Vec<f64>> {
        let mut said = self.ask(route, true, texts)?;
        let seconds: Vec<f64> = serde_json::from_value(said["seconds"].take())?;
        ensure!(seconds.len() == texts.len(), "{} times for {} texts", seconds.len(), texts.len());
        Ok(seconds)
    }
}

/// Little-endian f32 from hexadecimal digits; `None` when they are something else.
fn floats(digits: &str) -> Option<Vec<f32>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (whole, rest) = digits.as_bytes().as_chunks::<8>();
    let float = |digits: &[u8; 8]| {
        let mut bytes = [0; 4];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
        }
        Some(f32::from_le_bytes(bytes))
    };
    rest.is_empty().then(|| whole.iter().map(float).collect()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_read_from_hexadecimal_digits() {
        assert_eq!(floats("0000803f000000C0").unwrap(), [1.0, -2.0]);
        assert_eq!(floats("").unwrap(), Vec::<f32>::new());
        assert!(floats("0000803").is_none());
        assert!(floats("0000803g").is_none());
        assert!(floats("+000803f").is_none());
    }

    #[test]
    fn vectors_are_counted_and_cut() {
        let vectors = Vectors { dim: 2, values: vec![1.0, 2.0, 3.0, 4.0] };
        assert_eq!((vectors.len(), Vectors::default().len()), (2, 0));
        assert_eq!(vectors.first(1).values, [1.0, 2.0]);
        assert_eq!(vectors.first(9), vectors);
    }

    #[test]
    fn a_peer_says_its_routes_or_why_it_is_not_there() {
        let ready = r#"{"routes": ["a", "b"], "versions": "x 1"}"#;
        assert!(
            matches!(serde_json::from_str(ready).unwrap(), Hello::Ready { routes, .. } if routes.len() == 2)
        );
        let missing = serde_json::from_str(r#"{"unavailable": "no module"}"#).unwrap();
        assert!(matches!(missing, Hello::Unavailable { unavailable } if unavailable == "no module"));
        assert!(serde_json::from_str::<Hello>("{}").is_err());
    }
}
