//! Models that clients' processes provide, on the command line: how `serve --provider` reads, and what `status` shows.

use crate::terminal::{bold, micros};
use broker::ProviderCommand;
use serde_json::{Value, json};
use shm_layout::wire::{Operation, ProvidedReport};

/// `ID=PROGRAM ARGUMENTS`, words separated by spaces.
pub(crate) fn parse_command(text: &str) -> Result<ProviderCommand, String> {
    let help =
        "give `custom/NAME=PROGRAM ARGUMENTS`, separated by spaces; for anything with quotes, name a script";
    let (model_id, command) = text.split_once('=').ok_or(help)?;
    let mut words = command.split_whitespace();
    let program = words.next().ok_or(help)?;
    Ok(ProviderCommand {
        model_id: model_id.to_owned(),
        program: program.into(),
        args: words.map(Into::into).collect(),
    })
}

fn operation_name(operation: Operation) -> &'static str {
    match operation {
        Operation::Embed => "embed",
        Operation::Tokenize => "tokenize",
        Operation::EmbedFresh => "embed-fresh",
        Operation::Call => "call",
        Operation::Rank => "rank",
        Operation::Classify => "classify",
        Operation::Generate => "generate",
    }
}

/// Lines about one model: itself, then each process that the broker keeps running for it.
pub(super) fn lines(model: &ProvidedReport) -> Vec<String> {
    let state = match (model.providers.len(), model.generation) {
        (0, 0) => "never offered yet".to_owned(),
        (0, _) => format!("without provider for {}", micros(model.absent_us)),
        (1, _) => "1 provider".to_owned(),
        (count, _) => format!("{count} providers"),
    };
    let in_flight: u32 = model.providers.iter().map(|provider| provider.in_flight).sum();
    let mut lines = vec![format!(
        "{} {} ({}): {state}, {} leases; {} calls, {} errors, {} timeouts, {} retries, {in_flight} under way, {} waiting",
        bold("provided"),
        model.model_id,
        model.kind,
        model.leases,
        model.totals.jobs,
        model.totals.errors,
        model.totals.timeouts,
        model.totals.retries,
        model.queued_jobs
    )];
    if let Some(fault) = &model.last_fault {
        lines.push(format!("  last fault of a provider: {fault}"));
    }
    for child in &model.children {
        let now = if child.pid == 0 { "not running".to_owned() } else { format!("process {}", child.pid) };
        let last = child.last_exit.as_ref().map(|why| format!("; the last one: {why}")).unwrap_or_default();
        lines.push(format!("  kept running: {now}, started {} times{last}", child.starts));
    }
    lines
}

/// One model as JSON.
pub(super) fn as_json(model: &ProvidedReport) -> Value {
    json!({
        "id": model.model_id,
        "generation": model.generation,
        "kind": model.kind,
        "description": model.description,
        "input": model.input_kind,
        "output": model.output_kind,
        "operations": model.operations.iter().map(|o| operation_name(*o)).collect::<Vec<_>>(),
        "output_dim": model.output_dim,
        "fingerprint": format!("{:016x}", model.fingerprint),
        "providers": model.providers.iter().map(|provider| json!({
            "session_id": provider.session_id,
            "pid": provider.pid,
            "in_flight": provider.in_flight,
            "max_in_flight": provider.max_in_flight,
            "faults": provider.faults,
            "withdrawn": provider.withdrawn,
        })).collect::<Vec<_>>(),
        "leases": model.leases,
        "lease_pids": model.lease_pids,
        "queued_jobs": model.queued_jobs,
        "absent_us": model.absent_us,
        "jobs": model.totals.jobs,
        "errors": model.totals.errors,
        "retries": model.totals.retries,
        "timeouts": model.totals.timeouts,
        "queue_us": model.totals.queue_us,
        "execution_us": model.totals.execution_us,
        "last_fault": model.last_fault,
        "processes": model.children.iter().map(|child| json!({
            "pid": child.pid,
            "starts": child.starts,
            "last_exit": child.last_exit,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_is_an_id_and_a_command() {
        let provider = parse_command("custom/x=/bin/worker --model a=b").unwrap();
        assert_eq!(provider.model_id, "custom/x");
        assert_eq!(provider.program, "/bin/worker");
        assert_eq!(provider.args, ["--model", "a=b"]);
        for bad in ["", "custom/x", "custom/x=", "custom/x=  "] {
            assert!(parse_command(bad).unwrap_err().contains("custom/NAME=PROGRAM"), "{bad}");
        }
    }
}
