//! Parts and their tokens to chunks. Pure.

use std::ops::Range;

use super::plan::{Part, PartKind, Plan, TextId};
use super::window::{WindowLimits, windows};
use super::{Budget, Chunk, ChunkError, ChunkKind};
use crate::document::Source;
use crate::limits::{CHUNK_BYTES_MAX, CHUNKS_MAX};
use crate::model::Span;

/// Bytes that each repeated part of a chunk (context, caption, header row) may have.
const REPEATED_BYTES_MAX: usize = 2 << 10;

/// The tokens of each text of a plan.
pub(super) type Tokens = [Vec<Span>];

/// Packs a plan into chunks of at most `budget`.
pub(super) fn pack(plan: &Plan, tokens: &Tokens, budget: Budget) -> Result<Vec<Chunk>, ChunkError> {
    let mut packer = Packer { plan, tokens, budget, out: Vec::new() };
    for (at, part) in plan.parts.iter().enumerate() {
        match &part.kind {
            PartKind::Heading { text, whole_in_path, source } => {
                if !(*whole_in_path && packer.is_in_a_context(at)) {
                    packer.run(part, *text, &[(0, *source)])?;
                }
            }
            PartKind::Run { text, blocks } => packer.run(part, *text, blocks)?,
            PartKind::Table { caption, header, rows, source } => {
                packer.table(part, *caption, *header, rows, *source)?;
            }
        }
    }
    Ok(packer.out)
}

struct Packer<'a> {
    plan: &'a Plan,
    tokens: &'a Tokens,
    budget: Budget,
    out: Vec<Chunk>,
}

/// A text that is repeated in chunks, with its tokens, cut where it is too long.
struct Repeated<'a> {
    text: &'a str,
    tokens: usize,
    is_cut: bool,
}

impl<'a> Packer<'a> {
    fn text(&self, id: TextId) -> &'a str {
        &self.plan.texts[id]
    }

    fn spans(&self, id: TextId) -> &'a [Span] {
        &self.tokens[id]
    }

    /// The context, cut at its front: the innermost heading says most.
    fn context(&self, part: &Part) -> Repeated<'a> {
        let (text, spans) = (self.text(part.context), self.spans(part.context));
        let tokens_max = self.budget.target / 4;
        let fits = |at: usize| text.len() - spans[at].start as usize <= REPEATED_BYTES_MAX;
        let mut first = spans.len().saturating_sub(tokens_max);
        while first < spans.len() && !fits(first) {
            first += 1;
        }
        match spans.get(first) {
            _ if first == 0 => Repeated { text, tokens: spans.len(), is_cut: false },
            Some(span) => {
                Repeated { text: &text[span.start as usize..], tokens: spans.len() - first, is_cut: true }
            }
            None => Repeated { text: "", tokens: 0, is_cut: true },
        }
    }

    /// A caption or header, cut at its end.
    fn head(&self, id: Option<TextId>, tokens_max: usize) -> Repeated<'a> {
        let Some(id) = id else {
            return Repeated { text: "", tokens: 0, is_cut: false };
        };
        let (text, spans) = (self.text(id), self.spans(id));
        let mut end = spans.len().min(tokens_max);
        while end > 0 && spans[end - 1].end as usize > REPEATED_BYTES_MAX {
            end -= 1;
        }
        if end == spans.len() && text.len() <= REPEATED_BYTES_MAX {
            return Repeated { text, tokens: end, is_cut: false };
        }
        let bytes = end.checked_sub(1).map_or(0, |last| spans[last].end as usize);
        Repeated { text: &text[..bytes], tokens: end, is_cut: true }
    }

    /// Whether the next part with text stands under this heading and its context is whole.
    fn is_in_a_context(&self, heading_at: usize) -> bool {
        let path = &self.plan.parts[heading_at].heading_path;
        self.plan.parts[heading_at + 1..]
            .iter()
            .find(|part| !matches!(part.kind, PartKind::Heading { .. }))
            .is_some_and(|part| part.heading_path.starts_with(path) && !self.context(part).is_cut)
    }

    fn push(&mut self, chunk: Chunk) -> Result<(), ChunkError> {
        if self.out.len() >= CHUNKS_MAX {
            return Err(ChunkError::TooManyChunks);
        }
        self.out.push(chunk);
        Ok(())
    }

    /// A run of text in windows. One without a single token has nothing to embed and gives no chunk.
    fn run(&mut self, part: &Part, id: TextId, blocks: &[(usize, Option<Source>)]) -> Result<(), ChunkError> {
        let context = self.context(part);
        let (text, spans) = (self.text(id), self.spans(id));
        let breaks: Vec<usize> = blocks.iter().map(|(offset, _)| *offset).collect();
        let limits = WindowLimits {
            tokens: self.budget.target - context.tokens,
            bytes: CHUNK_BYTES_MAX,
            overlap: self.budget.overlap.min(self.budget.target / 3),
        };
        for window in windows(text, spans, &breaks, limits) {
            let bytes = window_bytes(text, spans, &window);
            self.push(Chunk {
                kind: ChunkKind::Text,
                heading_path: part.heading_path.clone(),
                context: context.text.to_owned(),
                body: text[bytes.clone()].trim().to_owned(),
                tokens: context.tokens + window.len(),
                source: source_of(blocks, &bytes),
            })?;
        }
        Ok(())
    }

    fn table(
        &mut self,
        part: &Part,
        caption_id: Option<TextId>,
        header_id: Option<TextId>,
        rows: &[(TextId, Option<Source>)],
        source: Option<Source>,
    ) -> Result<(), ChunkError> {
        let context = self.context(part);
        let caption = self.head(caption_id, self.budget.target / 8);
        let header = self.head(header_id, self.budget.target / 2);
        // What is repeated only in part must be whole somewhere.
        for (repeated, id) in [(&caption, caption_id), (&header, header_id)] {
            if let (true, Some(id)) = (repeated.is_cut, id) {
                let first = self.out.len();
                self.run(part, id, &[(0, source)])?;
                self.out[first..].iter_mut().for_each(|chunk| chunk.kind = ChunkKind::Table);
            }
        }
        let fixed = context.tokens + caption.tokens + header.tokens;
        // A wide header would leave little room for rows: then all that the model takes is the budget.
        let wide = self.budget.wide.max(self.budget.target);
        let total = if fixed * 2 > self.budget.target { wide } else { self.budget.target };
        let room = total - fixed;
        let overlap = self.budget.overlap.min(room / 3);
        let head: Vec<&str> =
            [caption.text, header.text].into_iter().filter(|text| !text.is_empty()).collect();
        let chunk = |lines: &[&str], tokens: usize, source: Option<Source>| Chunk {
            kind: ChunkKind::Table,
            heading_path: part.heading_path.clone(),
            context: context.text.to_owned(),
            body: head.iter().chain(lines).copied().collect::<Vec<_>>().join("\n"),
            tokens: fixed + tokens,
            source,
        };

        let mut open = Open::default();
        let mut made = 0;
        for (id, row_source) in rows {
            let (text, spans) = (self.text(*id), self.spans(*id));
            let is_too_long = spans.len() > room || text.len() > CHUNK_BYTES_MAX;
            if is_too_long || open.tokens + spans.len() > room || open.bytes + text.len() > CHUNK_BYTES_MAX {
                let done = std::mem::take(&mut open);
                if !done.lines.is_empty() {
                    self.push(chunk(&done.lines, done.tokens, done.source.or(source)))?;
                    made += 1;
                }
            }
            if is_too_long {
                for window in
                    windows(text, spans, &[], WindowLimits { tokens: room, bytes: CHUNK_BYTES_MAX, overlap })
                {
                    let bytes = window_bytes(text, spans, &window);
                    self.push(chunk(&[text[bytes].trim()], window.len(), row_source.or(source)))?;
                    made += 1;
                }
                continue;
            }
            open.add(text, spans.len(), *row_source);
        }
        if !open.lines.is_empty() || (made == 0 && fixed > context.tokens) {
            self.push(chunk(&open.lines, open.tokens, open.source.or(source)))?;
        }
        Ok(())
    }
}

/// Rows that wait for their chunk.
#[derive(Default)]
struct Open<'a> {
    lines: Vec<&'a str>,
    tokens: usize,
    bytes: usize,
    source: Option<Source>,
}

impl<'a> Open<'a> {
    fn add(&mut self, text: &'a str, tokens: usize, source: Option<Source>) {
        self.lines.push(text);
        self.tokens += tokens;
        self.bytes += text.len();
        self.source = match (self.source, source) {
            (Some(open), Some(row)) => Some(open.join(row)),
            (open, row) => open.or(row),
        };
    }
}

/// The bytes of a window: what no token covers goes with the token before it, or with the first.
fn window_bytes(text: &str, spans: &[Span], window: &Range<usize>) -> Range<usize> {
    let start = if window.start == 0 { 0 } else { spans[window.start].start as usize };
    let own_end = spans[window.end - 1].end as usize;
    let end = spans.get(window.end).map_or(text.len(), |next| own_end.max(next.start as usize));
    start.min(end)..end
}

/// The places of the blocks that a byte range touches, joined.
fn source_of(blocks: &[(usize, Option<Source>)], bytes: &Range<usize>) -> Option<Source> {
    let first = blocks.partition_point(|(offset, _)| *offset <= bytes.start).saturating_sub(1);
    let end = blocks.partition_point(|(offset, _)| *offset < bytes.end);
    blocks.get(first..end)?.iter().filter_map(|(_, source)| *source).reduce(Source::join)
}
