//! Everything that is compared, started and ready: ours by its routes, engines in processes, a server. What is asked of
//! them, and when, is not known here.

use super::candle;
use super::contenders::{self, CANDLE, Contender, INFINITY, Made, OURS, PEERS, Peer, ST, Vectors, Way};
use super::results::Nearness;
use super::sets::{Passages, Set};
use crate::fixture::Broker;
use crate::infinity::{self, Infinity};
use crate::{machine, python};
use anyhow::{Context, ensure};
use engine::CPU_PATH_VARIABLE;
use engine::compile::Precision;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use worker_sdk::{ModelRequest, Route};

/// Documents whose passages calibrate quantised models of peers, so many at most; the prose set has others.
const CALIBRATION_TEXTS: usize = 300;

/// Which engines are compared, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Choice {
    /// Only these engines: modelbroker, sentence-transformers, onnxruntime, openvino, fastembed, infinity, candle.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these precisions: f32, bf16, int8.
    #[arg(long, value_delimiter = ',', value_parser = crate::fixture::precision)]
    precisions: Vec<Precision>,
    /// Compute threads of each [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
    /// Where exported and quantised models of peers are kept [default: benches/peers/.models]
    #[arg(long, value_name = "FOLDER")]
    models: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) python: python::Arguments,
}

impl Choice {
    /// Whether an engine is to be measured at a precision.
    pub(crate) fn wants(&self, engine: &str, precision: Precision) -> bool {
        (self.only.is_empty() || self.only.iter().any(|listed| listed == engine))
            && (self.precisions.is_empty() || self.precisions.contains(&precision))
    }

    /// # Errors
    /// When a name is none of an engine, or there are no threads.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let others = [OURS, INFINITY, CANDLE];
        let engines: Vec<&str> = PEERS.iter().map(|(engine, _)| *engine).chain(others).collect();
        for name in &self.only {
            ensure!(engines.contains(&name.as_str()), "{name} is none of {}", engines.join(", "));
        }
        ensure!(self.threads != Some(0), "at least one thread is needed");
        Ok(())
    }

    /// Compute threads.
    ///
    /// # Errors
    /// When the kernel does not tell which cores there are.
    pub(crate) fn threads(&self) -> anyhow::Result<usize> {
        self.threads.map_or_else(|| Ok(machine::allowed_cores()?.len()), Ok)
    }
}

/// The root of the source tree.
pub(crate) fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Everything that is compared, ready.
pub(crate) struct Field {
    /// Every way of getting vectors.
    pub(crate) contenders: Vec<Contender>,
    processes: Vec<Peer>,
    /// Of what each engine consists.
    pub(crate) versions: BTreeMap<&'static str, String>,
    /// What a reader must know, such as what was left out and why.
    pub(crate) remarks: Vec<String>,
    model: String,
    threads: usize,
    _infinity: Option<Infinity>,
    // Last, so that they end after those that they compute for.
    broker: Broker,
    forced: Vec<Broker>,
}

impl Field {
    /// Nothing but a broker, for the model in `folder`.
    ///
    /// # Errors
    /// When the broker cannot be started.
    pub(crate) fn new(folder: &Path, threads: usize) -> anyhow::Result<Field> {
        engine::set_threads(threads)?;
        Ok(Field {
            contenders: Vec::new(),
            processes: Vec::new(),
            versions: BTreeMap::new(),
            remarks: Vec::new(),
            model: folder.to_str().context("the model folder's name is not UTF-8")?.to_owned(),
            threads,
            _infinity: None,
            broker: Broker::start(threads)?,
            forced: Vec::new(),
        })
    }

    /// Ours at every wanted precision, by these routes: `lane`, `attached`, `socket`.
    ///
    /// # Errors
    /// When the model cannot be had in f32.
    pub(crate) fn add_ours(&mut self, choice: &Choice, routes: &[&str]) -> anyhow::Result<()> {
        for precision in Precision::ALL.into_iter().filter(|precision| choice.wants(OURS, *precision)) {
            let added = self.add_ours_at(precision, routes);
            match added.with_context(|| format!("{OURS} {}", precision.name())) {
                Err(error) if precision == Precision::F32 => return Err(error),
                Err(error) => self.remarks.push(format!("not measured: {error:#}")),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// A model's name at a precision. Without a suffix it is f32 unless the environment says otherwise, so it is always
    /// named.
    fn named(&self, precision: Precision) -> String {
        format!("{}:{}", self.model, precision.name())
    }

    fn add_ours_at(&mut self, precision: Precision, routes: &[&str]) -> anyhow::Result<()> {
        let name = self.named(precision);
        let model = self.broker.load(&name)?;
        for route in routes {
            let way = match *route {
                "attached" => Way::Attached(model.attach()?),
                "socket" => {
                    let request = ModelRequest::new(&name).route(Route::Socket);
                    Way::Broker(self.broker.connect()?.model_with(request)?)
                }
                _ => Way::Broker(model.clone()),
            };
            self.contenders.push(Contender {
                engine: OURS,
                precision,
                route: (*route).into(),
                cpu_path: None,
                only: None,
                way,
            });
        }
        Ok(())
    }

    /// Ours with each of these CPU paths forced, each in a broker of its own, on the 128-token texts only.
    ///
    /// # Errors
    /// When a broker cannot be started or cannot load the model.
    pub(crate) fn add_paths(&mut self, choice: &Choice, paths: &[String]) -> anyhow::Result<()> {
        for path in paths {
            let broker = Broker::start_in(self.threads, &[(CPU_PATH_VARIABLE, path)])?;
            let mut added = Vec::new();
            for precision in Precision::ALL.into_iter().filter(|precision| choice.wants(OURS, *precision)) {
                let model = broker.load(&self.named(precision))?;
                model.embed(&["a first text, so that the engine looks for its path"])?;
                added.push(Contender {
                    engine: OURS,
                    precision,
                    route: "lane".into(),
                    cpu_path: Some(path.clone()),
                    only: Some(Set::Medium),
                    way: Way::Broker(model),
                });
            }
            let log = broker.log();
            if let Some(refusal) = log.lines().find(|line| line.contains(CPU_PATH_VARIABLE)) {
                self.remarks.push(format!("{OURS} on the path {path} was not measured: {}", refusal.trim()));
                continue;
            }
            self.contenders.extend(added);
            self.forced.push(broker);
        }
        Ok(())
    }

    /// Engines in Python processes, as far as they are wanted and installed.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub(crate) fn add_peers(
        &mut self,
        choice: &Choice,
        python: &Path,
        peers: &[(&'static str, Precision)],
    ) -> anyhow::Result<()> {
        let wanted: Vec<_> =
            peers.iter().filter(|(engine, precision)| choice.wants(engine, *precision)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let cache = choice.models.clone().unwrap_or_else(|| tree().join("benches/peers/.models"));
        let made = match calibrated(python, &self.model, &cache) {
            Ok(made) => made,
            Err(error) => {
                self.remarks.push(format!("peers were not measured: {error:#}"));
                return Ok(());
            }
        };
        for (name, why) in &made.errors {
            self.remarks.push(format!("{name} could not be made for its engine: {why}"));
        }
        let started: Vec<Peer> = wanted
            .into_iter()
            .map(|peer| Peer::start(python, *peer, &self.model, &made, self.threads))
            .collect::<anyhow::Result<_>>()?;
        started.into_iter().for_each(|peer| self.add_process(peer));
        Ok(())
    }

    /// The server infinity, if it is wanted; `python` is that of the other peers.
    pub(crate) fn add_infinity(&mut self, choice: &Choice, python: &Path) {
        let precision = Precision::F32;
        if !choice.wants(INFINITY, precision) {
            return;
        }
        let Some(own) = infinity::python(python) else {
            self.remarks.push(format!("{INFINITY} was not measured: it is not installed"));
            return;
        };
        match Infinity::start(&own, &self.model, self.threads) {
            Ok(server) => {
                self.versions.insert(INFINITY, server.versions.clone());
                self.contenders.push(Contender {
                    engine: INFINITY,
                    precision,
                    route: "http".into(),
                    cpu_path: None,
                    only: None,
                    way: Way::Http(server.connect()),
                });
                self._infinity = Some(server);
            }
            Err(why) => self.remarks.push(format!("{INFINITY} was not measured: {why:#}")),
        }
    }

    /// Stock candle, if it is wanted.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn add_candle(&mut self, choice: &Choice) -> anyhow::Result<()> {
        if choice.wants(CANDLE, Precision::F32) {
            let process = candle::start(&self.model, self.threads)?;
            self.add_process(Peer::of(CANDLE, Precision::F32, process));
        }
        Ok(())
    }

    fn add_process(&mut self, mut peer: Peer) {
        let (engine, precision) = (peer.engine, peer.precision);
        match peer.ready() {
            Ok((routes, versions)) => {
                self.versions.insert(engine, versions);
                let number = self.processes.len();
                self.processes.push(peer);
                self.contenders.extend(routes.into_iter().map(|route| Contender {
                    engine,
                    precision,
                    route,
                    cpu_path: None,
                    only: None,
                    way: Way::Process(number),
                }));
            }
            Err(why) => {
                self.remarks.push(format!("{engine} {} was not measured: {why:#}", precision.name()));
            }
        }
    }

    /// Seconds for all texts at once by one contender, and their vectors.
    ///
    /// # Errors
    /// When they cannot be computed.
    pub(crate) fn batch(&mut self, number: usize, texts: &[String]) -> anyhow::Result<(f64, Vectors)> {
        let contender = self.contenders.get(number).context("no such contender")?;
        contender.batch(&mut self.processes, texts).with_context(|| contender.name())
    }

    /// Seconds for each text, one after the other, by one contender.
    ///
    /// # Errors
    /// When one cannot be computed.
    pub(crate) fn singles(&mut self, number: usize, texts: &[String]) -> anyhow::Result<Vec<f64>> {
        let contender = self.contenders.get(number).context("no such contender")?;
        contender.singles(&mut self.processes, texts).with_context(|| contender.name())
    }

    /// The contender whose vectors are the reference: sentence-transformers in f32.
    pub(crate) fn reference(&self) -> Option<usize> {
        self.contenders
            .iter()
            .position(|contender| contender.engine == ST && contender.precision == Precision::F32)
    }

    /// How near the vectors of each contender are to the reference's of the same texts, the first of all; none without a
    /// reference. `None` has no vectors.
    ///
    /// # Errors
    /// When they are not as many of the same length.
    pub(crate) fn nearness(&self, vectors: &[Option<Vectors>]) -> anyhow::Result<Vec<Option<Nearness>>> {
        let reference = self.reference().and_then(|number| vectors.get(number)?.as_ref());
        let near = |of: &Option<Vectors>| match (of, reference) {
            (Some(of), Some(reference)) => Nearness::of(of, &reference.first(of.len())).map(Some),
            _ => Ok(None),
        };
        vectors.iter().map(near).collect()
    }
}

/// What peers load, quantised with passages of this project's documentation.
fn calibrated(python: &Path, model: &str, cache: &Path) -> anyhow::Result<Made> {
    let mut passages = Passages::read(&tree().join("docs"))?;
    let texts: Vec<String> = (0..CALIBRATION_TEXTS).map(|_| passages.next()).collect();
    contenders::make(python, model, cache, &texts)
}
