//! The machine's GEMM peak, measured by libraries in a Python process, and what it allows a model. No engine is run here.

use crate::python;
use crate::worker::Worker;
use anyhow::{Context, ensure};
use engine::compile::Precision;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// The best rate seen at a precision.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Peak {
    /// Multiplications and additions together, 10^9 a second.
    pub(crate) gops: f64,
    /// Whose product it was.
    pub(crate) library: String,
}

/// A process that multiplies big square matrices when asked.
#[derive(Debug)]
pub(crate) struct Gemm {
    process: Worker,
    best: BTreeMap<String, Peak>,
}

impl Gemm {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(python: &Path, threads: usize) -> anyhow::Result<Gemm> {
        let mut process = python::start(python, "gemm_peak.py", &[&threads.to_string()], threads)?;
        process.line().context("gemm_peak.py ended")?;
        Ok(Gemm { process, best: BTreeMap::new() })
    }

    /// Measures again and keeps the better.
    ///
    /// # Errors
    /// When the process ended.
    pub(crate) fn measure(&mut self) -> anyhow::Result<()> {
        let orders = self.process.orders()?;
        orders.write_all(b"\n")?;
        orders.flush()?;
        let said: BTreeMap<String, Peak> =
            serde_json::from_str(&self.process.line()?).context("what gemm_peak.py says")?;
        for (precision, peak) in said {
            if self.best.get(&precision).is_none_or(|best| peak.gops > best.gops) {
                self.best.insert(precision, peak);
            }
        }
        Ok(())
    }

    /// The best so far.
    pub(crate) fn peak(&self, precision: Precision) -> Option<&Peak> {
        self.best.get(precision.name())
    }
}

/// Multiplications and additions of a model's linear layers for each token, from its `config.json`: each layer has four
/// square products (query, key, value, output) and two with the intermediate size. Attention is not counted.
///
/// # Errors
/// When the folder has no such configuration.
pub(crate) fn operations_a_token(folder: &Path) -> anyhow::Result<f64> {
    let file = folder.join("config.json");
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let config: Value = serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
    operations(&config).with_context(|| format!("{} does not say the model's sizes", file.display()))
}

fn operations(config: &Value) -> anyhow::Result<f64> {
    let size = |name: &str| config[name].as_f64().with_context(|| format!("no {name}"));
    let (hidden, layers) = (size("hidden_size")?, size("num_hidden_layers")?);
    let operations = layers * 2.0 * (4.0 * hidden * hidden + 2.0 * hidden * size("intermediate_size")?);
    ensure!(operations.is_finite() && operations > 0.0, "sizes that are no sizes");
    Ok(operations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn operations_are_those_of_the_linear_layers() {
        let config = json!({"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536});
        // 10.6 million weights, a multiplication and an addition each.
        assert_eq!(operations(&config).unwrap(), 2.0 * 10_616_832.0);
        assert!(operations(&json!({"hidden_size": 384})).is_err());
        assert!(
            operations(&json!({"hidden_size": 0, "num_hidden_layers": 6, "intermediate_size": 0})).is_err()
        );
    }
}
