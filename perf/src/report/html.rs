//! One page that needs nothing but itself. It is also well-formed XML, so that a test can read it.

use super::{Part, Section, Table, plot};

const STYLE: &str = "
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --faint: #6b7280; --line: #d4d7dc; --shade: #f3f4f6; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e5e7eb; --faint: #9ca3af; --line: #3a3f47; --shade: #1e2127; --warn: #fbbf24; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.5rem; }
nav a { color: inherit; margin-right: 1rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; }
caption { font-weight: 600; padding: .5rem 0; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
tbody tr:hover { background: var(--shade); }
pre { background: var(--shade); overflow-x: auto; padding: .75rem; }
.warnings { border-left: 3px solid var(--warn); padding-left: 1rem; }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; }
svg { height: auto; max-width: 100%; }
";

/// All sections as an HTML page.
#[must_use]
pub fn html(sections: &[Section]) -> String {
    let mut body = String::new();
    for (number, section) in sections.iter().enumerate() {
        body.push_str(&format!(
            "<h2 id=\"s{number}\">{}</h2>\n",
            escape(&section.title)
        ));
        for part in &section.parts {
            body.push_str(&of_part(part));
        }
    }
    let links: String = sections
        .iter()
        .enumerate()
        .map(|(number, section)| format!("<a href=\"#s{number}\">{}</a>\n", escape(&section.title)))
        .collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>Ripstop: measurements</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Ripstop: measurements</h1>\n\
         <nav>\n{links}</nav>\n{body}</body>\n</html>\n"
    )
}

fn of_part(part: &Part) -> String {
    match part {
        Part::Text(text) => format!("<p>{}</p>\n", escape(text)),
        Part::Command(command) => format!("<pre><code>{}</code></pre>\n", escape(command)),
        Part::Table(table) => of_table(table),
        Part::Plot(plot) => match plot::svg(plot) {
            Ok(svg) => format!("<figure>{svg}</figure>\n"),
            Err(why) => format!(
                "<p>The plot \u{201c}{}\u{201d} could not be drawn: {}</p>\n",
                escape(&plot.title),
                escape(&why)
            ),
        },
        Part::Warnings(warnings) => {
            let items: String = warnings
                .iter()
                .map(|warning| format!("<li>{}</li>\n", escape(warning)))
                .collect();
            format!(
                "<div class=\"warnings\"><p>To be read with this in mind:</p>\n<ul>\n{items}</ul></div>\n"
            )
        }
    }
}

fn of_table(table: &Table) -> String {
    let cells = |kind: &str, row: &[String]| {
        let cells = row
            .iter()
            .map(|cell| format!("<{kind}>{}</{kind}>", escape(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = table.rows.iter().map(|row| cells("td", row)).collect();
    format!(
        "<div class=\"table\"><table>\n<caption>{}</caption>\n<thead>\n{}</thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n",
        escape(&table.title),
        cells("th", &table.columns)
    )
}

/// Text as text, whatever is in it. Characters that XML has not are left out.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            control if control.is_control() && control != '\n' && control != '\t' => {}
            other => out.push(other),
        }
    }
    out
}
