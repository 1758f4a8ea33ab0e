//! Takes numbers and bytes off a fuzz input; whatever is missing reads as zero or empty. No knowledge of any format.

/// The rest of an input.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let bytes = self.take(N);
        out[..bytes.len()].copy_from_slice(bytes);
        out
    }

    pub(super) fn u8(&mut self) -> u8 {
        self.number::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }

    /// A word that is often one of the numbers that break careless arithmetic.
    pub(super) fn word(&mut self) -> u32 {
        match self.u8() {
            shape @ 0..=15 => u32::from(shape),
            16 => u32::MAX,
            17 => u32::MAX - u32::from(self.u8()),
            18 => 1 << 31,
            19 => u32::from(self.u16()),
            _ => self.u32(),
        }
    }
}
