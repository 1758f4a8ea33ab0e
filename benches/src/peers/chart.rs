//! A chart of grouped bars as SVG, readable on light and dark pages. What its bars mean is not known here.

use std::fmt::Write;

/// Width of the drawing, in its own units; it scales with the page.
const WIDTH: f64 = 760.0;
/// Where bars begin: labels stand left of it.
const BARS_X: f64 = 240.0;
/// Room for figures right of the longest bar.
const FIGURES: f64 = 70.0;
/// Height of a bar with the gap below it.
const BAR: f64 = 20.0;
/// Height of a group's heading.
const HEADING: f64 = 34.0;
/// Room above the first group.
const TOP: f64 = 38.0;
/// Bars and labels of a chart, at most: more would not be read.
pub(crate) const MAX_BARS: usize = 64;

/// One bar.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    /// What stands beside it.
    pub(crate) label: String,
    /// Its length; what is not finite or below zero is drawn as nothing.
    pub(crate) value: f64,
    /// Drawn in the stronger colour.
    pub(crate) ours: bool,
}

/// Bars that belong together.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Its heading.
    pub(crate) name: String,
    /// In the order in which they are drawn.
    pub(crate) bars: Vec<Bar>,
}

/// The chart; bars beyond [`MAX_BARS`] are left out.
#[must_use]
pub(crate) fn svg(title: &str, groups: &[Group]) -> String {
    let groups: Vec<&Group> = groups.iter().filter(|group| !group.bars.is_empty()).collect();
    let longest = groups
        .iter()
        .flat_map(|group| &group.bars)
        .map(|bar| length_of(bar.value))
        .fold(f64::MIN_POSITIVE, f64::max);
    let mut y = TOP;
    let mut body = String::new();
    let mut left = MAX_BARS;
    for group in groups {
        y += HEADING;
        text(&mut body, "group", BARS_X, y - 10.0, &group.name);
        for bar in group.bars.iter().take(left) {
            let length = (WIDTH - BARS_X - FIGURES) * length_of(bar.value) / longest;
            let class = if bar.ours { "ours" } else { "peer" };
            text(&mut body, "label", BARS_X - 8.0, y + 11.5, &bar.label);
            // Writing into a string cannot fail.
            let _ = writeln!(
                body,
                r#"<rect class="{class}" x="{BARS_X}" y="{y}" width="{length:.1}" height="{}" rx="2"/>"#,
                BAR - 5.0
            );
            text(
                &mut body,
                "figure",
                BARS_X + length + 6.0,
                y + 11.5,
                &format!("{:.0}", length_of(bar.value)),
            );
            y += BAR;
        }
        left = left.saturating_sub(group.bars.len());
    }
    let height = y + 12.0;
    let title = escape(title);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">
<style>
.page {{ fill: #ffffff; }}
text {{ font-family: system-ui, sans-serif; font-size: 12px; fill: #24292f; }}
.title {{ font-size: 15px; font-weight: 600; }}
.group {{ font-weight: 600; }}
.label {{ text-anchor: end; }}
.ours {{ fill: #0969da; }}
.peer {{ fill: #9aa4af; }}
@media (prefers-color-scheme: dark) {{
.page {{ fill: #0d1117; }}
text {{ fill: #e6edf3; }}
.ours {{ fill: #58a6ff; }}
.peer {{ fill: #6e7681; }}
}}
</style>
<path class="page" d="M0 0H{WIDTH}V{height}H0Z"/>
<text class="title" x="16" y="26">{title}</text>
{body}</svg>
"#
    )
}

fn length_of(value: f64) -> f64 {
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

fn text(to: &mut String, class: &str, x: f64, y: f64, words: &str) {
    let _ = writeln!(to, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(words));
}

/// Words as they may stand between tags and in quoted attributes; control characters are left out.
fn escape(words: &str) -> String {
    let mut escaped = String::with_capacity(words.len());
    for letter in words.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            letter if letter.is_control() => {}
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(label: &str, value: f64) -> Bar {
        Bar { label: label.into(), value, ours: false }
    }

    fn widths(svg: &str) -> Vec<f64> {
        let after = |part: &str| part.split('"').next().and_then(|width| width.parse().ok());
        svg.split("<rect").skip(1).filter_map(|rect| after(rect.split("width=\"").nth(1)?)).collect()
    }

    #[test]
    fn markup_in_names_stays_text() {
        let groups = [Group { name: "<g>".into(), bars: vec![bar("a & \"b\" 'c'\u{0}", 1.0)] }];
        let svg = svg("1 < 2", &groups);
        assert!(svg.contains("&lt;g&gt;") && svg.contains("a &amp; &quot;b&quot; &#39;c&#39;<"), "{svg}");
        assert!(svg.contains("1 &lt; 2") && !svg.contains("<g>"), "{svg}");
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let groups = [
            Group { name: "f32".into(), bars: vec![bar("a", 10.0), bar("b", 20.0)] },
            Group { name: "none".into(), bars: Vec::new() },
            Group { name: "int8".into(), bars: vec![bar("c", 40.0)] },
        ];
        let svg = svg("t", &groups);
        let widths = widths(&svg);
        assert_eq!(widths.len(), 3);
        assert!((widths[2] / widths[0] - 4.0).abs() < 0.01 && (widths[1] / widths[0] - 2.0).abs() < 0.01);
        assert!(!svg.contains("none"), "a group without bars has no heading");
    }

    #[test]
    fn no_value_breaks_the_drawing() {
        let bars = vec![bar("nan", f64::NAN), bar("minus", -1.0), bar("infinite", f64::INFINITY)];
        let svg = svg("t", &[Group { name: "g".into(), bars }]);
        assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{svg}");
        assert_eq!(widths(&svg), [0.0, 0.0, 0.0]);
        let many = Group { name: "g".into(), bars: vec![bar("x", 1.0); MAX_BARS + 5] };
        assert_eq!(widths(&super::svg("t", &[many.clone(), many])).len(), MAX_BARS);
    }
}
