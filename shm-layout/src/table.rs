//! Field tables: the one definition that code, const checks and docs/layout.md share. No layout of its own lives here.

use std::fmt::Write as _;

/// One field of a fixed binary layout. All numbers in the layouts of this crate are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Name of the field, unique in its table.
    pub name: &'static str,
    /// Offset in bytes from the start of the structure.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
    /// Type as it is written in the documentation: `u8`, `u16`, `u32`, `u64`, `[u8; 32]`, `atomic u32`, ...
    pub kind: &'static str,
    /// Who writes it.
    pub writer: &'static str,
    /// What it means, with units.
    pub meaning: &'static str,
}

impl Field {
    /// A field of a table; shorthand for the struct literal.
    pub const fn new(
        name: &'static str,
        offset: usize,
        size: usize,
        kind: &'static str,
        writer: &'static str,
        meaning: &'static str,
    ) -> Self {
        Field { name, offset, size, kind, writer, meaning }
    }

    /// Offset of the first byte after the field.
    pub const fn end(&self) -> usize {
        self.offset + self.size
    }
}

/// One step of FNV-1a, 64 bits, over the bytes of a number: what layouts are hashed with.
pub(crate) const fn fnv(mut hash: u64, value: u64) -> u64 {
    let bytes = value.to_le_bytes();
    let mut i = 0;
    while i < 8 {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

const fn index_of(table: &[Field], name: &str) -> usize {
    let mut i = 0;
    while i < table.len() {
        if same(table[i].name, name) {
            return i;
        }
        i += 1;
    }
    panic!("no field of that name in the table")
}

/// Offset in bytes of the field `name`. For const contexts, where an unknown name fails the build.
///
/// # Panics
/// When the table has no such field.
pub const fn offset_of(table: &[Field], name: &str) -> usize {
    table[index_of(table, name)].offset
}

/// Size in bytes of the field `name`. For const contexts, where an unknown name fails the build.
///
/// # Panics
/// When the table has no such field.
pub const fn size_of_field(table: &[Field], name: &str) -> usize {
    table[index_of(table, name)].size
}

/// Natural alignment in bytes that the table demands of a field: its size for 1, 2, 4 and 8 bytes; for larger fields the
/// largest of 8, 4, 2, 1 that divides the size, except that byte arrays (kind starting with `[u8`) need none.
pub const fn alignment_of(field: &Field) -> usize {
    let kind = field.kind.as_bytes();
    if kind.len() >= 3 && kind[0] == b'[' && kind[1] == b'u' && kind[2] == b'8' {
        return 1;
    }
    if field.size.is_multiple_of(8) {
        8
    } else if field.size.is_multiple_of(4) {
        4
    } else if field.size.is_multiple_of(2) {
        2
    } else {
        1
    }
}

/// Checks a table: no empty field, ascending offsets without overlap, natural alignment, unique names, everything inside
/// `total_bytes`. Call it in a `const _: () = …` so that a wrong table does not build.
///
/// # Panics
/// When one of these does not hold.
pub const fn assert_packed(table: &[Field], total_bytes: usize) {
    let mut i = 0;
    let mut end = 0;
    while i < table.len() {
        let field = &table[i];
        assert!(field.size > 0, "a field has no size");
        assert!(field.offset >= end, "two fields overlap, or the table is not in ascending order");
        assert!(field.offset.is_multiple_of(alignment_of(field)), "a field is not naturally aligned");
        end = field.end();
        let mut j = 0;
        while j < i {
            assert!(!same(table[j].name, field.name), "two fields have one name");
            j += 1;
        }
        i += 1;
    }
    assert!(end <= total_bytes, "the fields do not fit into the structure");
}

/// The table as a Markdown section: a heading and one row per field, gaps shown as reserved rows.
pub fn render_markdown(title: &str, table: &[Field]) -> String {
    let mut out = format!(
        "### {title}\n\n| offset | bytes | field | type | written by | meaning |\n|---:|---:|---|---|---|---|\n"
    );
    let mut end = 0;
    for field in table {
        if field.offset > end {
            let _ = writeln!(out, "| {end} | {} | | | | reserved, zero |", field.offset - end);
        }
        let _ = writeln!(
            out,
            "| {} | {} | `{}` | {} | {} | {} |",
            field.offset, field.size, field.name, field.kind, field.writer, field.meaning
        );
        end = field.end();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Field] = &[
        Field::new("magic", 0, 8, "[u8; 8]", "creator", "who it is"),
        Field::new("count", 8, 4, "u32", "creator", "how many"),
        Field::new("total_bytes", 16, 8, "u64", "creator", "how long"),
    ];
    const _: () = assert_packed(TABLE, 24);

    #[test]
    fn offsets_come_from_the_table() {
        assert_eq!(offset_of(TABLE, "total_bytes"), 16);
        assert_eq!(size_of_field(TABLE, "count"), 4);
    }

    #[test]
    fn markdown_shows_fields_and_gaps() {
        let text = render_markdown("Header", TABLE);
        assert!(text.contains("| 8 | 4 | `count` | u32 | creator | how many |"), "{text}");
        assert!(text.contains("| 12 | 4 | | | | reserved, zero |"), "{text}");
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlap_is_refused() {
        assert_packed(&[Field::new("a", 0, 8, "u64", "", ""), Field::new("b", 4, 4, "u32", "", "")], 16);
    }

    #[test]
    #[should_panic(expected = "aligned")]
    fn misalignment_is_refused() {
        assert_packed(&[Field::new("a", 4, 8, "u64", "", "")], 16);
    }

    #[test]
    #[should_panic(expected = "fit")]
    fn a_field_past_the_end_is_refused() {
        assert_packed(&[Field::new("a", 8, 8, "u64", "", "")], 12);
    }
}
