//! What a person at a terminal sees: progress bars and colours, and nothing of either where there is no terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use worker_sdk::LoadProgress;

/// Whether messages may move the cursor: stderr is a terminal and `TERM` says that it can.
pub(crate) fn is_interactive() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether stdout may be coloured: a terminal, and `NO_COLOR` is not set.
pub(crate) fn may_colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Text in bold where colours are allowed.
pub(crate) fn bold(text: &str) -> String {
    if may_colour() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
}

/// A bar for the stages of a load; draws on a terminal only.
pub(crate) fn load_progress() -> impl FnMut(LoadProgress) + Send + 'static {
    let mut bar: Option<ProgressBar> = None;
    let mut stage = String::new();
    move |progress| {
        if !is_interactive() {
            return;
        }
        let bar = bar.get_or_insert_with(new_bar);
        if stage != progress.stage {
            bar.reset();
            stage.clone_from(&progress.stage);
            bar.set_message(stage.clone());
        }
        bar.set_length(progress.total_bytes.max(progress.done_bytes));
        bar.set_position(progress.done_bytes);
        if progress.stage == "verify" && progress.done_bytes >= progress.total_bytes {
            bar.finish_and_clear();
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg:28} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar
}

/// Bytes as a person reads them: `1.5 MB` (decimal units).
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// A duration in µs as a person reads it.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_readable() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(90_868_376), "90.9 MB");
        assert_eq!(bytes(2_300_000_000), "2.3 GB");
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(1500), "1.5 ms");
        assert_eq!(micros(2_000_000), "2.0 s");
    }
}
