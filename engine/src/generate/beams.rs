//! Beam search: which continuations stay. The steps of transformers' `_beam_search`, for one prompt. Pure.

use super::options::GenerateOptions;

/// What stands for "impossible" in scores.
const IMPOSSIBLE: f32 = -1.0e9;

/// A beam that is continued.
#[derive(Debug, Clone)]
pub(super) struct Beam {
    /// Ids generated so far.
    pub(super) ids: Vec<u32>,
    score: f32,
}

/// A finished answer.
#[derive(Debug, Clone)]
struct Finished {
    ids: Vec<u32>,
    score: f32,
    is_real: bool,
}

/// A beam search under way.
#[derive(Debug)]
pub(super) struct Beams {
    running: Vec<Beam>,
    finished: Vec<Finished>,
    /// Whether running beams could still become better than the worst finished one.
    may_improve: bool,
    max_tokens: usize,
}

/// Adds the best `count` of `(score, index)` in falling order, earlier ones first among equals.
fn best(mut candidates: Vec<(f32, usize)>, count: usize) -> Vec<(f32, usize)> {
    let falling = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count, falling);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(falling);
    candidates
}

impl Beams {
    /// One beam to begin with: all would be equal.
    pub(super) fn new(num_beams: usize, max_tokens: usize) -> Beams {
        let none = Finished { ids: Vec::new(), score: IMPOSSIBLE, is_real: false };
        Beams {
            running: vec![Beam { ids: Vec::new(), score: 0.0 }],
            finished: vec![none; num_beams],
            may_improve: true,
            max_tokens,
        }
    }

    /// Beams that need logits next.
    pub(super) fn running(&self) -> &[Beam] {
        &self.running
    }

    /// Takes the logarithms of probabilities of each running beam's next token, `[beams, vocab]`. Gives for each new running beam
    /// the old one that it continues, or `None` when the search is over.
    pub(super) fn advance(
        &mut self,
        log_probabilities: &[f32],
        options: &GenerateOptions,
        end_tokens: &[u32],
    ) -> Option<Vec<usize>> {
        let num_beams = options.num_beams;
        let vocab = log_probabilities.len() / self.running.len();
        let keep = 2.max(1 + end_tokens.len()) * num_beams;
        let mut candidates = Vec::new();
        for (beam, (row, running)) in log_probabilities.chunks_exact(vocab).zip(&self.running).enumerate() {
            let scored = row.iter().enumerate().map(|(id, value)| (value + running.score, beam * vocab + id));
            candidates.extend(best(scored.collect(), keep));
        }
        let top = best(candidates, keep);
        let length = self.running[0].ids.len() + 1;
        let at_end = length >= self.max_tokens;
        let ends = |index: usize| at_end || end_tokens.contains(&((index % vocab) as u32));
        let before = std::mem::take(&mut self.running);
        let continued = |index: usize| {
            let mut ids = before[index / vocab].ids.clone();
            ids.push((index % vocab) as u32);
            ids
        };
        let open = top
            .iter()
            .enumerate()
            .map(|(place, (score, index))| (if ends(*index) { score + IMPOSSIBLE } else { *score }, place));
        let next = best(open.collect(), num_beams);
        let running: Vec<(usize, Beam)> = next
            .iter()
            .map(|(score, place)| {
                let index = top[*place].1;
                (index / vocab, Beam { ids: continued(index), score: *score })
            })
            .collect();
        self.finish(&top, length, options, ends, continued);
        let all_end = top.iter().all(|(_, index)| ends(*index));
        let (parents, running): (Vec<usize>, Vec<Beam>) = running.into_iter().unzip();
        self.running = running;
        let best_possible = self.running[0].score / (length as f32).powf(options.length_penalty);
        let worst = self.finished.iter().map(|finished| finished.score).fold(f32::INFINITY, f32::min);
        let improves = self
            .finished
            .iter()
            .any(|finished| best_possible > if finished.is_real { worst } else { IMPOSSIBLE });
        self.may_improve &= improves;
        let is_full = self.finished.iter().all(|finished| finished.is_real) && options.early_stopping;
        (self.may_improve && !is_full && !all_end).then_some(parents)
    }

    /// Takes those of the best candidates that end into the finished ones, if they are better.
    fn finish(
        &mut self,
        top: &[(f32, usize)],
        length: usize,
        options: &GenerateOptions,
        ends: impl Fn(usize) -> bool,
        continued: impl Fn(usize) -> Vec<u32>,
    ) {
        let is_full = self.finished.iter().all(|finished| finished.is_real) && options.early_stopping;
        let divisor = (length as f32).powf(options.length_penalty);
        let count = self.finished.len();
        let mut merged: Vec<(f32, usize)> =
            self.finished.iter().enumerate().map(|(place, finished)| (finished.score, place)).collect();
        for (place, (score, index)) in top.iter().enumerate().take(options.num_beams) {
            if !ends(*index) || is_full || !self.may_improve {
                continue;
            }
            merged.push((score / divisor, count + place));
        }
        let kept = best(merged, count);
        let finished = kept.into_iter().map(|(score, place)| match place.checked_sub(count) {
            None => self.finished[place].clone(),
            Some(place) => Finished { ids: continued(top[place].1), score, is_real: true },
        });
        self.finished = finished.collect();
    }

    /// The best answer.
    pub(super) fn answer(&self) -> &[u32] {
        match self.finished.first() {
            Some(finished) if finished.is_real => &finished.ids,
            _ => &self.running[0].ids,
        }
    }
}
