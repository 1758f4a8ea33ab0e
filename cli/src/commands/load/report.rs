//! What all client processes of a load measured, added up, as a table or as JSON. Starting and asking them is not here.

use super::client::new_histogram;
use super::plan::{Class, ClientResult};
use crate::args::{LoadArgs, RouteArg};
use crate::failure::{Exit, Failure};
use crate::terminal::bold;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The whole run.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Results of the clients that gave one.
    pub(crate) clients: Vec<ClientResult>,
    /// Clients that were killed by a signal from outside.
    pub(crate) killed: Vec<u32>,
    /// Clients that ended without a result.
    pub(crate) failed: Vec<u32>,
    /// The user ended the run early.
    pub(crate) interrupted: bool,
}

struct Sum {
    completed: u64,
    texts: u64,
    texts_per_s: f64,
    /// Within the time that the load was to last. At its end some requests are under way, and the machine gets idle
    /// while they end: over short runs the plain rate says less.
    steady_texts_per_s: f64,
    latency_us: Histogram<u64>,
}

impl Sum {
    fn of<'a>(classes: impl Iterator<Item = &'a Class>, elapsed_s: f64, duration_s: f64) -> Sum {
        let mut sum = Sum {
            completed: 0,
            texts: 0,
            texts_per_s: 0.0,
            steady_texts_per_s: 0.0,
            latency_us: new_histogram(),
        };
        let mut in_time = 0.0;
        for class in classes {
            sum.completed += class.completed;
            sum.texts += class.texts;
            in_time += class.texts_in_time;
            for (value, count) in &class.latency_us {
                sum.latency_us.saturating_record_n(*value, *count);
            }
        }
        if elapsed_s > 0.0 {
            sum.texts_per_s = sum.texts as f64 / elapsed_s;
        }
        // Less when it was ended early.
        let lasted_s = elapsed_s.min(duration_s);
        if lasted_s > 0.0 {
            sum.steady_texts_per_s = in_time / lasted_s;
        }
        sum
    }

    /// A quantile in ms; `None` where nothing was answered.
    fn ms(&self, quantile: f64) -> Option<f64> {
        (!self.latency_us.is_empty()).then(|| self.latency_us.value_at_quantile(quantile) as f64 / 1e3)
    }

    fn add_to(&self, object: &mut serde_json::Map<String, Value>) {
        let figures = [
            ("completed", json!(self.completed)),
            ("texts", json!(self.texts)),
            ("texts_per_s", json!((self.texts_per_s * 10.0).round() / 10.0)),
            ("steady_texts_per_s", json!((self.steady_texts_per_s * 10.0).round() / 10.0)),
            ("p50_ms", json!(self.ms(0.5))),
            ("p90_ms", json!(self.ms(0.9))),
            ("p99_ms", json!(self.ms(0.99))),
            ("p999_ms", json!(self.ms(0.999))),
            ("max_ms", json!(self.ms(1.0))),
        ];
        object.extend(figures.map(|(name, value)| (name.to_owned(), value)));
    }

    /// With `histogram`, also how often each time occurred, in µs.
    fn json(&self, histogram: bool) -> Value {
        let mut object = serde_json::Map::new();
        self.add_to(&mut object);
        if histogram {
            let steps = self.latency_us.iter_recorded();
            let pairs: Vec<_> = steps.map(|step| (step.value_iterated_to(), step.count_at_value())).collect();
            object.insert("latency_us".to_owned(), json!(pairs));
        }
        object.into()
    }
}

impl Outcome {
    fn total(&self, count: impl Fn(&ClientResult) -> u64) -> u64 {
        self.clients.iter().map(count).sum()
    }

    fn errors_by_code(&self) -> BTreeMap<&str, u64> {
        let mut all = BTreeMap::new();
        for (code, count) in self.clients.iter().flat_map(|client| &client.errors) {
            *all.entry(code.as_str()).or_default() += count;
        }
        all
    }

    fn elapsed_s(&self) -> f64 {
        self.clients.iter().map(|client| client.elapsed_us).max().unwrap_or(0) as f64 / 1e6
    }

    fn max_abs_diff(&self) -> f32 {
        self.clients.iter().map(|client| client.max_abs_diff).fold(0.0, f32::max)
    }

    fn sums(&self, args: &LoadArgs) -> [Sum; 3] {
        let elapsed_s = self.elapsed_s();
        let interactive: fn(&ClientResult) -> &Class = |c| &c.interactive;
        let bulk: fn(&ClientResult) -> &Class = |c| &c.bulk;
        let of = |class: fn(&ClientResult) -> &Class| self.clients.iter().map(class);
        [
            Sum::of(of(interactive).chain(of(bulk)), elapsed_s, args.duration),
            Sum::of(of(interactive), elapsed_s, args.duration),
            Sum::of(of(bulk), elapsed_s, args.duration),
        ]
    }

    /// The stable JSON form; documented in `docs/operations.md`.
    pub(crate) fn json(&self, args: &LoadArgs) -> Value {
        let [all, interactive, bulk] = self.sums(args);
        let mut object = serde_json::Map::new();
        all.add_to(&mut object);
        let rest = [
            ("submitted", json!(self.total(|c| c.submitted))),
            ("lost", json!(self.total(|c| c.lost))),
            ("wrong", json!(self.total(|c| c.wrong))),
            ("duplicated", json!(self.total(|c| c.duplicated))),
            ("errors", json!(self.total(ClientResult::error_count))),
            ("errors_by_code", json!(self.errors_by_code())),
            ("reconnects", json!(self.total(|c| c.reconnects))),
            ("verified", json!(args.verify)),
            ("max_abs_diff", json!(args.verify.then(|| self.max_abs_diff()))),
            ("elapsed_s", json!(self.elapsed_s())),
            ("interrupted", json!(self.interrupted)),
            ("interactive", interactive.json(args.histogram)),
            ("bulk", bulk.json(args.histogram)),
            ("clients_killed", json!(self.killed.len())),
            ("clients_failed", json!(self.failed.len())),
            ("clients", self.clients.iter().map(client_json).collect()),
            ("settings", settings_json(args)),
        ];
        object.extend(rest.map(|(name, value)| (name.to_owned(), value)));
        object.into()
    }

    /// Prints a table.
    pub(crate) fn print(&self, args: &LoadArgs) {
        let [all, interactive, bulk] = self.sums(args);
        println!(
            "{} processes x {} threads, texts of {} tokens, {} route, {:.1} s",
            args.clients,
            args.threads,
            args.tokens,
            route_name(args.route),
            self.elapsed_s()
        );
        let head = ["", "requests", "texts/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"];
        println!("{}", bold(&row(&head.map(str::to_owned))));
        for (name, sum) in [("all", &all), ("interactive", &interactive), ("bulk", &bulk)] {
            if sum.completed == 0 && name != "all" {
                continue;
            }
            let ms = |q| sum.ms(q).map_or("-".to_owned(), |ms| format!("{ms:.2}"));
            let mut cells =
                vec![name.to_owned(), sum.completed.to_string(), format!("{:.1}", sum.texts_per_s)];
            cells.extend([0.5, 0.9, 0.99, 0.999, 1.0].map(ms));
            println!("{}", row(&cells));
        }
        let checked = match args.verify {
            true => format!("every answer checked, largest difference {:.1e}", self.max_abs_diff()),
            false => "answers not checked (--verify)".to_owned(),
        };
        println!(
            "lost {}, wrong {}, duplicated {}, errors {}; {} reconnects; {checked}",
            self.total(|c| c.lost),
            self.total(|c| c.wrong),
            self.total(|c| c.duplicated),
            self.total(ClientResult::error_count),
            self.total(|c| c.reconnects),
        );
        for (code, count) in self.errors_by_code() {
            println!("  {count} x {code}");
        }
        if !self.killed.is_empty() || !self.failed.is_empty() {
            println!("{} clients were killed, {} failed", self.killed.len(), self.failed.len());
        }
        if self.interrupted {
            println!("ended early");
        }
    }

    /// How the command ends.
    pub(crate) fn verdict(&self) -> Result<(), Failure> {
        if self.total(|c| c.lost + c.wrong + c.duplicated) > 0 {
            return Err(Failure::told(Exit::CheckFailed));
        }
        let whole =
            self.killed.is_empty() && self.failed.is_empty() && self.total(ClientResult::error_count) == 0;
        if whole { Ok(()) } else { Err(Failure::told(Exit::Partly)) }
    }
}

fn row(cells: &[String]) -> String {
    let mut line = format!("{:<12}", cells[0]);
    for cell in &cells[1..] {
        line.push_str(&format!("{cell:>11}"));
    }
    line
}

fn route_name(route: RouteArg) -> &'static str {
    match route {
        RouteArg::Lane => "lane",
        RouteArg::Socket => "socket",
    }
}

fn client_json(client: &ClientResult) -> Value {
    json!({
        "pid": client.pid,
        "completed": client.completed(),
        "texts": client.interactive.texts + client.bulk.texts,
        "lost": client.lost,
        "wrong": client.wrong,
        "duplicated": client.duplicated,
        "errors": client.error_count(),
        "reconnects": client.reconnects,
    })
}

fn settings_json(args: &LoadArgs) -> Value {
    json!({
        "clients": args.clients,
        "threads": args.threads,
        "duration_s": args.duration,
        "tokens": args.tokens,
        "bulk_tokens": args.bulk_tokens.unwrap_or(args.tokens),
        "batch": args.batch,
        "bulk": args.bulk,
        "bulk_batch": args.bulk_batch,
        "timeout_s": args.timeout,
        "route": route_name(args.route),
        "no_repeat": args.no_repeat,
        "seed": args.seed,
    })
}
