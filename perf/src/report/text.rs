//! For a terminal.

use super::{Part, Section, Table};

/// All sections as plain text. Plots are left out.
#[must_use]
pub fn text(sections: &[Section]) -> String {
    let mut out = String::new();
    for section in sections {
        out.push_str(&format!(
            "{}\n{}\n",
            section.title,
            "=".repeat(section.title.chars().count())
        ));
        for part in &section.parts {
            out.push_str(&of_part(part));
        }
        out.push('\n');
    }
    out
}

/// One part as plain text.
fn of_part(part: &Part) -> String {
    match part {
        Part::Text(text) => format!("{text}\n"),
        Part::Command(command) => format!("$ {command}\n"),
        Part::Table(table) => format!("\n{}\n{}", table.title, aligned(table)),
        Part::Plot(_) => String::new(),
        Part::Warnings(warnings) => {
            let lines = warnings.iter().map(|warning| format!("  ! {warning}\n"));
            format!(
                "\nTo be read with this in mind\n{}",
                lines.collect::<String>()
            )
        }
    }
}

/// Columns as wide as their widest cell.
fn aligned(table: &Table) -> String {
    let lines = || core::iter::once(&table.columns).chain(&table.rows);
    let widths: Vec<usize> = (0..table.columns.len())
        .map(|at| {
            lines()
                .filter_map(|row| row.get(at))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for row in lines() {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(&format!("  {}\n", line.trim_end()));
    }
    out
}
