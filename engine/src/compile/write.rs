//! Writing a planned image: weights stream from the checkpoint through a bounded buffer into a sink, hashed on the way.

use super::checkpoint::Checkpoint;
use super::error::CompileError;
use super::plan::{Make, Plan, PlannedTensor};
use super::tables::rotary_angles;
use super::{CompileProgress, ImageSink};
use crate::blocks::{BlockKind, is_finite};
use crate::packing::{PANEL_COLUMNS, Precision, pack_panel, weight_scale, weight_sum};
use half::{bf16, f16};
use shm_layout::image::content_hash_range;

/// Largest part of a tensor in memory while it is converted, bytes in the image. Bounds the heap for any model.
const BLOCK_BYTES: u64 = 16 << 20;
/// Zeros for the gaps between tensors.
const ZEROS: [u8; 4096] = [0; 4096];

/// Writes in order, hashes what it writes, and reports progress.
struct Stream<'a> {
    sink: &'a mut dyn ImageSink,
    progress: &'a mut dyn FnMut(CompileProgress),
    hasher: blake3::Hasher,
    position: u64,
    total_bytes: u64,
}

impl Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), CompileError> {
        self.hasher.update(bytes);
        self.sink.write_at(self.position, bytes).map_err(|source| write_error(source, self.total_bytes))?;
        self.position += bytes.len() as u64;
        (self.progress)(CompileProgress { done_bytes: self.position, total_bytes: self.total_bytes });
        Ok(())
    }

    fn pad_to(&mut self, offset: u64) -> Result<(), CompileError> {
        while self.position < offset {
            let len = (offset - self.position).min(ZEROS.len() as u64) as usize;
            self.write(&ZEROS[..len])?;
        }
        Ok(())
    }
}

/// Tells a full disk from other failures.
fn write_error(source: std::io::Error, needed_bytes: u64) -> CompileError {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            CompileError::DiskFull { needed_bytes }
        }
        _ => CompileError::Write { source },
    }
}

/// Writes the image and returns its content hash. The sink holds a complete image only when this succeeds.
pub(crate) fn write(
    plan: &Plan,
    checkpoint: &Checkpoint,
    sink: &mut dyn ImageSink,
    progress: &mut dyn FnMut(CompileProgress),
) -> Result<[u8; 32], CompileError> {
    let total_bytes = plan.header.total_bytes;
    sink.reserve(total_bytes).map_err(|source| write_error(source, total_bytes))?;
    let mut stream = Stream { sink, progress, hasher: blake3::Hasher::new(), position: 0, total_bytes };
    stream.write(&plan.head)?;
    for tensor in &plan.tensors {
        stream.pad_to(tensor.offset)?;
        match tensor.make {
            Make::Concat => concat(tensor, checkpoint, &mut stream)?,
            Make::Pack(precision) => pack(tensor, precision, checkpoint, &mut stream)?,
            Make::Scales => of_rows(tensor, checkpoint, &mut stream, weight_scale)?,
            Make::Sums => of_rows(tensor, checkpoint, &mut stream, weight_sum)?,
            Make::Zeros => stream.pad_to(tensor.offset + tensor.len_bytes())?,
            Make::RotaryCos { base_bits } => rotary(tensor, base_bits, &mut stream, f64::cos)?,
            Make::RotarySin { base_bits } => rotary(tensor, base_bits, &mut stream, f64::sin)?,
            Make::DistanceBias => distance_bias(tensor, checkpoint, &mut stream)?,
            Make::Copy => copy(tensor, checkpoint, &mut stream)?,
        }
    }
    let hash = *stream.hasher.finalize().as_bytes();
    let place = content_hash_range().start as u64;
    sink.write_at(place, &hash).map_err(|source| write_error(source, total_bytes))?;
    Ok(hash)
}

/// Size of an element in the checkpoint, bytes; the plan let only these types through.
fn source_size(dtype: &str) -> usize {
    if dtype == "F32" { 4 } else { 2 }
}

/// Converts little-endian checkpoint elements to f32 and fails on the first that is not finite.
fn convert(dtype: &str, raw: &[u8], name: &str, mut put: impl FnMut(usize, f32)) -> Result<(), CompileError> {
    let mut finite = true;
    let mut take = |index: usize, value: f32| {
        finite &= value.is_finite();
        put(index, value);
    };
    match dtype {
        "F32" => {
            let (elements, _) = raw.as_chunks::<4>();
            elements
                .iter()
                .enumerate()
                .for_each(|(index, element)| take(index, f32::from_le_bytes(*element)));
        }
        kind => {
            let (elements, _) = raw.as_chunks::<2>();
            let half = kind == "F16";
            elements.iter().enumerate().for_each(|(index, element)| {
                let value = if half {
                    f16::from_le_bytes(*element).to_f32()
                } else {
                    bf16::from_le_bytes(*element).to_f32()
                };
                take(index, value);
            });
        }
    }
    if finite { Ok(()) } else { Err(CompileError::NotFinite { name: name.to_owned() }) }
}

fn concat(
    tensor: &PlannedTensor,
    checkpoint: &Checkpoint,
    stream: &mut Stream<'_>,
) -> Result<(), CompileError> {
    for (name, source) in &tensor.sources {
        let size = source_size(&source.dtype);
        let mut left = source.shape.iter().product::<u64>();
        let mut offset = source.offset;
        let mut out = Vec::new();
        let mut raw = Vec::new();
        while left > 0 {
            let count = left.min(BLOCK_BYTES / 16) as usize;
            raw.resize(count * size, 0);
            out.resize(count * 4, 0);
            checkpoint.files[source.file].read_at(&mut raw, offset)?;
            convert(&source.dtype, &raw, name, |index, value| {
                out[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
            })?;
            stream.write(&out)?;
            offset += raw.len() as u64;
            left -= count as u64;
        }
    }
    Ok(())
}

/// Writes the sources' blocks as they are, as many as the tensor has.
fn copy(
    tensor: &PlannedTensor,
    checkpoint: &Checkpoint,
    stream: &mut Stream<'_>,
) -> Result<(), CompileError> {
    let mut left = tensor.len_bytes();
    let mut raw = Vec::new();
    for (name, source) in &tensor.sources {
        let Some(kind) = BlockKind::from_name(&source.dtype) else { continue };
        // Whole blocks at once, so that each can be checked.
        let most = BLOCK_BYTES / kind.bytes() as u64 * kind.bytes() as u64;
        let mut offset = source.offset;
        while left > 0 {
            raw.resize(left.min(most) as usize, 0);
            checkpoint.files[source.file].read_at(&mut raw, offset)?;
            if !is_finite(kind, &raw) {
                return Err(CompileError::NotFinite { name: name.clone() });
            }
            stream.write(&raw)?;
            offset += raw.len() as u64;
            left -= raw.len() as u64;
        }
    }
    Ok(())
}

/// Hands `[rows, inputs]` blocks of at most [`PANEL_COLUMNS`] rows of the stacked sources to `take`, in order.
fn for_row_blocks(
    tensor: &PlannedTensor,
    checkpoint: &Checkpoint,
    mut take: impl FnMut(&[f32], usize) -> Result<(), CompileError>,
) -> Result<(), CompileError> {
    let mut raw = Vec::new();
    let mut block: Vec<f32> = Vec::new();
    for (index, (name, source)) in tensor.sources.iter().enumerate() {
        let size = source_size(&source.dtype);
        let (rows, inputs) = (source.shape[0] as usize, source.shape[1] as usize);
        let mut row = 0;
        while row < rows {
            // A block may span two sources, so it is filled up before it is handed out.
            let count = (PANEL_COLUMNS - block.len() / inputs).min(rows - row);
            raw.resize(count * inputs * size, 0);
            checkpoint.files[source.file].read_at(&mut raw, source.offset + (row * inputs * size) as u64)?;
            convert(&source.dtype, &raw, name, |_, value| block.push(value))?;
            row += count;
            let last = index + 1 == tensor.sources.len() && row == rows;
            if block.len() == PANEL_COLUMNS * inputs || last {
                take(&block, inputs)?;
                block.clear();
            }
        }
    }
    Ok(())
}

/// Writes the panels of the stacked sources.
fn pack(
    tensor: &PlannedTensor,
    precision: Precision,
    checkpoint: &Checkpoint,
    stream: &mut Stream<'_>,
) -> Result<(), CompileError> {
    let mut panel = Vec::new();
    for_row_blocks(tensor, checkpoint, |rows, inputs| {
        pack_panel(precision, rows, inputs, &mut panel);
        stream.write(&panel)
    })
}

/// Writes one number for each row of the stacked sources.
fn of_rows(
    tensor: &PlannedTensor,
    checkpoint: &Checkpoint,
    stream: &mut Stream<'_>,
    number: impl Fn(&[f32]) -> f32,
) -> Result<(), CompileError> {
    for_row_blocks(tensor, checkpoint, |rows, inputs| {
        let bytes: Vec<u8> = rows.chunks_exact(inputs).flat_map(|row| number(row).to_le_bytes()).collect();
        stream.write(&bytes)
    })
}

/// Writes a function of the angles of rotary positions, position by position.
fn rotary(
    tensor: &PlannedTensor,
    base_bits: u64,
    stream: &mut Stream<'_>,
    function: impl Fn(f64) -> f64,
) -> Result<(), CompileError> {
    let (positions, half) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
    let mut written = Ok(());
    rotary_angles(f64::from_bits(base_bits), positions, half, |angles| {
        if written.is_ok() {
            let values = angles.iter().flat_map(|angle| (function(f64::from(*angle)) as f32).to_le_bytes());
            written = stream.write(&values.collect::<Vec<u8>>());
        }
    });
    written
}

/// Writes a table of relative positions by distance; the source is a few kilobytes.
fn distance_bias(
    tensor: &PlannedTensor,
    checkpoint: &Checkpoint,
    stream: &mut Stream<'_>,
) -> Result<(), CompileError> {
    for (name, source) in &tensor.sources {
        let (buckets, heads) = (source.shape[0] as usize, source.shape[1] as usize);
        let mut raw = vec![0; buckets * heads * source_size(&source.dtype)];
        checkpoint.files[source.file].read_at(&mut raw, source.offset)?;
        let mut table = vec![0.0; buckets * heads];
        convert(&source.dtype, &raw, name, |index, value| table[index] = value)?;
        let positions = (tensor.shape[1] as usize).div_ceil(2);
        for head in super::tables::distance_bias(&table, buckets, heads, positions).chunks(2 * positions - 1)
        {
            stream.write(&head.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
        }
    }
    Ok(())
}
