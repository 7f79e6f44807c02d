//! Reports: what result files say, for a terminal, for the README, and as one page to pass on.
//!
//! A report is a list of sections of text, tables and plots, made once from result files; the three writers put the same
//! sections into their format. The HTML page needs nothing but itself: styles and plots are in it, and it follows the reader's
//! choice of dark or light.

mod html;
mod markdown;
mod plot;
mod sections;
mod text;

pub use html::html;
pub use markdown::markdown;
pub use plot::Plot;
pub use sections::{checked, comparisons, page};
pub use text::text;

/// A part of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What it consists of, in order.
    pub parts: Vec<Part>,
}

/// A piece of a section.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// A paragraph.
    Text(String),
    /// A command line.
    Command(String),
    /// Rows and columns.
    Table(Table),
    /// A picture; only where there can be one.
    Plot(Plot),
    /// What the figures have to be read with.
    Warnings(Vec<String>),
}

/// Rows and columns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Head of each column.
    pub columns: Vec<String>,
    /// As many cells in each as there are columns.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: impl Into<String>, columns: Vec<String>) -> Self {
        Self {
            title: title.into(),
            columns,
            rows: Vec::new(),
        }
    }

    /// Without the columns in which no row has anything.
    fn without_empty_columns(mut self) -> Self {
        let filled: Vec<bool> = (0..self.columns.len())
            .map(|at| {
                self.rows
                    .iter()
                    .any(|row| row.get(at).is_some_and(|cell| !cell.is_empty()))
            })
            .collect();
        let keep = |cells: Vec<String>| {
            let cells = cells.into_iter().zip(&filled);
            cells
                .filter(|(_, filled)| **filled)
                .map(|(cell, _)| cell)
                .collect()
        };
        for row in core::iter::once(&mut self.columns).chain(&mut self.rows) {
            *row = keep(core::mem::take(row));
        }
        self
    }
}

#[cfg(test)]
mod tests;
