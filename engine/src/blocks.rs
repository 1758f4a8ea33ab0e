//! Quantised blocks as GGUF files have them: kinds, sizes, and what numbers they stand for. Pure; kernels and the compiler share it.
//!
//! A row of a matrix is a run of blocks; each block holds so many numbers and their scales. Layouts are those of ggml
//! (`ggml-common.h`), little-endian.

use half::f16;

/// Numbers of the largest block.
pub(crate) const MAX_BLOCK_ELEMENTS: usize = 256;

/// A kind of quantised blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockKind {
    /// 32 numbers of 8 bits and a scale.
    Q8_0,
    /// 32 numbers of 4 bits and a scale.
    Q4_0,
    /// 256 numbers of 4 bits in eight groups with scales and lows of 6 bits.
    Q4K,
    /// 256 numbers of 6 bits in sixteen groups with scales of 8 bits.
    Q6K,
}

impl BlockKind {
    /// All kinds.
    pub(crate) const ALL: [BlockKind; 4] = [BlockKind::Q8_0, BlockKind::Q4_0, BlockKind::Q4K, BlockKind::Q6K];

    /// Its name in GGUF files, and behind a tensor's name in an image.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            BlockKind::Q8_0 => "Q8_0",
            BlockKind::Q4_0 => "Q4_0",
            BlockKind::Q4K => "Q4_K",
            BlockKind::Q6K => "Q6_K",
        }
    }

    /// The kind of this name.
    pub(crate) fn from_name(name: &str) -> Option<BlockKind> {
        BlockKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Numbers of a block.
    pub(crate) const fn elements(self) -> usize {
        match self {
            BlockKind::Q8_0 | BlockKind::Q4_0 => 32,
            BlockKind::Q4K | BlockKind::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            BlockKind::Q8_0 => 34,
            BlockKind::Q4_0 => 18,
            BlockKind::Q4K => 144,
            BlockKind::Q6K => 210,
        }
    }

    /// Bytes of a row of `inputs` numbers; `None` when they are no whole blocks.
    pub(crate) fn row_bytes(self, inputs: usize) -> Option<usize> {
        inputs.is_multiple_of(self.elements()).then(|| inputs / self.elements() * self.bytes())
    }
}

#[inline(always)]
fn scale(bytes: &[u8], at: usize) -> f32 {
    f16::from_bits(u16::from_le_bytes([bytes[at], bytes[at + 1]])).to_f32()
}

/// Whether all scales of whole blocks are finite, so that all their numbers are.
pub(crate) fn is_finite(kind: BlockKind, blocks: &[u8]) -> bool {
    let scales: &[usize] = match kind {
        BlockKind::Q8_0 | BlockKind::Q4_0 => &[0],
        BlockKind::Q4K => &[0, 2],
        BlockKind::Q6K => &[208],
    };
    blocks.chunks_exact(kind.bytes()).all(|block| scales.iter().all(|at| scale(block, *at).is_finite()))
}

/// The numbers of whole blocks, as many as `out` has room for. Formulas as in ggml's `dequantize_row_…`.
///
/// # Panics
/// When `blocks` has fewer blocks than `out` wants.
#[inline(always)]
pub(crate) fn dequantize(kind: BlockKind, blocks: &[u8], out: &mut [f32]) {
    let blocks = blocks.chunks_exact(kind.bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(kind.elements())) {
        match kind {
            BlockKind::Q8_0 => {
                let d = scale(block, 0);
                for (out, q) in out.iter_mut().zip(&block[2..34]) {
                    *out = d * f32::from(*q as i8);
                }
            }
            BlockKind::Q4_0 => {
                let d = scale(block, 0);
                let (low, high) = out.split_at_mut(16);
                for ((low, high), q) in low.iter_mut().zip(high).zip(&block[2..18]) {
                    *low = d * (f32::from(q & 15) - 8.0);
                    *high = d * (f32::from(q >> 4) - 8.0);
                }
            }
            BlockKind::Q4K => dequantize_q4k(block, out),
            BlockKind::Q6K => dequantize_q6k(block, out),
        }
    }
}

#[inline(always)]
fn dequantize_q4k(block: &[u8], out: &mut [f32]) {
    let (d, least) = (scale(block, 0), scale(block, 2));
    let scales = &block[4..16];
    // Scale and low of a group, 6 bits each: the upper four groups have their upper bits with the lower ones.
    let pair = |group: usize| match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => (
            (scales[group + 4] & 15) | ((scales[group - 4] >> 6) << 4),
            (scales[group + 4] >> 4) | ((scales[group] >> 6) << 4),
        ),
    };
    for (half, (out, q)) in out.chunks_exact_mut(64).zip(block[16..144].chunks_exact(32)).enumerate() {
        let ((s1, m1), (s2, m2)) = (pair(2 * half), pair(2 * half + 1));
        let (d1, l1) = (d * f32::from(s1), least * f32::from(m1));
        let (d2, l2) = (d * f32::from(s2), least * f32::from(m2));
        let (low, high) = out.split_at_mut(32);
        for ((low, high), q) in low.iter_mut().zip(high).zip(q) {
            *low = d1 * f32::from(q & 15) - l1;
            *high = d2 * f32::from(q >> 4) - l2;
        }
    }
}

#[inline(always)]
fn dequantize_q6k(block: &[u8], out: &mut [f32]) {
    let d = scale(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * half..64 * half + 64];
        let high = &block[128 + 32 * half..128 + 32 * half + 32];
        let scales = &block[192 + 8 * half..192 + 8 * half + 8];
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            let (nibbles, up) = (&low[32 * (quarter % 2)..][..32], 4 * (quarter / 2) as u32);
            for (part, out) in out.chunks_exact_mut(16).enumerate() {
                let d = d * f32::from(scales[2 * quarter + part] as i8);
                let (nibbles, high) = (&nibbles[16 * part..][..16], &high[16 * part..][..16]);
                for ((out, q), h) in out.iter_mut().zip(nibbles).zip(high) {
                    let q = ((q >> up) & 15) | (((h >> (2 * quarter)) & 3) << 4);
                    *out = d * (f32::from(q) - 32.0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    #[test]
    fn numbers_are_those_of_candle() {
        let values: Vec<f32> =
            (0..1024).map(|index| (index as f32 * 0.37).sin() * (1.0 + index as f32 / 100.0)).collect();
        let tensor = Tensor::from_vec(values, (2, 512), &Device::Cpu).expect("tensor");
        for (kind, theirs) in [
            (BlockKind::Q8_0, GgmlDType::Q8_0),
            (BlockKind::Q4_0, GgmlDType::Q4_0),
            (BlockKind::Q4K, GgmlDType::Q4K),
            (BlockKind::Q6K, GgmlDType::Q6K),
        ] {
            let quantized = QTensor::quantize(&tensor, theirs).expect("quantises");
            let wanted: Vec<f32> =
                quantized.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()?.to_vec1()).expect("numbers");
            let bytes = quantized.data().expect("bytes");
            assert_eq!(bytes.len(), 2 * kind.row_bytes(512).expect("whole blocks"));
            let mut found = vec![0.0; 1024];
            dequantize(kind, &bytes, &mut found);
            for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                assert!(
                    (found - wanted).abs() <= 1e-5 * wanted.abs().max(1.0),
                    "{kind:?} {index}: {found} {wanted}"
                );
            }
        }
    }
}
