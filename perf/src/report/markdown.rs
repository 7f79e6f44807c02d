//! For the README.

use super::{Part, Section, Table};

/// All sections as Markdown. Plots are left out.
#[must_use]
pub fn markdown(sections: &[Section]) -> String {
    let mut out = String::from("# Ripstop: measurements\n");
    for section in sections {
        out.push_str(&format!("\n## {}\n", section.title));
        for part in &section.parts {
            match part {
                Part::Text(text) => out.push_str(&format!("\n{text}\n")),
                Part::Command(command) => out.push_str(&format!("\n```\n{command}\n```\n")),
                Part::Table(table) => {
                    out.push_str(&format!("\n**{}**\n\n{}", table.title, of_table(table)));
                }
                Part::Plot(_) => {}
                Part::Warnings(warnings) => {
                    out.push_str("\nTo be read with this in mind:\n\n");
                    for warning in warnings {
                        out.push_str(&format!("- {}\n", in_cell(warning)));
                    }
                }
            }
        }
    }
    out
}

fn of_table(table: &Table) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| in_cell(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = "|---".repeat(table.columns.len());
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("{}{rule}|\n{rows}", line(&table.columns))
}

/// On one line, and without what would end a cell.
fn in_cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
