//! The encoder's forward pass over packed texts: embedding, layers, no pooling. All work of one call is done by one team, or
//! by threads that each take whole texts; which of them makes no difference to any bit of the result.

mod forward;
mod groups;
mod scratch;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use scratch::release_all_scratch;
pub(crate) use weights::{
    EmbeddingWeights, EncodeError, EncoderWeights, LayerWeights, LinearWeights, Lookup, NormWeights,
    RotaryTables,
};

use super::scratch::Place;
use super::team::{Member, with_team};
use forward::Group;
use groups::deal;
use rayon::prelude::*;
use scratch::{Places, Scratch};
use std::ops::Range;

/// Called between steps.
pub(crate) type Breaks<'a> = &'a (dyn Fn() + Sync);

/// Computes the hidden state of all tokens into `hidden`, `[tokens, width]`; `sequences` are the texts, one behind the other.
///
/// Each team, or each thread that has texts of its own, calls `breaks` between pieces of a step: other work can be done there, on
/// that thread.
///
/// # Errors
/// [`EncodeError`] when lengths, weights or indices do not belong together; nothing is computed then.
pub(crate) fn encode(
    threads: usize,
    encoder: &EncoderWeights<'_>,
    tokens: &[Lookup],
    sequences: &[Range<usize>],
    hidden: &mut [f32],
    breaks: Breaks<'_>,
) -> Result<(), EncodeError> {
    encoder.check(tokens, sequences, hidden)?;
    let place = Place::of(hidden);
    let compute = |member: &Member<'_>, scratch: Places, sequences: &[Range<usize>]| {
        let Some(first) = sequences.first() else { return };
        let tokens = &tokens[first.start..sequences[sequences.len() - 1].end];
        let group =
            Group { encoder, tokens, sequences, first_token: first.start, hidden: place, scratch, breaks };
        // SAFETY: all lengths were checked; groups are disjoint ranges of tokens, and a group is one team's; the scratch has room
        // for its tokens and is its own.
        unsafe { group.run(member) };
    };
    let whole = |group: Range<usize>| {
        let sequences = &sequences[group];
        let mut scratch =
            Scratch::take(encoder, sequences[sequences.len() - 1].end - sequences[0].start, threads);
        compute(&Member::alone(), scratch.places(), sequences);
        scratch.keep(threads);
    };
    let (groups, shared) = deal(sequences, threads);
    if threads <= 1 {
        // On the caller's thread: rayon would take a pool of its own.
        groups.into_iter().for_each(whole);
    } else {
        groups.into_par_iter().with_max_len(1).for_each(whole);
    }
    if !shared.is_empty() {
        let sequences = &sequences[shared];
        let mut scratch =
            Scratch::take(encoder, sequences[sequences.len() - 1].end - sequences[0].start, threads);
        let places = scratch.places();
        with_team(threads, |member| compute(member, places, sequences));
        scratch.keep(threads);
    }
    Ok(())
}
