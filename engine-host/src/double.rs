//! A model for tests: cheap, deterministic, and able to misbehave on request. Shared with the integration tests.

use crate::compute::{Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors};
use shm_layout::code::Code;
use shm_layout::image::Task;
use shm_layout::wire::{FinishReason, GeneratePrompt, GenerateRequest};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Numbers in a vector.
pub(crate) const DIM: usize = 4;
/// Longest input in tokens.
pub(crate) const MAX_SEQ_TOKENS: usize = 512;
/// Fingerprint in every answer.
pub(crate) const FINGERPRINT: u64 = 0xd0b1e;
/// Identity of its vectors.
pub(crate) const IDENTITY: [u8; 32] = [0xd0; 32];

/// What a text's vector must be, on every route and in any company.
pub(crate) fn vector_of(text: &str) -> [f32; DIM] {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    std::array::from_fn(|i| ((hash >> (16 * i)) & 0xffff) as f32 / 65536.0)
}

/// What a text's spans must be: the pieces between spaces.
pub(crate) fn spans_of(text: &str) -> Vec<Range<usize>> {
    let mut at = 0;
    text.split(' ')
        .map(|piece| {
            let start = at;
            at += piece.len() + 1;
            start..start + piece.len()
        })
        .collect()
}

/// Holds computations of the text `GATE` until it is opened, and says when one has arrived.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

#[allow(dead_code, reason = "each test target uses its part")]
impl Gate {
    pub(crate) fn open(&self) {
        self.state.lock().unwrap().0 = true;
        self.changed.notify_all();
    }

    /// Waits until a computation stands at the gate.
    pub(crate) fn wait_for_arrival(&self) {
        let mut state = self.state.lock().unwrap();
        while state.1 == 0 {
            state = self.changed.wait(state).unwrap();
        }
    }

    /// As [`Gate::pass`], but with breaks while it waits.
    fn rest(&self, breaks: &(dyn Fn() + Sync)) {
        self.state.lock().unwrap().1 += 1;
        self.changed.notify_all();
        while !self.state.lock().unwrap().0 {
            breaks();
            std::thread::yield_now();
        }
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        while !state.0 {
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// The model.
#[derive(Debug, Default, Clone)]
pub(crate) struct Double {
    pub(crate) gate: Arc<Gate>,
    /// The texts of every forward pass, in order.
    pub(crate) passes: Arc<Mutex<Vec<Vec<String>>>>,
    pub(crate) broken: Arc<AtomicBool>,
    /// Says on standard output that a pass begins: for tests that kill this process in the middle of one.
    pub(crate) says_passes: bool,
    /// What it is for.
    pub(crate) task: Task,
    /// The sizes of the batches of every step, in order.
    pub(crate) steps: Arc<Mutex<Vec<usize>>>,
}

/// Writes its prompt word by word, over and over: as many words as are asked for, or up to the word `END`.
#[derive(Debug)]
pub(crate) struct Recital {
    words: Vec<String>,
    written: Vec<String>,
    taken: usize,
    max_words: usize,
    finish: Option<FinishReason>,
    ids: Vec<u32>,
}

impl Generating for Recital {
    fn is_done(&self) -> bool {
        self.finish.is_some()
    }

    fn take_text(&mut self) -> String {
        let text = self.written[self.taken..].concat();
        self.taken = self.written.len();
        text
    }

    fn text(&self) -> String {
        self.written.concat()
    }

    fn token_ids(&self) -> &[u32] {
        &self.ids
    }

    fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    fn prompt_tokens(&self) -> usize {
        self.words.len()
    }

    fn output_tokens(&self) -> usize {
        self.written.len()
    }
}

impl Compute for Double {
    type Prepared = String;
    type Run = Recital;

    fn prepare_pairs(&self, query: &str, texts: &[&str]) -> Result<Vec<String>, ComputeError> {
        Ok(texts.iter().map(|text| format!("{query}\u{1}{text}")).collect())
    }

    fn begin(&self, request: &GenerateRequest) -> Result<Recital, ComputeError> {
        let GeneratePrompt::Text(text) = &request.prompt else {
            return Err(ComputeError::new(Code::BadPayload, "no template"));
        };
        Ok(Recital {
            words: text.split(' ').map(str::to_owned).collect(),
            written: Vec::new(),
            taken: 0,
            max_words: request.settings.max_output_tokens as usize,
            finish: None,
            ids: Vec::new(),
        })
    }

    fn step(&self, runs: &mut [&mut Recital]) -> Result<(), ComputeError> {
        self.steps.lock().unwrap().push(runs.len());
        for run in runs {
            let word = run.words[run.written.len() % run.words.len()].clone();
            match word.as_str() {
                "PANIC" => panic!("asked to panic"),
                "REFUSE" => return Err(ComputeError::new(Code::BadPayload, "asked to refuse")),
                "ABORT" => std::process::abort(),
                "GATE" => self.gate.pass(),
                "END" => run.finish = Some(FinishReason::Stop),
                _ => {}
            }
            run.ids.push(word.len() as u32);
            run.written.push(word + " ");
            if run.finish.is_none() && run.written.len() >= run.max_words {
                run.finish = Some(FinishReason::Length);
            }
        }
        Ok(())
    }

    fn facts(&self) -> ModelFacts {
        ModelFacts {
            task: self.task,
            dim: DIM,
            max_seq_tokens: MAX_SEQ_TOKENS,
            fingerprint: FINGERPRINT,
            identity: IDENTITY,
        }
    }

    fn prepare(&self, texts: &[&str]) -> Result<Vec<String>, ComputeError> {
        Ok(texts.iter().map(|text| (*text).to_owned()).collect())
    }

    fn tokens(prepared: &String) -> usize {
        2 + prepared.split(' ').count()
    }

    fn forward_with_breaks(
        &self,
        prepared: &[&String],
        breaks: &(dyn Fn() + Sync),
    ) -> Result<Vectors, ComputeError> {
        if prepared.iter().any(|text| *text == "REST") {
            self.gate.rest(breaks);
        }
        self.forward(prepared)
    }

    fn forward(&self, prepared: &[&String]) -> Result<Vectors, ComputeError> {
        self.passes.lock().unwrap().push(prepared.iter().map(|text| (*text).clone()).collect());
        if self.says_passes {
            println!("pass {}", prepared.iter().map(|text| text.as_str()).collect::<Vec<_>>().join("|"));
        }
        let mut values = Vec::new();
        for text in prepared {
            match text.as_str() {
                "PANIC" => panic!("asked to panic"),
                "BREAK" => {
                    self.broken.store(true, Ordering::Relaxed);
                    panic!("asked to break");
                }
                "REFUSE" => return Err(ComputeError::new(Code::BadPayload, "asked to refuse")),
                "ABORT" => std::process::abort(),
                "GATE" => self.gate.pass(),
                _ => {}
            }
            if text.as_str() == "NAN" {
                values.extend([f32::NAN; DIM]);
            } else {
                values.extend(vector_of(text));
            }
        }
        Ok(Vectors { dim: DIM, values })
    }

    fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>, ComputeError> {
        Ok(spans_of(text))
    }

    fn probe(&self) -> Result<(), ComputeError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(ComputeError::new(Code::BadResult, "asked to break"));
        }
        Ok(())
    }
}

/// Gives the same model for every image, except for images of these sizes.
#[allow(dead_code, reason = "each test target uses its part")]
#[derive(Debug, Default)]
pub(crate) struct DoubleLoader {
    pub(crate) model: Double,
}

/// An image of this size is refused.
#[allow(dead_code, reason = "each test target uses its part")]
pub(crate) const REFUSED_IMAGE_BYTES: u64 = 13;
/// An image of this size is a model that writes.
#[allow(dead_code, reason = "each test target uses its part")]
pub(crate) const WRITING_IMAGE_BYTES: u64 = 15;
/// Loading an image of this size panics.
#[allow(dead_code, reason = "each test target uses its part")]
pub(crate) const PANICKING_IMAGE_BYTES: u64 = 14;

impl Loader for DoubleLoader {
    type Model = Double;

    fn load(&self, image: ReceivedImage) -> Result<Double, ComputeError> {
        match image.len_bytes {
            REFUSED_IMAGE_BYTES => Err(ComputeError::new(Code::ModelInvalid, "asked to refuse")),
            PANICKING_IMAGE_BYTES => panic!("asked to panic"),
            WRITING_IMAGE_BYTES => Ok(Double { task: Task::TextToText, ..self.model.clone() }),
            _ => Ok(self.model.clone()),
        }
    }
}
