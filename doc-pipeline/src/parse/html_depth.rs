//! A look at HTML before it is parsed: how deep its tags nest. The parser's work grows with the square of the
//! depth, so absurd nesting is refused before it costs minutes.

use super::ParseError;
use crate::limits::{HTML_OPEN_TAGS_MAX, NESTING_MAX};

/// Elements that have no end tag, or that the next one of their kind ends: unclosed, they do not nest.
const NOT_NESTING: [&str; 38] = [
    "area",
    "base",
    "br",
    "col",
    "embed",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "param",
    "source",
    "track",
    "wbr",
    "p",
    "li",
    "dt",
    "dd",
    "td",
    "th",
    "tr",
    "tbody",
    "thead",
    "tfoot",
    "colgroup",
    "caption",
    "option",
    "optgroup",
    "rt",
    "rp",
    "a",
    "nobr",
    "button",
    "html",
    "head",
    "body",
    "frame",
    "plaintext",
];
/// Elements whose content is text up to their end tag.
const RAW_TEXT: [&str; 6] = ["script", "style", "textarea", "title", "xmp", "noembed"];
/// Longest tag name that is looked at.
const NAME_BYTES_MAX: usize = 16;

/// Refuses a text with more than [`HTML_OPEN_TAGS_MAX`] tags open at once.
pub(super) fn check(text: &str) -> Result<(), ParseError> {
    let bytes = text.as_bytes();
    let mut open = 0_usize;
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|byte| *byte == b'<') {
        at += found + 1;
        let rest = &bytes[at..];
        if rest.starts_with(b"!--") {
            at += find(rest, b"-->").map_or(rest.len(), |end| end + 3);
            continue;
        }
        let is_end = rest.first() == Some(&b'/');
        let (name, length) = tag_name(&rest[usize::from(is_end)..]);
        if length == 0 {
            continue;
        }
        let name = name.as_str();
        if NOT_NESTING.contains(&name) {
            continue;
        }
        if is_end {
            open = open.saturating_sub(1);
        } else if RAW_TEXT.contains(&name) {
            at += find_end_tag(rest, name.as_bytes()).unwrap_or(rest.len());
        } else {
            open += 1;
            if open > HTML_OPEN_TAGS_MAX {
                return Err(ParseError::limit("levels of nesting", NESTING_MAX, "NESTING_MAX"));
            }
        }
    }
    Ok(())
}

/// The tag name at the front in lower case, cut at [`NAME_BYTES_MAX`], and its length; none when it does not begin
/// with a letter.
fn tag_name(bytes: &[u8]) -> (String, usize) {
    if !bytes.first().is_some_and(u8::is_ascii_alphabetic) {
        return (String::new(), 0);
    }
    let name: String = bytes
        .iter()
        .take(NAME_BYTES_MAX)
        .take_while(|byte| byte.is_ascii_alphanumeric())
        .map(|byte| char::from(byte.to_ascii_lowercase()))
        .collect();
    let length = name.len();
    (name, length)
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// Where `</name` begins.
fn find_end_tag(bytes: &[u8], name: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(found) = find(&bytes[at..], b"</") {
        at += found;
        if bytes[at + 2..].get(..name.len()).is_some_and(|end| end.eq_ignore_ascii_case(name)) {
            return Some(at);
        }
        at += 2;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_stays_open_counts() {
        let many = HTML_OPEN_TAGS_MAX + 1;
        assert!(check(&"<DIV class='x'>".repeat(many)).is_err());
        for sound in [
            "<div>x</div>",
            "<p>text",
            "<br>",
            "<li>a",
            "<td>b",
            "<script>'<div>'</script>",
            "<!-- <div> -->",
        ] {
            assert!(check(&sound.repeat(many)).is_ok(), "{sound}");
        }
        assert!(check("<script><div>").is_ok() && check("a < b <3 </").is_ok());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[a-z<>/!\u{e9}-]{0,80}|(<script|</|<!--|-->|<|>){0,20}") {
            let _ = check(&text);
        }
    }
}
