//! The nearest of some names to one that is wrong, by edit distance. Pure; knows no keys.

use crate::limits::MAX_KEY_BYTES;

/// Single-character edits (insert, delete, replace) between two texts, by bytes.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The last part of a dotted name.
fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Shortest last part of a key, in bytes, that is taken for the beginning of another.
const MIN_BEGUN_BYTES: usize = 4;

/// The candidate that is nearest to `wrong`, if any is near enough to be meant: at most half of its characters differ, or
/// its last part is nearly the same. Upper and lower case do not differ.
pub(crate) fn nearest<'a>(wrong: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if wrong.is_empty() || wrong.len() > MAX_KEY_BYTES {
        return None;
    }
    let wrong = wrong.to_ascii_lowercase();
    let cost = |candidate: &str| {
        let candidate = candidate.to_ascii_lowercase();
        // A key that was broken off costs one, beside the typing errors in what is there of it.
        let is_begun = wrong.contains('.') && last_part(&wrong).len() >= MIN_BEGUN_BYTES;
        let begun = candidate.as_bytes().get(..wrong.len()).filter(|_| is_begun);
        let begun = begun.map_or(usize::MAX, |begun| distance(wrong.as_bytes(), begun) + 1);
        let whole = distance(wrong.as_bytes(), candidate.as_bytes()).min(begun);
        let (part, meant) = (last_part(&wrong), last_part(&candidate));
        let last = distance(part.as_bytes(), meant.as_bytes());
        // A right last part in the wrong place costs as much as two typing errors.
        let near_last = last * 3 < meant.len();
        let near_whole = whole * 2 <= candidate.len().max(wrong.len());
        match (near_whole, near_last) {
            (_, true) => Some(whole.min(last + 2)),
            (true, false) => Some(whole),
            (false, false) => None,
        }
    };
    candidates.into_iter().filter_map(|name| cost(name).map(|cost| (cost, name))).min().map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_were_broken_off_are_found() {
        let keys = ["sharing.enabled", "sharing.unload_after_seconds", "sharing.max_shared_models"];
        assert_eq!(nearest("sharing.unload_afer", keys), Some("sharing.unload_after_seconds"));
        assert_eq!(nearest("sharing.enable", keys), Some("sharing.enabled"));
        assert_eq!(nearest("sharing.max_models", keys), Some("sharing.max_shared_models"));
    }

    #[test]
    fn distances_are_edits() {
        for (a, b, edits) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)] {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), edits, "{a} {b}");
            assert_eq!(distance(b.as_bytes(), a.as_bytes()), edits, "{b} {a}");
        }
    }

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let keys =
            ["sharing.enabled", "sharing.unload_after_seconds", "embedding_cache.ttl_seconds", "enabled"];
        let near = |wrong| nearest(wrong, keys);
        assert_eq!(near("sharing.unload_after"), Some("sharing.unload_after_seconds"));
        assert_eq!(near("unload_after_seconds"), Some("sharing.unload_after_seconds"));
        assert_eq!(near("Sharing.Enabled"), Some("sharing.enabled"));
        assert_eq!(near("cache.ttl_seconds"), Some("embedding_cache.ttl_seconds"));
        assert_eq!(near("xyzzy"), None);
        assert_eq!(near(""), None);
        assert_eq!(near(&"x".repeat(MAX_KEY_BYTES + 1)), None);
    }
}
