//! `ring`: round trips between two processes. A peer process echoes; blocks of each transport alternate in one run, so
//! that whatever else the machine does hits all of them. How a transport works is its own module's affair.

mod cache_line;
mod iceoryx;
mod ours;
mod peer;
mod socket;

pub(crate) use peer::{PeerArguments, run_peer};

use crate::machine;
use crate::report::{Report, Table, rounded, short};
use crate::samples::{Samples, Summary};
use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

/// Payload sizes in bytes: a token's worth, a text, a batch of texts, the largest slot.
const SIZES_BYTES: [usize; 4] = [64, 2 << 10, 64 << 10, 1 << 20];
/// The size whose figures stand at the top of the JSON object.
const HEADLINE_BYTES: usize = 2 << 10;
/// A round trip that takes longer than this is one whose peer is gone.
const STUCK_AFTER: Duration = Duration::from_secs(10);
/// A sleeping client looks up as often, as in the SDK: the death of an engine wakes nobody.
const WAIT_SLICE: Duration = Duration::from_millis(50);
/// One in so many round trips of a block comes before it, unmeasured.
const WARM_UP_SHARE: u32 = 8;

/// Arguments of `ring`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Blocks of each transport; they alternate.
    #[arg(long, default_value_t = 21)]
    rounds: u32,
    /// Payload sizes in bytes.
    #[arg(long, value_delimiter = ',', default_values_t = SIZES_BYTES)]
    bytes: Vec<usize>,
    /// Only these transports.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Transport>,
}

/// A way there and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    /// A lane, both sides polling.
    OursPolled,
    /// A lane, both sides asleep: doorbell and epoll there, futex back.
    OursWoken,
    /// iceoryx2 request-response, both sides polling.
    Iceoryx2Polled,
    /// iceoryx2 request-response with an event each way.
    Iceoryx2Events,
    /// A Unix stream socket, blocking.
    UnixSocket,
    /// One word of a lane there and one back, whatever the payload: how fast the two cores can talk at all.
    CacheLine,
}

impl Transport {
    const ALL: [Transport; 6] = [
        Transport::OursPolled,
        Transport::OursWoken,
        Transport::Iceoryx2Polled,
        Transport::Iceoryx2Events,
        Transport::UnixSocket,
        Transport::CacheLine,
    ];

    /// Its name in keys of the JSON object.
    const fn key(self) -> &'static str {
        match self {
            Transport::OursPolled => "ours_polled",
            Transport::OursWoken => "ours_woken",
            Transport::Iceoryx2Polled => "iceoryx2_polled",
            Transport::Iceoryx2Events => "iceoryx2_events",
            Transport::UnixSocket => "unix_socket",
            Transport::CacheLine => "cache_line",
        }
    }

    const fn is_polled(self) -> bool {
        matches!(self, Transport::OursPolled | Transport::Iceoryx2Polled | Transport::CacheLine)
    }

    /// Measured round trips in a block: some ten to a hundred milliseconds.
    const fn block_round_trips(self, bytes: usize) -> u32 {
        if matches!(self, Transport::CacheLine) {
            return 20_000;
        }
        match (self.is_polled(), bytes) {
            (true, ..=8192) => 20_000,
            (true, ..=131_072) => 4_000,
            (true, _) => 300,
            (false, ..=131_072) => 600,
            (false, _) => 100,
        }
    }
}

/// Where the two processes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Each on a core of its own.
    Split,
    /// Both on one core.
    Same,
}

impl Placement {
    const fn name(self) -> &'static str {
        match self {
            Placement::Split => "split",
            Placement::Same => "same",
        }
    }
}

/// The asking end of a transport.
trait Caller {
    /// Sends `input`, waits for its echo and copies it to `output`.
    fn call(&mut self, input: &[u8], output: &mut Vec<u8>) -> anyhow::Result<()>;
}

/// Gives an error when a wait has become hopeless, so that a dead peer does not leave a process that spins for ever. The
/// clock is read only now and then: reading it costs a tenth of a round trip.
#[derive(Debug)]
struct Patience {
    spins: u32,
    until: Option<Instant>,
}

impl Patience {
    const SPINS_BETWEEN_LOOKS: u32 = 1 << 20;

    const fn new() -> Patience {
        Patience { spins: 0, until: None }
    }

    #[inline]
    fn spin(&mut self) -> anyhow::Result<()> {
        self.spins += 1;
        if self.spins.is_multiple_of(Self::SPINS_BETWEEN_LOOKS) { self.look() } else { Ok(()) }
    }

    #[cold]
    fn look(&mut self) -> anyhow::Result<()> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + STUCK_AFTER);
        ensure!(Instant::now() < until, "no answer for {STUCK_AFTER:?}: the other process is stuck or gone");
        Ok(())
    }
}

/// Results at one size and placement.
struct Measured {
    bytes: usize,
    placement: Placement,
    transports: Vec<(Transport, Summary)>,
}

impl Measured {
    fn p50_us(&self, transport: Transport) -> Option<f64> {
        self.transports.iter().find(|(t, _)| *t == transport).map(|(_, summary)| summary.p50_us)
    }

    fn ratio(&self, ours: Transport, peer: Transport) -> Option<f64> {
        Some(self.p50_us(ours)? / self.p50_us(peer)?)
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("bytes".into(), self.bytes.into());
        object.insert("placement".into(), self.placement.name().into());
        for (transport, summary) in &self.transports {
            let key = transport.key();
            object.insert(format!("{key}_p50_us"), rounded(summary.p50_us).into());
            object.insert(format!("{key}_p99_us"), rounded(summary.p99_us).into());
            let (low, high) = summary.spread_us;
            object.insert(format!("{key}_p50_spread_us"), json!([rounded(low), rounded(high)]));
            object.insert(format!("{key}_count"), summary.count.into());
        }
        object
    }
}

/// Runs the bench.
///
/// # Errors
/// When a transport cannot be set up or its peer stops answering.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    let cores = machine::allowed_cores()?;
    let mut measured = Vec::new();
    for &bytes in &arguments.bytes {
        ensure!((8..=1 << 20).contains(&bytes), "--bytes must be from 8 to 1048576, not {bytes}");
        let mut setup = peer::Setup::new(bytes).with_context(|| format!("setting up for {bytes} bytes"))?;
        if let [ours, theirs, ..] = cores[..] {
            measured.push(measure(arguments, &mut setup, Placement::Split, ours, theirs)?);
        }
        measured.push(measure(arguments, &mut setup, Placement::Same, cores[0], cores[0])?);
        setup.finish()?;
        // Whatever is started next may use all cores again.
        machine::pin_to(&cores)?;
    }
    Ok(report(&measured, cores.len()))
}

fn measure(
    arguments: &Arguments,
    setup: &mut peer::Setup,
    placement: Placement,
    our_core: usize,
    peer_core: usize,
) -> anyhow::Result<Measured> {
    machine::pin(our_core)?;
    let bytes = setup.bytes();
    let wanted = |t: &Transport| arguments.only.is_empty() || arguments.only.contains(t);
    // On one core a polling process would wait for the other's time slice to end: nobody does that.
    let mut transports: Vec<(Transport, Samples)> = Transport::ALL
        .into_iter()
        .filter(|t| wanted(t) && !(placement == Placement::Same && t.is_polled()))
        // It carries nothing, so one size tells all.
        .filter(|t| *t != Transport::CacheLine || bytes == arguments.bytes[0])
        .map(|t| (t, Samples::new()))
        .collect();
    for round in 0..arguments.rounds as usize {
        // Each is first once, and follows another one each time.
        let count = transports.len().max(1);
        transports.rotate_left(round.min(1) % count);
        for (transport, samples) in &mut transports {
            block(setup, *transport, peer_core, samples)
                .with_context(|| format!("{} at {bytes} bytes", transport.key()))?;
        }
    }
    let mut transports: Vec<(Transport, Summary)> =
        transports.iter().filter_map(|(t, samples)| Some((*t, samples.summary()?))).collect();
    transports.sort_by_key(|(t, _)| Transport::ALL.iter().position(|all| all == t));
    Ok(Measured { bytes, placement, transports })
}

fn block(
    setup: &mut peer::Setup,
    transport: Transport,
    peer_core: usize,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let measured = transport.block_round_trips(setup.bytes());
    let warm_up = measured / WARM_UP_SHARE;
    let mut input: Vec<u8> = (0..setup.bytes()).map(|i| (i * 31) as u8).collect();
    let mut output = Vec::with_capacity(input.len());
    let caller = setup.begin(transport, warm_up + measured, peer_core)?;
    let mut before = Instant::now();
    for round_trip in 0..warm_up + measured {
        // Another payload each time, so that an old answer is not taken for a new one.
        input[..4].copy_from_slice(&round_trip.to_le_bytes());
        caller.call(&input, &mut output)?;
        let now = Instant::now();
        if round_trip >= warm_up {
            samples.record(now - before);
        }
        ensure!(
            output.len() == input.len() && output[..4] == input[..4],
            "the echo differs from what was sent"
        );
        before = Instant::now();
    }
    ensure!(output == input, "the echo differs from what was sent");
    samples.end_block();
    setup.end()
}

fn report(measured: &[Measured], cores: usize) -> Report {
    let mut report = Report::new("ring");
    if let Some(headline) =
        measured.iter().find(|m| m.bytes == HEADLINE_BYTES && m.placement == Placement::Split)
    {
        for (key, value) in headline.to_json() {
            report.figure(key, value);
        }
    }
    report.figure("sizes", measured.iter().map(|m| Value::Object(m.to_json())).collect::<Vec<_>>());
    for placement in [Placement::Split, Placement::Same] {
        let title = match placement {
            Placement::Split => {
                "Round trip, each process on its own core: p50 / p99 µs (spread of block medians)"
            }
            Placement::Same => {
                "Round trip, both processes on one core: p50 / p99 µs (spread of block medians)"
            }
        };
        let used: Vec<Transport> = Transport::ALL
            .into_iter()
            .filter(|t| measured.iter().any(|m| m.placement == placement && m.p50_us(*t).is_some()))
            .collect();
        if used.is_empty() {
            continue;
        }
        let header: Vec<&str> = std::iter::once("bytes").chain(used.iter().map(|t| t.key())).collect();
        let mut table = Table::new(title, &header);
        for m in measured.iter().filter(|m| m.placement == placement) {
            let mut cells = vec![m.bytes.to_string()];
            cells.extend(used.iter().map(|transport| {
                let Some((_, s)) = m.transports.iter().find(|(t, _)| t == transport) else {
                    return "-".into();
                };
                let (low, high) = s.spread_us;
                format!("{} / {} ({}-{})", short(s.p50_us), short(s.p99_us), short(low), short(high))
            }));
            table.row(cells);
        }
        report.table(table);
    }
    add_goals(&mut report, measured);
    if cores < 2 {
        report.remark("one core only: nothing was measured with the processes on cores of their own");
    }
    report.remark(
        "ours copies the input out of the lane, checks the job, copies the output in and out, and looks for a sleeper on \
         both sides also when polled; iceoryx2 copies the payload in and out on both sides too",
    );
    report
}

fn add_goals(report: &mut Report, measured: &[Measured]) {
    use Placement::{Same, Split};
    use Transport::{Iceoryx2Events, Iceoryx2Polled, OursPolled, OursWoken, UnixSocket};
    let goals = [
        (Split, 64, OursPolled, Iceoryx2Polled, 0.5),
        (Split, 2 << 10, OursPolled, Iceoryx2Polled, 0.5),
        (Split, 64 << 10, OursPolled, Iceoryx2Polled, 0.7),
        (Split, 1 << 20, OursPolled, Iceoryx2Polled, 1.0),
        (Split, 64, OursWoken, Iceoryx2Events, 0.85),
        (Split, 2 << 10, OursWoken, Iceoryx2Events, 0.85),
        (Split, 64, OursWoken, UnixSocket, 1.15),
        (Split, 2 << 10, OursWoken, UnixSocket, 1.15),
        (Split, 1 << 20, OursWoken, UnixSocket, 0.33),
        (Same, 64, OursWoken, UnixSocket, 0.5),
        (Same, 2 << 10, OursWoken, UnixSocket, 0.5),
    ];
    for (placement, bytes, ours, theirs, at_most) in goals {
        let ratio = measured
            .iter()
            .find(|m| m.bytes == bytes && m.placement == placement)
            .and_then(|m| m.ratio(ours, theirs));
        let what = format!("{} / {} p50, {bytes} B, {}", ours.key(), theirs.key(), placement.name());
        report.goal(what, ratio.map(rounded), at_most);
    }
}
