//! What the demo found, as a table or as JSON. Nothing is measured here.

use super::documents::Answer;
use super::memory::{ProcessMemory, WorkerFigures, copies};
use crate::failure::{Exit, Failure};
use crate::terminal::{bold, bytes, micros};
use doc_pipeline::Hit;
use doc_pipeline::wire::Summary;
use serde_json::{Value, json};
use std::path::Path;

/// Columns of a snippet that are shown.
const SNIPPET_CHARS: usize = 88;
const SNIPPET_LINES: usize = 2;

/// Everything.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) model_id: String,
    pub(crate) image_bytes: u64,
    pub(crate) documents: Summary,
    pub(crate) answers: Vec<Answer>,
    pub(crate) attach_p50_us: u64,
    pub(crate) thin: Group,
    pub(crate) attached: Group,
    pub(crate) private: Group,
}

/// Workers of one kind, and the processes that they share.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) common: Vec<(&'static str, ProcessMemory)>,
    pub(crate) workers: Vec<WorkerFigures>,
}

impl Group {
    fn copies(&self, image_bytes: u64) -> f64 {
        let common = self.common.iter().map(|(_, memory)| memory);
        copies(common.chain(self.workers.iter().map(|worker| &worker.memory)), image_bytes)
    }

    fn json(&self, image_bytes: u64, time_name: &str, times_in_ms: bool) -> Value {
        let workers = self.workers.iter().map(|worker| {
            let time = match times_in_ms {
                true => json!(round3(worker.report.ready_us as f64 / 1e3)),
                false => json!(worker.report.ready_us),
            };
            let mut object = process_json(&worker.memory);
            object[time_name] = time;
            object["first_embed_us"] = json!(worker.report.first_embed_us);
            object
        });
        json!({ "weights_copies": round3(self.copies(image_bytes)), "workers": workers.collect::<Vec<_>>() })
    }

    fn process(&self, name: &str) -> Value {
        let found = self.common.iter().find(|(known, _)| *known == name);
        found.map_or(Value::Null, |(_, memory)| process_json(memory))
    }

    fn print(&self, title: &str, time: &str, image_bytes: u64) {
        println!("\n{}", bold(title));
        println!(
            "  {:<22}{:>14}{:>16}{:>14}{:>14}",
            "process", "private MB", "weights MB*", time, "first embed"
        );
        for (name, memory) in &self.common {
            println!(
                "  {:<22}{:>14.1}{:>16.1}",
                label(name, memory),
                mb(memory.private_bytes),
                weights_mb(memory)
            );
        }
        for worker in &self.workers {
            let (memory, report) = (&worker.memory, &worker.report);
            println!(
                "  {:<22}{:>14.1}{:>16.1}{:>14}{:>14}",
                label("worker", memory),
                mb(memory.private_bytes),
                weights_mb(memory),
                micros(report.ready_us),
                micros(report.first_embed_us)
            );
        }
        println!("  copies of the weights in memory: {}", bold(&format!("{:.2}", self.copies(image_bytes))));
    }
}

impl Outcome {
    /// The stable JSON form; documented in `docs/operations.md`.
    pub(crate) fn json(&self) -> Value {
        let mut object = self.thin.json(self.image_bytes, "attach_us", false);
        object["model"] = json!(self.model_id);
        object["image_bytes"] = json!(self.image_bytes);
        object["attach_p50_us"] = json!(self.attach_p50_us);
        object["broker"] = self.thin.process("broker");
        object["engine"] = self.thin.process("engine");
        object["attached"] = self.attached.json(self.image_bytes, "attach_us", false);
        object["private"] = self.private.json(self.image_bytes, "load_ms", true);
        object["documents"] = json!(self.documents);
        object["questions"] = self.answers.iter().map(answer_json).collect();
        object["vectors_agree"] = json!(self.vectors_agree());
        object
    }

    /// Prints a table.
    pub(crate) fn print(&self) {
        let documents = &self.documents;
        println!("{} {}, image {}", bold("Model"), self.model_id, bytes(self.image_bytes));
        println!(
            "{} {} indexed, {} failed: {} chunks, {} tokens in {:.1} s; one subprocess a document",
            bold("Documents"),
            documents.indexed,
            documents.failed,
            documents.chunks,
            documents.tokens,
            documents.elapsed_ms as f64 / 1e3
        );
        println!("\n{}", bold("Questions"));
        self.answers.iter().for_each(print_answer);
        let count = self.workers();
        self.thin.print(&format!("{count} thin workers, one shared model"), "attach", self.image_bytes);
        let title = format!("{count} attached workers, which compute themselves on the shared pages");
        self.attached.print(&title, "attach", self.image_bytes);
        let title = format!("{count} processes that load the model privately, for comparison");
        self.private.print(&title, "load", self.image_bytes);
        println!("  * of each page, the share of this process among those that have it (PSS)");
        println!("\nattach, median of fresh processes: {}", bold(&micros(self.attach_p50_us)));
        if !self.vectors_agree() {
            println!("the three kinds of workers computed DIFFERENT vectors");
        }
    }

    fn workers(&self) -> usize {
        self.thin.workers.len()
    }

    /// Whether thin, attached and private workers computed the same vector, bit for bit.
    fn vectors_agree(&self) -> bool {
        let groups = [&self.thin, &self.attached, &self.private];
        let mut vectors = groups.iter().flat_map(|g| &g.workers).map(|worker| &worker.report.first_vector);
        let first = vectors.next();
        vectors.all(|vector| {
            first
                .is_some_and(|first| vector.iter().map(|x| x.to_bits()).eq(first.iter().map(|x| x.to_bits())))
        })
    }

    /// How the command ends.
    pub(crate) fn verdict(&self) -> Result<(), Failure> {
        let missed = self.answers.iter().filter(|answer| !answer.is_right()).count();
        if self.documents.failed > 0 || missed > 0 || !self.vectors_agree() {
            return Err(Failure::told(Exit::CheckFailed));
        }
        Ok(())
    }
}

fn print_answer(answer: &Answer) {
    let mark = if answer.is_right() { "ok  " } else { "MISS" };
    println!("  {mark} {}", answer.question.question);
    let Some(best) = &answer.best else {
        println!("       nothing found");
        return;
    };
    println!("       {}  (score {:.4})", place(best), best.score);
    match &answer.answer {
        Some(hit) => {
            if hit.rank > best.rank {
                println!("       place {}: {}", hit.rank, place(hit));
            }
            // Of a table the row with the answer.
            let lines = hit.snippet.lines().filter(|line| line.contains(&answer.question.phrase));
            lines.take(SNIPPET_LINES).for_each(|line| println!("       {}", cut(line.trim(), SNIPPET_CHARS)));
        }
        None => println!("       expected, and not found: {}", answer.question.document),
    }
}

fn place(hit: &Hit) -> String {
    let mut place = vec![file_name(&hit.document).to_owned()];
    place.extend(hit.heading_path.iter().cloned());
    place.join(" › ")
}

fn answer_json(answer: &Answer) -> Value {
    json!({
        "question": answer.question.question,
        "expected": answer.question.document,
        "found": answer.best.as_ref().map(|hit| file_name(&hit.document)),
        "rank": answer.answer.as_ref().map(|hit| hit.rank),
        "ok": answer.is_right(),
        "score": answer.best.as_ref().map(|hit| hit.score),
        "heading_path": answer.best.as_ref().map(|hit| &hit.heading_path),
        "snippet": answer.best.as_ref().map(|hit| &hit.snippet),
    })
}

fn process_json(memory: &ProcessMemory) -> Value {
    json!({
        "pid": memory.pid,
        "private_mb": round3(mb(memory.private_bytes)),
        "pss_mb": round3(mb(memory.pss_bytes)),
        "weights_pss_mb": round3(weights_mb(memory)),
    })
}

fn label(name: &str, memory: &ProcessMemory) -> String {
    format!("{name} ({})", memory.pid)
}

fn mb(count_bytes: u64) -> f64 {
    count_bytes as f64 / 1e6
}

fn weights_mb(memory: &ProcessMemory) -> f64 {
    mb(memory.weights_pss_bytes)
}

fn round3(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn file_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

fn cut(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::worker::probe::ProbeReport;

    fn group(weights: &[u64], vector: &[f32]) -> Group {
        let workers = weights.iter().map(|weights| WorkerFigures {
            memory: ProcessMemory {
                pid: 7,
                private_bytes: 2_500_000,
                pss_bytes: 0,
                weights_pss_bytes: *weights,
            },
            report: ProbeReport {
                pid: 7,
                ready_us: 1500,
                first_embed_us: 9,
                own_weights: None,
                first_vector: vector.to_vec(),
            },
        });
        Group { common: Vec::new(), workers: workers.collect() }
    }

    fn outcome(last_vector: &[f32]) -> Outcome {
        Outcome {
            model_id: "m".into(),
            image_bytes: 100,
            documents: Summary::default(),
            answers: Vec::new(),
            attach_p50_us: 500,
            thin: group(&[50, 51], &[1.0]),
            attached: group(&[100, 0], &[1.0]),
            private: group(&[100, 100], last_vector),
        }
    }

    #[test]
    fn figures_are_where_the_documentation_says() {
        let json = outcome(&[1.0]).json();
        assert_eq!(json["weights_copies"], 1.01);
        assert_eq!(
            (&json["workers"][0]["private_mb"], &json["workers"][1]["attach_us"]),
            (&json!(2.5), &json!(1500))
        );
        assert_eq!((&json["attach_p50_us"], &json["image_bytes"]), (&json!(500), &json!(100)));
        assert_eq!(
            (&json["private"]["weights_copies"], &json["private"]["workers"][0]["load_ms"]),
            (&json!(2.0), &json!(1.5))
        );
        assert!(outcome(&[1.0]).verdict().is_ok());
    }

    #[test]
    fn other_vectors_or_failed_documents_fail_the_demo() {
        assert!(outcome(&[1.5]).verdict().is_err());
        let mut failed = outcome(&[1.0]);
        failed.documents.failed = 1;
        assert!(failed.verdict().is_err());
    }
}
