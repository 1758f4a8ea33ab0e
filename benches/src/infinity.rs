//! The server infinity as a peer: started in an environment of its own beside the other peers', asked over HTTP. What is
//! measured with it is the benches' affair.

use crate::peers::Vectors;
use crate::python;
use crate::worker::Worker;
use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long one answer may take.
const ANSWERS_WITHIN: Duration = Duration::from_secs(120);
/// Bytes of an answer, at most: a few thousand vectors as decimal numbers.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// The Python of infinity's environment, which lies in that of the other peers; `None` when it is not there.
pub(crate) fn python(peers: &Path) -> Option<PathBuf> {
    let own = peers.parent()?.parent()?.join("infinity/bin/python");
    own.exists().then_some(own)
}

/// What the server says first.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Hello {
    Ready { port: u16, versions: String },
    Unavailable { unavailable: String },
}

/// A server; ends when dropped.
#[derive(Debug)]
pub(crate) struct Infinity {
    // Ends the server when dropped.
    _process: Worker,
    url: String,
    /// Of what it consists.
    pub(crate) versions: String,
}

impl Infinity {
    /// Starts the server on a model and waits until it answers.
    ///
    /// # Errors
    /// Says why it does not.
    pub(crate) fn start(python: &Path, model: &str, threads: usize) -> anyhow::Result<Infinity> {
        let mut process =
            python::start(python, "infinity_serve.py", &[model, &threads.to_string()], threads)?;
        let line = process.line().context("it ended before it answered")?;
        let (port, versions) = match serde_json::from_str(&line).context("what infinity_serve.py says")? {
            Hello::Ready { port, versions } => (port, versions),
            Hello::Unavailable { unavailable } => bail!(unavailable),
        };
        let infinity =
            Infinity { _process: process, url: format!("http://127.0.0.1:{port}/embeddings"), versions };
        infinity.connect().embed(&["ready when this text has a vector"])?;
        Ok(infinity)
    }

    /// A client with a connection of its own.
    pub(crate) fn connect(&self) -> Connection {
        let config = ureq::Agent::config_builder().timeout_global(Some(ANSWERS_WITHIN)).build();
        Connection { agent: config.into(), url: self.url.clone() }
    }
}

/// A connection, kept open from one call to the next.
#[derive(Debug)]
pub(crate) struct Connection {
    agent: ureq::Agent,
    url: String,
}

#[derive(Debug, Deserialize)]
struct Answer {
    data: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    index: usize,
    embedding: Vec<f32>,
}

impl Connection {
    /// Vectors of some texts, in one call.
    ///
    /// # Errors
    /// When the server refuses or says what is not understood.
    pub(crate) fn embed<T: AsRef<str>>(&self, texts: &[T]) -> anyhow::Result<Vectors> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let body = serde_json::to_vec(&json!({"model": "model", "input": texts}))?;
        let post = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = post.send(&body[..]).context("asking infinity")?;
        let bytes = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        vectors(serde_json::from_slice(&bytes).context("what infinity answers")?, texts.len())
    }
}

fn vectors(answer: Answer, texts: usize) -> anyhow::Result<Vectors> {
    ensure!(answer.data.len() == texts, "{} vectors for {texts} texts", answer.data.len());
    let dim = answer.data.first().map_or(0, |item| item.embedding.len());
    let mut values = Vec::with_capacity(dim * texts);
    for (number, item) in answer.data.into_iter().enumerate() {
        ensure!(item.index == number && item.embedding.len() == dim && dim > 0, "vectors in disorder");
        values.extend(item.embedding);
    }
    Ok(Vectors { dim, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_one_vector_for_each_text_in_order() {
        let of = |json: &str, texts| vectors(serde_json::from_str(json).unwrap(), texts);
        let two = r#"{"data": [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [3, 4.5]}]}"#;
        assert_eq!(of(two, 2).unwrap(), Vectors { dim: 2, values: vec![1.0, 2.0, 3.0, 4.5] });
        assert!(of(two, 3).is_err());
        let swapped = r#"{"data": [{"index": 1, "embedding": [1]}, {"index": 0, "embedding": [3]}]}"#;
        assert!(of(swapped, 2).is_err());
        let unlike = r#"{"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": []}]}"#;
        assert!(of(unlike, 2).is_err());
    }
}
